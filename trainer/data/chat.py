"""Conversations out of rows: the forms that data sets write them in, recognised from their columns."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

ROLES = ("system", "user", "assistant", "tool")
SHAREGPT = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "model": "assistant",
    "system": "system", "tool": "tool", "function": "tool", "observation": "tool",
}  # fmt: skip
"""Names of speakers in ShareGPT's form, and the roles that they are."""

Message = dict[str, Any]
Row = Mapping[str, Any]


class ChatError(ValueError):
    """A row that holds no conversation to learn from; the message says why."""


@dataclass(frozen=True)
class Chat:
    """A conversation. ``completion``: number of the first message that is not prompt. ``ideal``: right answers, if known."""

    messages: list[Message]
    completion: int
    tools: Any = None
    ideal: list[str] = field(default_factory=list)

    @property
    def assistant_turns(self) -> list[int]:
        """Numbers of the messages that the assistant wrote."""
        return [n for n, m in enumerate(self.messages) if m["role"] == "assistant"]


@dataclass(frozen=True)
class Form:
    """A way to write conversations: the columns that it is known by, and how a row of it is read."""

    name: str
    columns: tuple[str, ...]
    read: Callable[[Row], Chat]


def form_of(row: Row) -> Form:
    """The form that a row is written in.

    Raises:
        ChatError: showing the row and the accepted forms.
    """
    for form in FORMS:
        if all(row.get(column) is not None for column in form.columns):
            return form
    shown = json.dumps(dict(row), ensure_ascii=False, default=str)
    shown = shown if len(shown) < 200 else f"{shown[:200]} ..."
    accepted = "; ".join(f"{f.name} ({', '.join(f.columns)})" for f in FORMS)
    raise ChatError(
        f"no conversation is recognised in {shown}; accepted are {accepted}, or name the columns in data.columns"
    )


def _messages(row: Row) -> Chat:
    messages = checked(row["messages"], "messages")
    ideal = _ideal(row)
    if messages[-1]["role"] != "assistant" and ideal:
        messages.append({"role": "assistant", "content": ideal[0]})
    return _chat(messages, _last_turn(messages), row, ideal)


def _prompt_completion(row: Row) -> Chat:
    prompt = side(row["prompt"], "prompt", "user")
    completion = side(row["completion"], "completion", "assistant")
    system = _text(row, "system")
    before = [{"role": "system", "content": system}] if system else []
    return _chat([*before, *prompt, *completion], len(before) + len(prompt), row, _ideal(row))


def _sharegpt(row: Row) -> Chat:
    turns = row["conversations"]
    if not isinstance(turns, list) or not turns:
        raise ChatError(f"conversations is {kind_of(turns)}, not a list of turns")
    messages = []
    for number, turn in enumerate(turns, start=1):
        if not isinstance(turn, Mapping) or "from" not in turn or "value" not in turn:
            raise ChatError(f"turn {number} of conversations has no 'from' and 'value'")
        if turn["from"] not in SHAREGPT:
            raise ChatError(f"turn {number} of conversations is from {turn['from']!r}; use {', '.join(SHAREGPT)}")
        messages.append({"role": SHAREGPT[turn["from"]], "content": turn["value"]})
    system = _text(row, "system")
    before = [{"role": "system", "content": system}] if system else []
    messages = checked(before + messages, "conversations")
    return _chat(messages, _last_turn(messages), row, _ideal(row))


def _alpaca(row: Row) -> Chat:
    instruction, given, output = (_text(row, key) for key in ("instruction", "input", "output"))
    if not instruction:
        raise ChatError("the instruction is empty")
    asked = f"{instruction}\n\n{given}" if given else instruction
    messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": output}]
    return _chat(messages, 1, row, _ideal(row))


def _prompt_ideal(row: Row) -> Chat:
    ideal = _ideal(row)
    if not ideal:
        raise ChatError("ideal is an empty list")
    return _prompt_completion({**row, "completion": ideal[0]})


FORMS = (
    Form("messages", ("messages",), _messages),
    Form("prompt and completion", ("prompt", "completion"), _prompt_completion),
    Form("ShareGPT", ("conversations",), _sharegpt),
    Form("Alpaca", ("instruction", "output"), _alpaca),
    Form("prompt and ideal", ("prompt", "ideal"), _prompt_ideal),
)
KNOWN = (
    "messages",
    "prompt",
    "completion",
    "conversations",
    "instruction",
    "input",
    "output",
    "system",
    "tools",
    "ideal",
)
"""Names that ``data.columns`` can give to other columns."""


def _chat(messages: list[Message], completion: int, row: Row, ideal: list[str]) -> Chat:
    if not any(m["role"] == "assistant" for m in messages):
        raise ChatError("no turn is the assistant's, so there is nothing to learn")
    tools = row.get("tools")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except json.JSONDecodeError as error:
            raise ChatError(f"tools is not JSON ({error.msg} at column {error.colno})") from None
    return Chat(messages, completion, tools or None, ideal)


def _last_turn(messages: list[Message]) -> int:
    """The first message behind the last one that is the user's or the system's."""
    return 1 + max((n for n, m in enumerate(messages) if m["role"] in ("user", "system")), default=-1)


def side(value: Any, column: str, role: str) -> list[Message]:
    """Messages of a column that holds a text of ``role``, or messages.

    Raises:
        ChatError: if it is neither.
    """
    if isinstance(value, str):
        return checked([{"role": role, "content": value}], column)
    return checked(value, column)


def checked(value: Any, column: str) -> list[Message]:
    """Messages in one shape: known roles, contents that are text.

    Raises:
        ChatError: naming the first that is wrong.
    """
    if not isinstance(value, list) or not value:
        raise ChatError(f"{column} is {kind_of(value)}, not a list of messages")
    return [_message(message, f"message {number} of {column}") for number, message in enumerate(value, start=1)]


def _message(value: Any, where: str) -> Message:
    if not isinstance(value, Mapping):
        raise ChatError(f"{where} is {kind_of(value)}, not an object with role and content")
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
        raise ChatError(f"the content of {where} is {kind_of(content)}, not text")
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


def _text(row: Row, key: str) -> str:
    value = row.get(key)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise ChatError(f"{key} is {kind_of(value)}, not text")
    return value


def _ideal(row: Row) -> list[str]:
    value = row.get("ideal")
    values = [] if value is None else [value] if not isinstance(value, list) else value
    if any(not isinstance(v, str) for v in values):
        raise ChatError(f"ideal is {kind_of(value)}, not text or a list of texts")
    return values


def kind_of(value: Any) -> str:
    """What a value is, in words."""
    return {"NoneType": "nothing", "str": "text", "list": "an empty list" if not value else "a list"}.get(
        type(value).__name__, f"of type {type(value).__name__}"
    )
