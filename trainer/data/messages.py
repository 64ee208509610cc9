"""Conversations in one shape, and a `RowFormat` for every way in which data sets write them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from trainer.config import InputError
from trainer.data.sources import DataSource

ROLES = ("system", "user", "assistant", "tool")

T = TypeVar("T")
Message = dict[str, Any]
Row = Mapping[str, Any]


class ChatError(InputError):
    """A row that holds no conversation to learn from; the message says why."""


@dataclass(frozen=True)
class Chat:
    """A conversation.

    ``messages``: each with ``role`` and ``content``.
    ``completion``: number of the first message that is not prompt.
    ``tools``: what the template is told of tools, if anything.
    ``ideal``: right answers, if known.
    """

    messages: list[Message]
    completion: int
    tools: Any = None
    ideal: list[str] = field(default_factory=list)

    @property
    def assistant_turns(self) -> list[int]:
        """Numbers of the messages that the assistant wrote."""
        return [n for n, m in enumerate(self.messages) if m["role"] == "assistant"]


@dataclass(frozen=True)
class RowFormat(Generic[T]):
    """A way to write rows.

    ``name``: for the log and for messages.
    ``columns``: a row that has all of these is read by this format.
    ``read``: a row to what it means; raises `ChatError`.
    ``optional``: further columns that it reads.
    """

    name: str
    columns: tuple[str, ...]
    read: Callable[[Row], T]
    optional: tuple[str, ...] = ("system", "tools")


def columns_of(formats: Sequence[RowFormat[Any]]) -> tuple[str, ...]:
    """Every column that the formats read: what ``data.columns`` can give to columns of other names."""
    names = [name for form in formats for name in form.columns]
    return tuple(dict.fromkeys([*names, *(name for form in formats for name in form.optional)]))


def read_rows(
    source: DataSource, columns: Mapping[str, str], formats: Sequence[RowFormat[T]], what: str = "conversation"
) -> Iterator[tuple[str, T]]:
    """Every row of ``source`` with its place (file and line); the first one decides about the format.

    ``columns``: the row's name of a column, by ours. ``what``: the word for a row's content in messages.
    """
    form: RowFormat[T] | None = None
    for where, row in source.rows():
        try:
            renamed = rename_columns(row, columns)
            form = form or _format_of(renamed, formats, what)
            source.form = form.name
            if missing := [column for column in form.columns if renamed.get(column) is None]:
                raise ChatError(f"{', '.join(missing)} is missing, which earlier rows have")
            yield where, form.read(renamed)
        except ChatError as error:
            source.reject(where, str(error))


def rename_columns(row: Row, columns: Mapping[str, str]) -> dict[str, Any]:
    """The row, with columns under our names as well."""
    return {**row, **{ours: row[theirs] for ours, theirs in columns.items() if theirs in row}}


def _format_of(row: Row, formats: Sequence[RowFormat[T]], what: str) -> RowFormat[T]:
    for form in formats:
        if all(row.get(column) is not None for column in form.columns):
            return form
    text = json.dumps(dict(row), ensure_ascii=False, default=str)
    text = text if len(text) < 200 else f"{text[:200]} ..."
    accepted = "; ".join(f"{form.name} ({', '.join(form.columns)})" for form in formats)
    raise ChatError(f"no {what} is recognised in {text}; accepted are {accepted}, or name the columns in data.columns")


def prompt_messages(row: Row) -> list[Message]:
    """The messages of a row's ``prompt``, after its ``system`` message if there is one.

    Raises:
        ChatError: if they are no messages.
    """
    return system_messages(row) + as_messages(row["prompt"], "prompt", "user")


def system_messages(row: Row) -> list[Message]:
    """The message of the column ``system``, or none."""
    system = text_of(row, "system")
    return [{"role": "system", "content": system}] if system else []


def as_messages(value: Any, column: str, role: str) -> list[Message]:
    """Messages of a column that holds a text of ``role``, or messages.

    Raises:
        ChatError: if it is neither.
    """
    return validate_messages([{"role": role, "content": value}] if isinstance(value, str) else value, column)


def validate_messages(value: Any, column: str) -> list[Message]:
    """Messages in one shape: known roles, contents that are text.

    Raises:
        ChatError: naming the first that is wrong.
    """
    if not isinstance(value, list) or not value:
        raise ChatError(f"{column} is {type_in_words(value)}, not a list of messages")
    return [_message(message, f"message {number} of {column}") for number, message in enumerate(value, start=1)]


def text_of(row: Row, column: str) -> str:
    """The text of a column, empty where there is none.

    Raises:
        ChatError: if it is something else.
    """
    value = row.get(column)
    if value is not None and not isinstance(value, str):
        raise ChatError(f"{column} is {type_in_words(value)}, not text")
    return value or ""


def type_in_words(value: Any) -> str:
    """What a value is, in words."""
    words = {"NoneType": "nothing", "str": "text", "list": "a list" if value else "an empty list"}
    return words.get(type(value).__name__, f"of type {type(value).__name__}")


def _message(value: Any, where: str) -> Message:
    if not isinstance(value, Mapping):
        raise ChatError(f"{where} is {type_in_words(value)}, not an object with role and content")
    # Parquet gives every message all keys that any of them has.
    message = {key: v for key, v in value.items() if v is not None}
    role = message.get("role")
    if role is None:
        raise ChatError(f"{where} has no role")
    if role not in ROLES:
        raise ChatError(f"{where} has the role {role!r}; use {', '.join(ROLES)}")
    content = message.get("content", "")
    if isinstance(content, list):
        content = "".join(_part(part, where) for part in content)
    if not isinstance(content, str):
        raise ChatError(f"the content of {where} is {type_in_words(content)}, not text")
    if not content and role in ("user", "assistant") and not message.get("tool_calls"):
        raise ChatError(f"the content of {where} is empty")
    calls = [_call(call) for call in message.get("tool_calls") or []]
    return {**message, "content": content, **({"tool_calls": calls} if calls else {})}


def _part(part: Any, where: str) -> str:
    if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
        raise ChatError(f"{where} has a part that is not text; only text is learnt")
    return str(part["text"])


def _call(call: Any) -> Any:
    """Arguments that came as JSON text are given to the template as values."""
    function = call.get("function") if isinstance(call, Mapping) else None
    if isinstance(function, Mapping) and isinstance(function.get("arguments"), str):
        try:
            return {**call, "function": {**function, "arguments": json.loads(function["arguments"])}}
        except json.JSONDecodeError:
            return call
    return call
