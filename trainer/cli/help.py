"""``python -m trainer --help``: every setting of the chosen configuration, with its default and its meaning."""

from __future__ import annotations

import dataclasses
import textwrap
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path

from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from trainer.config import describe_field, schema_of

HEADER = """\
Onecurve: one loop, one checkpoint and one loss curve on any number of ranks.

  python -m trainer [group=choice ...] [setting=value ...]     one process
  torchrun --nproc-per-node N -m trainer ...                   N ranks
  python -m trainer --multirun key=a,b ...                     a sweep: a run for every combination
  python -m trainer --cfg job ...                              show the composed configuration, run nothing
  python -m trainer pipeline=NAME --help                       the settings of another choice
"""


def help_text(folder: Path, overrides: Sequence[str]) -> str:
    """Header, choices of every group, and all settings of what ``overrides`` choose."""
    with initialize_config_dir(str(folder), version_base="1.3"):
        cfg = compose("train", overrides=list(overrides))
    groups = "\n".join(_groups(folder))
    settings = "\n".join(_settings(cfg))
    return f"{HEADER}\nChoices (group=choice)\n{groups}\n\nSettings, as composed now\n{settings}"


def _groups(folder: Path) -> Iterator[str]:
    for group in sorted(p for p in folder.iterdir() if p.is_dir()):
        names = ", ".join(sorted(p.stem for p in group.glob("*.yaml")))
        if names:
            yield textwrap.fill(names, 116, initial_indent=f"  {group.name:<12} ", subsequent_indent=" " * 15)


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
