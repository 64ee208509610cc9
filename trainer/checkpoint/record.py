"""The settings of a run as its record has them, and what of them differs from those of another time.

A record names the kind of every choice (``schedule: {kind: cosine, ...}``), so that it says what was chosen. A password in a
URL and the value of an environment variable (``${oc.env:NAME}``) are in no record: what was typed is.
"""

from __future__ import annotations

import dataclasses
import enum
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from omegaconf import MISSING, DictConfig

from trainer.config import ConfigError, kind_of, kinds_beside, schema_of, unresolved
from trainer.secrets import secret_digest, without_password

KIND = "kind"
FREE_TO_CHANGE = (
    "name", "run_dir", "resume", "steps", "epochs", "imports", "strategy", "deterministic", "batch.micro", "tracking",
    "checkpoint", "evaluation", "export", "profile", "watchdog", "preflight",
    "estimate", "sweep", "data.cache", "guard.max_bad_steps", "guard.first_step",
    "model.compile",
    "model.activation_checkpointing",
    "adapter.merge_onto",
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
    kinds: of a choice, the schema of every kind by name
    """

    name: str
    value: Any
    used: Any
    is_default: bool
    kinds: Mapping[str, type] = dataclasses.field(default_factory=dict)


def is_free(name: str, free: Iterable[str] = FREE_TO_CHANGE) -> bool:
    """Whether a setting, or the group that it is in, is among those that may change."""
    return any(name == one or name.startswith(f"{one}.") for one in free)


def settings(node: Any, path: str = "") -> Iterator[Setting]:
    """Every setting of a configuration object, or of a composed tree that is not parsed, by its full name."""
    cls = schema_of(node) or type(node)
    if (kind := kind_of(cls)) is not None:
        yield Setting(f"{path}{KIND}", kind, kind, False, kinds_beside(cls))
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
    kinds = [key for key in dict.fromkeys([*before, *new]) if key.endswith(f".{KIND}")]
    recorded = any(key in before for key in kinds)  # not by releases before 0.2
    others: list[str] = []
    for key in sorted(kinds, key=len):
        old, chosen = before.get(key, ABSENT), new[key].value if key in new else ABSENT
        old = old if recorded else _kind_by_settings(before, new[key])
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


def _kind_by_settings(before: Mapping[str, Any], choice: Setting) -> Any:
    """The kind of a choice as far as the settings tell that a record without kinds has: its own, unless only others fit."""
    node = choice.name.removesuffix(KIND)
    recorded = {key.removeprefix(node).partition(".")[0] for key in before if key.startswith(node)}
    fitting = [kind for kind, cls in choice.kinds.items() if {f.name for f in dataclasses.fields(cls)} == recorded]
    return choice.value if not fitting or choice.value in fitting else " or ".join(fitting)


def environment_digests(config: Any, salt: str) -> dict[str, str]:
    """A digest of what environment variables gave to each setting that may not change, by its name.

    Not of the paths of what is there: that is compared by digests of its own, wherever it lies.
    """
    return {
        one.name: secret_digest(one.used, salt)
        for one in settings(config)
        if one.value != one.used and "${" in str(one.value) and not is_free(one.name) and not _is_place(one.used)
    }


def _is_place(value: Any) -> bool:
    texts = value if isinstance(value, list) and value else [value]
    return all(isinstance(text, str) and os.path.exists(text) for text in texts)  # noqa: PTH110 (it may be too long a text)


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
