"""The settings of a run as its record has them, and what of them differs from those of another time.

A record names the kind of every choice (``schedule: {kind: cosine, ...}``), so that it says what was chosen. A password in a
URL and the value of an environment variable (``${oc.env:NAME}``) are in no record: what was typed is.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from omegaconf import MISSING, DictConfig

from trainer.config import ConfigError, kind_of, schema_of, unresolved
from trainer.secrets import without_password

KIND = "kind"
FREE_TO_CHANGE = (
    "name", "run_dir", "resume", "steps", "epochs", "imports", "strategy", "deterministic", "batch.micro", "tracking",
    "checkpoint", "evaluation", "export", "profile", "watchdog", "preflight",
    "estimate", "sweep", "data.cache", "guard.max_bad_steps", "guard.first_step",
    "model.compile",
    "model.activation_checkpointing",
)  # fmt: skip
"""Settings that a resumed run may change: they decide how the work is done and for how long, not what is computed."""


class Absent:
    """In place of a value where a setting is not there at all."""

    def __repr__(self) -> str:
        return "absent"


ABSENT = Absent()


@dataclass(frozen=True)
class Setting:
    """A setting of a configuration.

    name: its full name; a choice has one that ends in ``kind``
    value: as plain YAML, as a record has it
    used: the value itself, which differs where a record must not have it
    is_default: whether it is what it is where nothing is said
    """

    name: str
    value: Any
    used: Any
    is_default: bool


def is_free(name: str, free: Iterable[str] = FREE_TO_CHANGE) -> bool:
    """Whether a setting, or the group that it is in, is among those that may change."""
    return any(name == one or name.startswith(f"{one}.") for one in free)


def settings(node: Any, path: str = "") -> Iterator[Setting]:
    """Every setting of a configuration object, or of a composed tree that is not parsed, by its full name."""
    cls = schema_of(node) or type(node)
    if (kind := kind_of(cls)) is not None:
        yield Setting(f"{path}{KIND}", kind, kind, False)
    composed = isinstance(node, DictConfig)
    typed = {} if composed else getattr(node, "as_typed", {})
    for field in dataclasses.fields(cls):
        value = unresolved(node, field.name) if composed else getattr(node, field.name)
        name, default = f"{path}{field.name}", _default(field)
        if field.name in typed:
            yield from _as_typed(name, plain(typed[field.name]), plain(value, secret=True))
        else:
            yield from _settings(name, value, default)


def _settings(name: str, value: Any, default: Any) -> Iterator[Setting]:
    if schema_of(value) is not None or dataclasses.is_dataclass(value):
        yield from settings(value, f"{name}.")
    elif isinstance(value, Mapping):
        # A key that is added or removed is a difference of its own.
        for key, member in value.items():
            inner = default.get(key, ABSENT) if isinstance(default, Mapping) else ABSENT
            yield from _settings(f"{name}.{key}", member, inner)
    else:
        yield Setting(name, plain(value), plain(value, secret=True), plain(value) == default)


def _as_typed(name: str, typed: Any, used: Any) -> Iterator[Setting]:
    if isinstance(typed, Mapping):
        for key, member in typed.items():
            yield from _as_typed(f"{name}.{key}", member, used[key])
    else:
        yield Setting(name, typed, used, False)


def differences(before: Mapping[str, Any], now: Iterable[Setting]) -> Iterator[tuple[str, Any, Any]]:
    """What two configurations hold different values of: full name, old value, new value; `ABSENT` where there is none.

    ``before``: values by full name. A setting that it does not know is one of a later release, and a difference unless it
    has its default. A choice of another kind is one difference, whatever else the two kinds have.
    """
    new = {setting.name: setting for setting in now}
    # Releases before 0.2 recorded no kinds.
    kinds = [key for key in dict.fromkeys([*before, *new]) if key.endswith(f".{KIND}")]
    others: list[str] = []
    for key in sorted(kinds, key=len) if any(key in before for key in kinds) else ():
        old, chosen = before.get(key, ABSENT), new[key].value if key in new else ABSENT
        if old != chosen and not any(key.startswith(node) for node in others):
            others.append(key.removesuffix(KIND))
            yield key.removesuffix(f".{KIND}"), old, chosen
    for key in dict.fromkeys([*before, *new]):
        if key in kinds or any(key.startswith(node) for node in others):
            continue
        if key not in new:
            yield key, before[key], ABSENT
        elif key not in before:
            if not new[key].is_default:
                yield key, ABSENT, new[key].value
        elif before[key] not in (new[key].value, new[key].used):
            yield key, before[key], new[key].value


def flat(record: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """The values of a record by full name; an empty mapping has none."""
    values: dict[str, Any] = {}
    for key, value in record.items():
        values |= flat(value, f"{path}{key}.") if isinstance(value, Mapping) else {f"{path}{key}": value}
    return values


def plain(node: Any, *, secret: bool = False) -> Any:
    """A configuration object as plain YAML values; ``secret``: with what a record must not have."""
    if dataclasses.is_dataclass(node) and not isinstance(node, type):
        kind = {} if kind_of(type(node)) is None else {KIND: kind_of(type(node))}
        typed = {} if secret else getattr(node, "as_typed", {})
        values = {f.name: plain(getattr(node, f.name), secret=secret) for f in dataclasses.fields(node)}
        return {**kind, **values, **plain(dict(typed))}
    if isinstance(node, enum.Enum):
        return node.value
    if isinstance(node, dict):
        return {key: plain(value, secret=secret) for key, value in node.items()}
    if isinstance(node, list | tuple):
        return [plain(value, secret=secret) for value in node]
    return without_password(node) if isinstance(node, str) and not secret else node


def defaults(node: Any) -> dict[str, Any]:
    """The defaults of all settings that have another value, by full name; None for those without a default."""
    changed: dict[str, Any] = {}
    for field in dataclasses.fields(node):
        value, default = getattr(node, field.name), _default(field)
        if dataclasses.is_dataclass(value):
            changed |= {f"{field.name}.{name}": usual for name, usual in defaults(value).items()}
        elif plain(value) != default:
            changed[field.name] = None if default is ABSENT else default
    return changed


def texts_of(config: Any) -> dict[str, tuple[str, str]]:
    """The settings of a run that decide what is computed and hold a text, by name: the text, and as a record has it."""
    every = (setting for setting in settings(config) if isinstance(setting.used, str) and not is_free(setting.name))
    return {setting.name: (setting.used, str(setting.value)) for setting in every}


def read_record(file: Path) -> dict[str, Any]:
    """The content of a run's ``config.yaml``: its ``config`` and its ``facts``.

    Raises:
        ConfigError: if it is damaged, or no record of a run.
    """
    try:
        record = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        record, why = None, f"cannot be read ({type(error).__name__})"
    else:
        why = "is empty" if record is None else "is not the record of a run"
    parts = [record.get(key) for key in ("config", "facts")] if isinstance(record, dict) else [None]
    if not all(isinstance(part, dict) for part in parts) or "identity" not in record["facts"]:
        raise ConfigError(
            [
                f"{file} {why}, so nobody can tell whether this is the same run; restore it from a backup, or start afresh "
                "with resume=new"
            ]
        )
    return record  # type: ignore[no-any-return]


def _default(field: dataclasses.Field[Any]) -> Any:
    made = field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
    return ABSENT if made is dataclasses.MISSING or made == MISSING else plain(made)
