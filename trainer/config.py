"""Typed configuration: dataclasses hold names, types, units and ranges; YAML holds choices.

A schema is registered with Hydra as a *shadow* of its dataclass: the same fields, typed ``Any`` and open to further keys.
So Hydra composes whatever the YAML files and the command line say, and `parse` sees all of it at once: it alone converts,
checks ranges, names misspelt keys with their nearest neighbours, and shows every problem together.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import enum
import functools
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from trainer.secrets import ENVIRONMENT_READS

T = TypeVar("T")


class InputError(ValueError):
    """Something that the user gave cannot work: one sentence with the remedy, and exit code 2 on the command line."""


class RunError(RuntimeError):
    """A run cannot go on, though another attempt may: one sentence that says why, and exit code 1 on the command line."""


class ConfigError(InputError):
    """The configuration names something that does not exist or asks for something impossible.

    Attributes:
        problems: one sentence each: setting, value, rule and remedy.
        subject: what cannot work, as a message begins.
    """

    def __init__(self, problems: list[str], subject: str = "This configuration") -> None:
        self.problems, self.subject = problems, subject
        super().__init__("\n".join(problems))


class Node:
    """A part of the configuration: a dataclass with a verb.

    Attributes:
        as_typed: settings that hold the value of an environment variable, as they were typed (``${oc.env:NAME}``).
    """

    as_typed: Mapping[str, Any] = {}

    def problems(self) -> Iterator[str]:
        """Yield one sentence for everything that cannot work, beyond the ranges stated at each setting."""
        yield from ()


def setting(
    default: Any = MISSING,
    doc: str = "",
    *,
    above: float | None = None,
    least: float | None = None,
    below: float | None = None,
    most: float | None = None,
    choices: Mapping[str, Any] | None = None,
) -> Any:
    """Declare a field of a schema with its meaning and its range.

    ``choices``: a registry of which the value is a name. It may grow later: a user's module adds an entry of its own.
    ``above`` and ``below`` are exclusive limits, ``least`` and ``most`` inclusive ones; ``None`` values pass all of them.
    Lists, dicts and dataclasses are given as factories (``list``, ``Batch``).
    """
    limits = {"above": above, "least": least, "below": below, "most": most}
    metadata = {"doc": doc, "limits": {key: limit for key, limit in limits.items() if limit is not None}}
    if choices is not None:
        metadata["choices"] = choices
    if callable(default):
        return dataclasses.field(default_factory=default, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def schema(path: str) -> Callable[[type[T]], type[T]]:
    """Make a dataclass the schema of a YAML file that opens with ``defaults: [/schema/<path>@_here_, _self_]``.

    Without a YAML file of that path, see `offer_schemas`, the schema's defaults are the choice.
    """
    group, _, name = f"schema/{path}".rpartition("/")

    def register(cls: type[T]) -> type[T]:
        ConfigStore.instance().store(group=group, name=name, node=_open(OmegaConf.structured(_shadow(cls))))
        if "/" in path:
            _SCHEMAS[path] = cls
        return cls

    return register


_SCHEMAS: dict[str, type] = {}
"""Schemas of a choice by their path: group/name."""


def kind_of(cls: type) -> str | None:
    """The name under which a class is chosen in its group; None for one that is no choice."""
    return next((path.rpartition("/")[2] for path, known in _SCHEMAS.items() if known is cls), None)


def kinds_beside(cls: type) -> dict[str, type]:
    """Every kind of the group that a class is chosen from, by name; nothing of one that is no choice."""
    groups = {path.partition("/")[0] for path, known in _SCHEMAS.items() if known is cls}
    return {
        name: known for path, known in _SCHEMAS.items() for group, _, name in [path.partition("/")] if group in groups
    }


def unresolved(node: DictConfig, name: str) -> Any:
    """A value of a composed tree with its interpolations (``${...}``) as they are written; a part with a schema as it is."""
    inner = node._get_node(name)
    if isinstance(inner, DictConfig) and not inner._is_none() and not inner._is_interpolation():
        return inner if schema_of(inner) is not None else {str(key): unresolved(inner, key) for key in map(str, inner)}
    return OmegaConf.to_container(inner) if OmegaConf.is_list(inner) else inner._value()  # type: ignore[union-attr]


def offer_schemas(folders: Sequence[Path]) -> None:
    """Make every schema a choice of its group whose YAML file none of ``folders`` has: a user's module then needs none."""
    for path, cls in _SCHEMAS.items():
        if not any((folder / f"{path}.yaml").is_file() for folder in folders):
            group, _, name = path.rpartition("/")
            ConfigStore.instance().store(group=group, name=name, node=_open(OmegaConf.structured(_shadow(cls))))


def parse(cfg: DictConfig, later: Sequence[str] = ()) -> Any:
    """Turn a composed configuration into its typed objects.

    ``later``: paths that will be there by the time of the run; what is wrong with them now is forgiven.

    Raises:
        ConfigError: with every unknown key, wrong type, missing value, broken range and broken rule at once.
    """
    problems = _Problems(later)
    root = _build(cfg, "", cfg, problems)
    if problems:
        raise ConfigError(problems)
    return root


class _Problems(list[str]):
    """Problems, without those that name a path in ``later``."""

    def __init__(self, later: Sequence[str]) -> None:
        super().__init__()
        self.later = later

    def extend(self, problems: Iterable[str]) -> None:
        super().extend(problem for problem in problems if not any(path in problem for path in self.later))


def schema_of(node: Any) -> type | None:
    """The dataclass behind a composed node, or None where the node is plain YAML."""
    kind = OmegaConf.get_type(node) if isinstance(node, DictConfig) else None
    return getattr(kind, "shadow_of", None)


def describe_field(field: dataclasses.Field[Any], hint: Any) -> str:
    """What a field may hold in words: one of its choices, else its type."""
    if "choices" not in field.metadata:
        return describe(hint)
    return f"one of {', '.join(field.metadata['choices'])}" + (" or null" if _is_optional(hint) else "")


def describe(hint: Any) -> str:
    """A type in words, for messages and for the help text."""
    options = [h for h in typing.get_args(hint) if h is not type(None)] if _is_optional(hint) else [hint]
    words = {int: "an integer", float: "a number", bool: "true or false", str: "text"}
    named = []
    for option in options:
        if isinstance(option, type) and issubclass(option, enum.Enum):
            named.append("one of " + ", ".join(option.__members__))
        elif typing.get_origin(option) is list:
            named.append(f"a list (each {describe(typing.get_args(option)[0])})")
        elif typing.get_origin(option) is dict:
            named.append("a mapping")
        else:
            named.append(words.get(option, getattr(option, "__name__", str(option))))
    return " or ".join(named + (["null"] if _is_optional(hint) else []))


def _is_optional(hint: Any) -> bool:
    return type(None) in typing.get_args(hint)


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default is not dataclasses.MISSING:
        return field.default.value if isinstance(field.default, enum.Enum) else field.default
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return MISSING


def _shadow(cls: type) -> type:
    """A twin of a schema class whose fields accept anything; nested dataclasses become nested shadows."""
    columns: list[tuple[str, Any, Any]] = []
    for field in dataclasses.fields(cls):
        value = _default(field)
        nested = dataclasses.is_dataclass(value) and not isinstance(value, type)
        factory = _shadow(type(value)) if nested else functools.partial(copy.copy, value)
        columns.append((field.name, Any, dataclasses.field(default_factory=factory)))
    return dataclasses.make_dataclass(cls.__name__, columns, namespace={"shadow_of": cls})


def _open(node: DictConfig) -> DictConfig:
    """Let further keys in, at every depth, so that `parse` can name all of them."""
    OmegaConf.set_struct(node, False)
    for key in node:
        if not OmegaConf.is_missing(node, key) and isinstance(node[key], DictConfig):
            _open(node[key])
    return node


def _build(node: DictConfig, path: str, root: DictConfig, problems: list[str]) -> Any:
    cls = schema_of(node)
    assert cls is not None, f"{path or 'the root'} has no schema"
    hints = typing.get_type_hints(cls)
    known = {field.name: field for field in dataclasses.fields(cls)}
    problems.extend(_unknown(cls, path, str(key), root) for key in node if key not in known)
    before, values, typed = len(problems), {}, dict[str, Any]()
    for name, field in known.items():
        where, read = f"{path}{name}", len(ENVIRONMENT_READS)
        if OmegaConf.is_missing(node, name):
            problems.append(f"{where} is required: {field.metadata.get('doc') or describe(hints[name])}")
            continue
        try:
            value = node[name]
        except OmegaConfBaseException as error:
            problems.append(f"{where} cannot be resolved: {str(error).splitlines()[0]}")
            continue
        if schema_of(value) is not None:
            values[name] = _build(value, f"{where}.", root, problems)
        elif (kind := _kind_of_members(hints[name])) and isinstance(value, DictConfig):
            values[name] = {str(k): _member(value[k], f"{where}.{k!s}", kind, root, problems) for k in value}
        elif dataclasses.is_dataclass(hints[name]):
            problems.append(f"{where}={value!r} is not a group of settings; choose one with {where}=NAME")
        else:
            values[name] = _convert(value, hints[name], where, problems)
            problems.extend(_out_of_range(values[name], field, where))
            problems.extend(_not_a_choice(values[name], field, where))
            typed |= {name: unresolved(node, name)} if len(ENVIRONMENT_READS) > read else {}
    if len(problems) > before:
        return None
    built = cls(**values)
    if typed:
        object.__setattr__(built, "as_typed", typed)  # some parts are frozen
    problems.extend(built.problems())
    return built


def _kind_of_members(hint: Any) -> type | None:
    """The dataclass of the values of a mapping of groups of settings."""
    members = typing.get_args(hint)[1:] if typing.get_origin(hint) is dict else ()
    return members[0] if members and dataclasses.is_dataclass(members[0]) else None  # type: ignore[return-value]


def _member(value: Any, where: str, kind: type, root: DictConfig, problems: list[str]) -> Any:
    if schema_of(value) is None:
        group = kind.__name__.lower()
        problems.append(f"{where} is not a group of settings; choose one with +{group}@{where}=NAME")
        return None
    return _build(value, f"{where}.", root, problems)


def _convert(value: Any, hint: Any, where: str, problems: list[str]) -> Any:
    """Convert with OmegaConf's own rules, one field at a time so that one error does not hide the next."""
    holder = dataclasses.make_dataclass("Holder", [("value", hint)])
    try:
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(holder), {"value": value})).value  # type: ignore[union-attr]
    except OmegaConfBaseException:
        plain = OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
        one = isinstance(plain, str) and typing.get_origin(hint) is list
        remedy = f"; write {where}=[{plain}]" if one else ""
        problems.append(f"{where}={plain!r} is not {describe(hint)}{remedy}")
        return None


def _out_of_range(value: Any, field: dataclasses.Field[Any], where: str) -> Iterator[str]:
    tests: dict[str, tuple[Callable[[Any, Any], bool], str]] = {
        "above": (lambda v, limit: v > limit, "above"),
        "least": (lambda v, limit: v >= limit, "at least"),
        "below": (lambda v, limit: v < limit, "below"),
        "most": (lambda v, limit: v <= limit, "at most"),
    }
    limits = field.metadata.get("limits", {})
    numbers = list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else [value]
    for number in numbers:
        broken = [
            f"{words} {limit}"
            for kind, limit in limits.items()
            for holds, words in [tests[kind]]
            if isinstance(number, int | float) and not holds(number, limit)
        ]
        if broken:
            yield f"{where}={number} must be {' and '.join(broken)}"


def _not_a_choice(value: Any, field: dataclasses.Field[Any], where: str) -> Iterator[str]:
    choices = field.metadata.get("choices")
    if choices is not None and value is not None and value not in choices:
        close = difflib.get_close_matches(str(value), choices, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        yield f"{where}={value} is not one of {', '.join(choices)}{hint}"


def _unknown(cls: type, path: str, key: str, root: DictConfig) -> str:
    names = [field.name for field in dataclasses.fields(cls)]
    close = difflib.get_close_matches(key, names, n=1)
    paths = list(_paths(root))
    same_name = [p for p in paths if p.rpartition(".")[2] == key and p != f"{path}{key}"]
    if choice := next(iter(_choices_with(cls, key)), None):
        hint = f"choose {choice}, which has it"
    elif close:
        hint = f"did you mean '{path}{close[0]}'?"
    elif same_name:
        hint = f"did you mean '{same_name[0]}'?"
    elif elsewhere := difflib.get_close_matches(f"{path}{key}", paths, n=1):
        hint = f"did you mean '{elsewhere[0]}'?"
    else:
        hint = f"it has {', '.join(names)}"
    return f"{cls.__name__} has no setting '{path}{key}'; {hint}"


def _choices_with(cls: type, key: str) -> Iterator[str]:
    """Other choices of a schema's group that have a setting of that name: ``adapter=lora`` for ``rank``."""
    group = next((path.partition("/")[0] for path, known in _SCHEMAS.items() if known is cls), "")
    for name, other in kinds_beside(cls).items():
        if any(field.name == key for field in dataclasses.fields(other)):
            yield f"{group}={name}"


def _paths(node: DictConfig, path: str = "") -> Iterator[str]:
    """Every setting that exists in the composed tree, by its full name."""
    cls = schema_of(node)
    for field in dataclasses.fields(cls) if cls else ():
        yield f"{path}{field.name}"
        if not OmegaConf.is_missing(node, field.name) and isinstance(node.get(field.name), DictConfig):
            yield from _paths(node[field.name], f"{path}{field.name}.")
