"""Arguments that several verbs share."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from datetime import datetime
from typing import Any

import yaml

from trainer.compose import compose
from trainer.data.jinja_environment import TRAINING_DAY, midnight
from trainer.run import Run


def parser_of(verb: str, description: str | None) -> argparse.ArgumentParser:
    """The parser of a verb; ``description``: the text of its ``--help``, which shows an example."""
    return argparse.ArgumentParser(
        prog=f"onecurve {verb}", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Let a verb take the overrides of a run."""
    parser.add_argument("overrides", nargs="*", metavar="setting=value", help="overrides, as of 'onecurve train'")
    parser.add_argument("--config-dir", action="append", default=[], help="a folder of further YAML files")


def compose_run(parser: argparse.ArgumentParser, arguments: Sequence[str], name: str) -> tuple[argparse.Namespace, Run]:
    """Parse the arguments, wherever overrides stand among them, and compose the run that they describe."""
    parsed = parser.parse_intermixed_args(arguments)
    return parsed, compose(parsed.overrides, config_dirs=parsed.config_dir, name=name)


def add_template_arguments(
    parser: argparse.ArgumentParser, *, date: str | None = TRAINING_DAY, instead: str = "instead of the folder's own"
) -> None:
    """Let a verb take a chat template and its settings, for `template_options`; ``date``: None = the moment of rendering."""
    parser.add_argument("--template", help=f"a built-in chat template, or a file of Jinja, {instead}")
    parser.add_argument(
        "--template-settings", type=_setting, action="append", default=[], metavar="NAME=VALUE",
        help="the chat template's own variable, such as enable_thinking=false; may be repeated",
    )  # fmt: skip
    parser.add_argument(
        "--template-date", type=_day, default=date, metavar="YYYY-MM-DD",
        help=f"the day that strftime_now gives to the template; default {date or 'today'}",
    )  # fmt: skip


def template_options(a: argparse.Namespace) -> dict[str, Any]:
    """What the arguments say of a `Template`."""
    return {"settings": dict(a.template_settings), "now": a.template_date}


def _day(text: str) -> datetime:
    try:
        return midnight(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text} is no date; write it as YYYY-MM-DD") from None


def _setting(text: str) -> tuple[str, Any]:
    """A name and its value, written as in YAML."""
    name, equals, value = text.partition("=")
    if not (name and equals):
        raise argparse.ArgumentTypeError(f"{text} is no NAME=VALUE; write enable_thinking=false")
    try:
        return name, yaml.safe_load(value)
    except yaml.YAMLError:
        raise argparse.ArgumentTypeError(f"the value of {text} is no YAML; quote it") from None


def add_sampling_arguments(parser: argparse.ArgumentParser, *, temperature: float, tokens: int) -> None:
    """Let a verb take the settings of sampling that all of them have."""
    parser.add_argument("--temperature", type=float, default=temperature, help="0 takes the likeliest token")
    parser.add_argument("--tokens", type=int, default=tokens, help="longest answer")
    parser.add_argument("--seed", type=int, default=0)
