"""Write docs/configuration.md from the dataclasses: every setting with its default, its range and its meaning.

python scripts/generate_configuration.py          write it
python scripts/generate_configuration.py --check  only say whether it is up to date (exit code 1 if not)
"""

from __future__ import annotations

import dataclasses
import re
import sys
import typing
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, OmegaConf

import trainer.run
from trainer.checkpoint.record import is_free
from trainer.config import describe_field

FILE = Path(__file__).resolve().parent.parent / "docs" / "configuration.md"
HEADER = """\
# Configuration

Written by `python scripts/generate_configuration.py` from the dataclasses that are the configuration; do not edit it.

`python -m trainer [group=choice ...] [setting=value ...]`: a *group* chooses which of several parts is used
(`pipeline=dpo`), a *setting* is a field of the chosen part (`pipeline.beta=0.2`). The defaults below are those of the
dataclasses; the YAML files of `configs/` may say otherwise, such as `configs/model/1b.yaml` for `model=1b`, and
`python -m trainer --help` shows what is in force with your choices. A setting that does not exist, has the wrong type or is
out of its range is refused before anything starts, together with everything else that is wrong.

*At a resume* a run that goes on may have another value of a setting (free), or may not (refused, with the difference),
because the result would be another: [resume.md](resume.md).
"""
ORDER = (
    "pipeline", "model", "data", "adapter", "strategy", "precision", "optimizer", "schedule", "reward", "tracking",
)  # fmt: skip
LIMITS = {"above": ">", "least": "≥", "below": "<", "most": "≤"}


def text() -> str:
    """The whole page."""
    groups = dict(sorted(schemas().items()))
    parts = [HEADER, *section("A run", trainer.run.Run, "")]
    for group in (*ORDER, *sorted(groups.keys() - set(ORDER))):
        for name, cls in sorted(groups.get(group, {}).items()):
            title = (
                f"`{group}={name}`" if (group, name) != ("model", "transformer") else "`model=tiny`, `125m`, `1b`, `7b`"
            )
            if name == group:
                title = f"`{group}`"
            if group == "reward":
                title = f"`reward@pipeline.reward.NAME={name}`"
            parts += section(title, cls, "pipeline.reward.NAME." if group == "reward" else f"{group}.")
    return "\n".join(parts)


def schemas() -> dict[str, dict[str, type]]:
    """Every registered dataclass by group and choice."""
    found: dict[str, dict[str, type]] = {}
    alone = {f.name for f in dataclasses.fields(trainer.run.Run) if f.default_factory is dataclasses.MISSING}
    for name, held in ConfigStore.instance().repo["schema"].items():
        group = name.removesuffix(".yaml")
        if not isinstance(held, dict) and group not in alone:
            continue  # unfolded into the table of a run
        for file, one in held.items() if isinstance(held, dict) else [(name, held)]:
            cls = getattr(OmegaConf.get_type(one.node), "shadow_of", None)
            if cls is not None and cls.__module__.startswith("trainer."):
                found.setdefault(group, {})[file.removesuffix(".yaml")] = cls
    return found


def section(title: str, cls: type, path: str) -> list[str]:
    """A heading, what the part is, and a table of its settings."""
    rows = list(settings(cls, path))
    if not rows:
        return [f"\n## {title}\n", first_sentence(cls), ""]
    head = "| setting | default | value | at a resume | meaning |\n| --- | --- | --- | --- | --- |"
    return [f"\n## {title}\n", first_sentence(cls), "", head, *rows, ""]


def settings(cls: type, path: str) -> Iterator[str]:
    """Rows of a table; parts inside a part are unfolded, groups are only named."""
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        hint, name = hints[field.name], f"{path}{field.name}"
        if dataclasses.is_dataclass(hint):
            if field.default_factory is not dataclasses.MISSING:
                yield from settings(typing.cast(type, hint), f"{name}.")
            else:
                meaning = cell(first_sentence(typing.cast(type, hint)))
                yield f"| `{name}` | a group | choose with `{name}=NAME` | {resume(name)} | {meaning} |"
            continue
        limits = " and ".join(f"{LIMITS[k]} {v:g}" for k, v in field.metadata.get("limits", {}).items())
        kind = words(field, hint) + (f", {limits}" if limits else "")
        meaning = cell(field.metadata.get("doc", ""))
        yield f"| `{name}` | {default(field)} | {cell(kind)} | {resume(name)} | {meaning} |"


def resume(name: str) -> str:
    """Whether a run that goes on may have another value."""
    return "free" if is_free(name) else "refused"


def words(field: dataclasses.Field[Any], hint: Any) -> str:
    """A type or its choices in words; parts by name, such as rewards, are named as such."""
    if typing.get_origin(hint) is dict and dataclasses.is_dataclass(typing.get_args(hint)[1]):
        return "parts by name"
    return describe_field(field, hint)


def default(field: dataclasses.Field[Any]) -> str:
    """A default as it would be typed."""
    made = field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
    if made is dataclasses.MISSING or made == MISSING:
        return "required"
    if made is None or isinstance(made, bool):
        return f"`{'null' if made is None else str(made).lower()}`"
    return f"`{made.value if isinstance(made, Enum) else made}`" if made != "" else "empty"


def first_sentence(cls: type) -> str:
    """The summary line of a docstring; a reference to a page of docs/ becomes a link from this one."""
    line = (cls.__doc__ or "").strip().splitlines()[0]
    return re.sub(r"docs/((\w+)\.md#([\w-]+))", r"[\2: \3](\1)", line)


def cell(text: str) -> str:
    """Text that may stand in a table."""
    return text.replace("|", "\\|").replace("\n", " ")


def main() -> int:
    """Write the page, or compare it."""
    if "--check" in sys.argv[1:]:
        fresh = FILE.is_file() and FILE.read_text(encoding="utf-8") == text()
        print(
            f"{FILE.name} is {'up to date' if fresh else 'out of date; run python scripts/generate_configuration.py'}"
        )
        return 0 if fresh else 1
    FILE.write_text(text(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
