"""Preferences out of rows: two answers to one prompt, of which one was chosen; or one answer that was liked or not."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from trainer.data.chat import Chat, ChatError, Message, checked, kind_of, side

Row = Mapping[str, Any]
T = TypeVar("T")
KNOWN = ("prompt", "chosen", "rejected", "system", "tools", "margin", "score_chosen", "score_rejected")
"""Names that ``data.columns`` can give to other columns."""
KNOWN_LABELLED = ("prompt", "completion", "label", "system", "tools")


@dataclass(frozen=True)
class Preference:
    """Two conversations that begin alike. ``margin``: by how much the chosen one is better, 0 where that is not known."""

    chosen: Chat
    rejected: Chat
    margin: float


@dataclass(frozen=True)
class Labelled:
    """A conversation whose completion is desirable, or is not."""

    chat: Chat
    desirable: bool


@dataclass(frozen=True)
class Form(Generic[T]):
    """A way to write preferences."""

    name: str
    columns: tuple[str, ...]
    read: Callable[[Row], T]


def form_of(row: Row, forms: Sequence[Form[T]]) -> Form[T]:
    """The form that a row is written in.

    Raises:
        ChatError: showing the row and the accepted forms.
    """
    for form in forms:
        if all(row.get(column) is not None for column in form.columns):
            return form
    shown = json.dumps(dict(row), ensure_ascii=False, default=str)
    shown = shown if len(shown) < 200 else f"{shown[:200]} ..."
    accepted = "; ".join(f"{f.name} ({', '.join(f.columns)})" for f in forms)
    raise ChatError(
        f"no preference is recognised in {shown}; accepted are {accepted}, or name the columns in data.columns"
    )


def _prompt(row: Row) -> list[Message]:
    system = row.get("system")
    before: list[Message] = [{"role": "system", "content": system}] if system else []
    return before + side(row["prompt"], "prompt", "user")


def _labelled(row: Row) -> Labelled:
    before, after = _prompt(row), side(row["completion"], "completion", "assistant")
    _ends_in_an_answer("completion", after)
    label = row["label"]
    if not isinstance(label, bool | int | float) or label not in (0, 1):
        raise ChatError(f"label is {label!r}; use true or false (1 or 0)")
    return Labelled(Chat([*before, *after], len(before), row.get("tools")), bool(label))


def _with_prompt(row: Row) -> Preference:
    before = _prompt(row)
    sides = [side(row[name], name, "assistant") for name in ("chosen", "rejected")]
    return _preference(row, before, sides)


def _shared_beginning(row: Row) -> Preference:
    first, second = (checked(row[name], name) for name in ("chosen", "rejected"))
    shared = 0
    while shared < min(len(first), len(second)) - 1 and first[shared] == second[shared]:
        shared += 1
    if not shared:
        raise ChatError("chosen and rejected begin differently, so they answer no common prompt")
    return _preference(row, first[:shared], [first[shared:], second[shared:]])


def _preference(row: Row, before: list[Message], sides: list[list[Message]]) -> Preference:
    for name, messages in zip(("chosen", "rejected"), sides, strict=True):
        _ends_in_an_answer(name, messages)
    chosen, rejected = (Chat([*before, *messages], len(before), row.get("tools")) for messages in sides)
    return Preference(chosen, rejected, _margin(row))


def _ends_in_an_answer(name: str, messages: list[Message]) -> None:
    if messages[-1]["role"] != "assistant":
        raise ChatError(f"the last message of {name} is the {messages[-1]['role']}'s, not the assistant's")


def _margin(row: Row) -> float:
    names = ["margin"] if row.get("margin") is not None else ["score_chosen", "score_rejected"]
    values = [row.get(name) for name in names]
    if any(value is None for value in values):
        return 0.0
    if not all(isinstance(value, int | float) for value in values):
        raise ChatError(f"{' and '.join(names)} are {kind_of(values[0])}, not numbers")
    return float(values[0] if len(values) == 1 else values[0] - values[1])  # type: ignore[operator, arg-type]


FORMS = (
    Form("prompt, chosen and rejected", ("prompt", "chosen", "rejected"), _with_prompt),
    Form("chosen and rejected with a shared beginning", ("chosen", "rejected"), _shared_beginning),
)
LABELLED = (Form("prompt, completion and label", ("prompt", "completion", "label"), _labelled),)
