"""The ways in which data sets write a row, read by one path for every kind of data."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Generic, Protocol, TypeVar

from trainer.data.messages import (
    READ,
    Chat,
    ChatError,
    Message,
    Row,
    as_messages,
    rename_roles,
    text_of,
    tools_of,
    type_in_words,
    validate_messages,
)
from trainer.data.sources import DataSource

REPEATED = "the prompt stands in the answer too, and is taken off there"
ASKING = ("system", "developer", "user")
"""Roles of the messages that an answer follows."""


class HasChats(Protocol):
    """What a row means: one conversation, or several that belong together."""

    @property
    def chats(self) -> Sequence[Chat]:
        """Its conversations."""
        ...


T = TypeVar("T", bound=HasChats)


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
    optional: tuple[str, ...] = ("system", "tools", "functions")


def columns_of(formats: Sequence[RowFormat[Any]]) -> tuple[str, ...]:
    """Every column that the formats read: what ``data.columns`` can give to columns of other names."""
    names = [name for form in formats for name in form.columns]
    return tuple(dict.fromkeys([*names, *(name for form in formats for name in form.optional)]))


def read_rows(
    source: DataSource, formats: Sequence[RowFormat[T]], what: str = "conversation", *, mixed: bool = False
) -> Iterator[tuple[str, T, Row]]:
    """The place (file and line) of every row of ``source``, what it means, and the row.

    ``what``: the word for a row's content in messages.
    ``mixed``: each row may be of another format; else the first one decides for all of them.
    """
    form: RowFormat[T] | None = None
    for where, row in source.rows():
        try:
            given = (
                {column: rename_roles(value, source.roles) for column, value in row.items()} if source.roles else row
            )
            form = _format_of(given, formats, what) if mixed or form is None else form
            source.form = form.name
            if missing := [column for column in form.columns if given.get(column) is None]:
                raise ChatError(f"{', '.join(missing)} is missing, which earlier rows have")
            meaning = form.read(given)
        except ChatError as error:
            source.reject(where, str(error))
            continue
        source.notes.update({note for chat in meaning.chats for note in _notes(chat)})
        yield where, meaning, given


def _notes(chat: Chat) -> Iterator[str]:
    yield from chat.notes
    for key in {key for message in chat.messages for key in message} - READ:
        yield f"the key '{key}' of messages is read only by a template that names it"


def _format_of(row: Row, formats: Sequence[RowFormat[T]], what: str) -> RowFormat[T]:
    for form in formats:
        if all(row.get(column) is not None for column in form.columns):
            return form
    text = json.dumps(dict(row), ensure_ascii=False, default=str)
    text = text if len(text) < 200 else f"{text[:200]} ..."
    accepted = "; ".join(f"{form.name} ({', '.join(form.columns)})" for form in formats)
    raise ChatError(f"no {what} is recognised in {text}; accepted are {accepted}, or name the columns in data.columns")


def _prompt(row: Row) -> Chat:
    messages = _system(row) + as_messages(row["prompt"], "prompt", "user")
    return Chat(messages, len(messages), tools_of(row), ideal_answers(row))


def _turns(column: str, row: Row) -> Chat:
    system, messages = _system(row), validate_messages(row[column], column)
    if system and messages[0]["role"] == "system" and not _same(system[0], messages[0]):
        raise ChatError(
            f"the column system and the first message of {column} are two system messages; keep one of them"
        )
    messages = [*([] if messages[0]["role"] == "system" else system), *messages]
    after_last_question = 1 + max((n for n, m in enumerate(messages) if m["role"] in ASKING), default=-1)
    return Chat(messages, after_last_question, tools_of(row), ideal_answers(row))


def _instruction(row: Row) -> Chat:
    instruction, given = text_of(row, "instruction"), text_of(row, "input")
    if not instruction.strip():
        raise ChatError("the instruction is empty")
    history = row.get("history") or []
    if not isinstance(history, list) or any(not isinstance(pair, list) or len(pair) != 2 for pair in history):
        raise ChatError("history is not a list of pairs, each a question and its answer")
    texts = [text for pair in history for text in pair]
    turns = [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]
    messages = _system(row) + (validate_messages(turns, "history") if turns else [])
    messages += as_messages(f"{instruction}\n\n{given}" if given else instruction, "instruction", "user")
    return Chat(messages, len(messages), tools_of(row), ideal_answers(row))


def _system(row: Row) -> list[Message]:
    """The message of the column ``system``, or none."""
    system = text_of(row, "system")
    return [{"role": "system", "content": system}] if system else []


def ideal_answers(row: Row) -> list[str]:
    """The right answers of the column ``ideal``: a text or a number, a list of them, or none.

    Raises:
        ChatError: if it is something else.
    """
    value = row.get("ideal")
    values = [] if value is None else value if isinstance(value, list) else [value]
    if any(not isinstance(v, str | int | float) for v in values):
        raise ChatError(f"ideal is {type_in_words(value)}, not text or a list of texts")
    return [str(v) for v in values]


def answered(question: Chat, value: Any, column: str) -> Chat:
    """The conversation of a question and the answer that a column holds: a text, a message, or messages.

    Many data sets repeat the prompt in the answer; it is taken off there, and noted.

    Raises:
        ChatError: if the answer does not end with the assistant's turn, or begins with another question.
    """
    answer = as_messages(value, column, "assistant")
    prompt, rest = _split(question.messages, answer)
    if not rest or rest[-1]["role"] != "assistant":
        last = (rest or answer)[-1]["role"]
        raise ChatError(f"the last message of {column} is the {last}'s, not the assistant's")
    if rest[0]["role"] in ASKING and prompt[-1]["role"] == "user":
        raise ChatError(f"{column} begins with the {rest[0]['role']}'s message, which is not in the prompt")
    notes = question.notes if rest is answer else (*question.notes, REPEATED)
    return replace(question, messages=[*prompt, *rest], completion=len(prompt), notes=notes)


def _split(prompt: list[Message], answer: list[Message]) -> tuple[list[Message], list[Message]]:
    """Prompt and answer, where the answer may begin with all of the prompt; one of them may lack the system message."""
    for lead, skip in ((0, 0), (_leading_system(prompt), 0), (0, _leading_system(answer))):
        end = skip + len(prompt) - lead
        if len(answer) > end > skip and all(map(_same, prompt[lead:], answer[skip:end])):
            return [*answer[:skip], *prompt], answer[end:]
    return prompt, answer


def _leading_system(messages: Sequence[Message]) -> int:
    return next((n for n, m in enumerate(messages) if m["role"] not in ("system", "developer")), 0)


def _same(first: Message, second: Message) -> bool:
    return bool(first["role"] == second["role"] and first["content"].strip() == second["content"].strip())


def _conversation(column: str, row: Row) -> Chat:
    chat = _turns(column, row)
    if chat.messages[-1]["role"] != "assistant" and chat.ideal:
        chat = answered(replace(chat, completion=len(chat.messages)), chat.ideal[0], "ideal")
    if not chat.assistant_turns:
        raise ChatError("no turn is the assistant's, so there is nothing to learn")
    return chat


def _prompt_ideal(row: Row) -> Chat:
    question = _prompt(row)
    if not question.ideal:
        raise ChatError("ideal is an empty list")
    return answered(question, question.ideal[0], "ideal")


QUESTION_FORMATS: list[RowFormat[Chat]] = [
    RowFormat("prompt", ("prompt",), _prompt, ("system", "tools", "functions", "ideal")),
    RowFormat("messages", ("messages",), partial(_turns, "messages"), ("system", "tools", "functions", "ideal")),
    RowFormat(
        "ShareGPT", ("conversations",), partial(_turns, "conversations"), ("system", "tools", "functions", "ideal")
    ),
    RowFormat("Alpaca", ("instruction",), _instruction, ("input", "history", "system", "tools", "functions", "ideal")),
]
"""How what is asked is written, in rows whose answers stand in columns of their own, or have none."""

CHAT_FORMATS: list[RowFormat[Chat]] = [
    RowFormat("messages", ("messages",), partial(_conversation, "messages"), ("system", "tools", "functions", "ideal")),
    RowFormat(
        "prompt and completion",
        ("prompt", "completion"),
        lambda row: answered(_prompt(row), row["completion"], "completion"),
    ),
    RowFormat("ShareGPT", ("conversations",), partial(_conversation, "conversations")),
    RowFormat(
        "Alpaca",
        ("instruction", "output"),
        lambda row: answered(_instruction(row), row["output"], "output"),
        ("input", "history", "system", "tools", "functions"),
    ),
    RowFormat("prompt and ideal", ("prompt", "ideal"), _prompt_ideal),
]
"""How rows of conversations are written; the first whose columns a row has reads it. A user's module may add its own."""
