"""``python -m trainer --help``: every setting of the chosen configuration, with its default and its meaning."""

from __future__ import annotations

import dataclasses
import textwrap
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from trainer.compose import compose_raw, config_folder
from trainer.config import describe_field, schema_of

HEADER = """\
Onecurve: one loop, one checkpoint and one loss curve on any number of ranks.

  onecurve train [group=choice ...] [setting=value ...]        one process
  torchrun --nproc-per-node N -m trainer ...                   N ranks
  python -m trainer --multirun key=a,b ...                     a sweep: a run for every combination
  python -m trainer --cfg job ...                              show the composed configuration, run nothing
  python -m trainer pipeline=NAME --help                       the settings of another choice
"""


def help_text(overrides: Sequence[str], config_dirs: Sequence[str]) -> str:
    """Header, choices of every group, and all settings of what ``overrides`` choose."""
    cfg = compose_raw(overrides, config_dirs=config_dirs)
    groups = "\n".join(_groups([config_folder(), *map(Path, config_dirs)]))
    settings = "\n".join(_settings(cfg))
    return f"{HEADER}\nChoices (group=choice)\n{groups}\n\nSettings, as composed now\n{settings}"


def _groups(folders: Sequence[Path]) -> Iterator[str]:
    choices: dict[str, set[str]] = {}
    for file in (file for folder in folders for file in folder.glob("*/*.yaml")):
        choices.setdefault(file.parent.name, set()).add(file.stem)
    for group, names in sorted(choices.items()):
        text = ", ".join(sorted(names))
        yield textwrap.fill(text, 116, initial_indent=f"  {group:<12} ", subsequent_indent=" " * 15)


def _settings(node: DictConfig, path: str = "") -> Iterator[str]:
    cls = schema_of(node)
    if cls is None:
        return
    hints = typing.get_type_hints(cls)
    groups = []
    for field in dataclasses.fields(cls):
        plain = OmegaConf.is_missing(node, field.name) or OmegaConf.is_interpolation(node, field.name)
        if not plain and schema_of(node[field.name]) is not None:
            groups.append(field.name)
            continue
        raw = OmegaConf.to_container(node, resolve=False)
        value = raw[field.name] if isinstance(raw, dict) else None
        shown = "null" if value is None else str(value).lower() if isinstance(value, bool) else value
        limits = " and ".join(f"{_WORDS[kind]} {limit:g}" for kind, limit in field.metadata.get("limits", {}).items())
        kind = describe_field(field, hints[field.name]) + (f" {limits}" if limits else "")
        lead = f"  {path}{field.name}={shown}"
        text = textwrap.wrap(f"{field.metadata.get('doc', '')} [{kind}]", 76)
        yield f"{lead:<42} {text[0]}" if len(lead) < 42 else f"{lead}\n{'':<42} {text[0]}"
        yield from (f"{'':<42} {line}" for line in text[1:])
    for name in groups:
        kind_of = schema_of(node[name])
        summary = (kind_of.__doc__ or "").strip().splitlines()[0] if kind_of else ""
        yield f"\n{path}{name}: {summary}"
        yield from _settings(node[name], f"{path}{name}.")


_WORDS = {"above": ">", "least": ">=", "below": "<", "most": "<="}
