"""Conversations in one shape: every way to write a message becomes role, content, reasoning, calls and weight."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from trainer.config import InputError

ROLES = ("system", "developer", "user", "assistant", "tool")
SPEAKERS = {
    **{role: role for role in ROLES},
    "human": "user",
    "gpt": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "function": "tool",
    "observation": "tool",
    "ipython": "tool",
}
"""Names of speakers, and the roles that they are; ``data.roles`` adds to them."""
MASKS = ("weight", "loss", "loss_mask", "train")
"""Keys of a message that say whether it is learnt: 1 or true, 0 or false."""
REASONING = ("reasoning_content", "reasoning", "thinking")
"""Keys of a message that hold what the assistant thought before it answered."""
READ = frozenset(
    {"role", "from", "content", "value", "name", "tool_calls", "tool_call_id", "function_call", *MASKS, *REASONING}
)
"""Keys of a message that are read; a template may read others."""
PLAIN = {"role", "content"}

Message = dict[str, Any]
Row = Mapping[str, Any]


class ChatError(InputError):
    """A row that holds no conversation to learn from; the message says why."""


@dataclass(frozen=True)
class Chat:
    """A conversation.

    ``messages``: each with ``role`` and ``content``; ``weight`` 0 where the assistant's turn is not learnt.
    ``completion``: number of the first message that is not prompt.
    ``tools``: what the template is told of tools, if anything.
    ``ideal``: right answers, if known.
    ``notes``: what reading its row changed, for the log.
    """

    messages: list[Message]
    completion: int
    tools: Any = None
    ideal: list[str] = field(default_factory=list)
    notes: tuple[str, ...] = ()

    @property
    def assistant_turns(self) -> list[int]:
        """Numbers of the messages that the assistant wrote."""
        return [n for n, m in enumerate(self.messages) if m["role"] == "assistant"]

    @property
    def trained_turns(self) -> list[int]:
        """Numbers of the assistant's messages whose weight is not 0."""
        return [n for n in self.assistant_turns if self.messages[n].get("weight", 1)]

    @property
    def chats(self) -> tuple[Chat, ...]:
        """Every conversation that its row holds."""
        return (self,)


def as_messages(value: Any, column: str, role: str) -> list[Message]:
    """Messages of a column that holds a text of ``role``, a message, or messages.

    Raises:
        ChatError: if it is none of them.
    """
    if isinstance(value, str):
        value = {"role": role, "content": value}
    return validate_messages([value] if isinstance(value, Mapping) else value, column)


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


def tools_of(row: Row) -> list[Any] | None:
    """The tools that a row names in ``tools``, or in ``functions`` as OpenAI's older files do; None where there are none.

    Raises:
        ChatError: if they are neither a list of objects nor such a list as JSON text.
    """
    column = "functions" if row.get("tools") is None and row.get("functions") is not None else "tools"
    tools = _from_text(row.get(column), column)
    if not tools:
        return None
    if not isinstance(tools, list):
        raise ChatError(f"{column} is {type_in_words(tools)}, not a list of tools")
    tools = [_from_text(tool, f"tool {number} of {column}") for number, tool in enumerate(tools, start=1)]
    for number, tool in enumerate(tools, start=1):
        if not isinstance(tool, Mapping):
            raise ChatError(f"tool {number} of {column} is {type_in_words(tool)}, not an object")
    return [
        tool if "function" in tool or "name" not in tool else {"type": "function", "function": tool} for tool in tools
    ]


def _from_text(value: Any, where: str) -> Any:
    """The value of a JSON text; what is no text as it is."""
    if not isinstance(value, str) or not value.strip():
        return value or None
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        at = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
        raise ChatError(f"{where} is not JSON ({at})") from None


def _message(value: Any, where: str) -> Message:
    if not isinstance(value, Mapping):
        raise ChatError(f"{where} is {type_in_words(value)}, not an object with role and content")
    if (
        value.keys() == PLAIN
        and value["role"] in ROLES
        and isinstance(value["content"], str)
        and value["content"].strip()
    ):
        return dict(value)
    # Parquet gives every message all keys that any of them has.
    message = {key: v for key, v in value.items() if v is not None}
    speaker = message.pop("from", None)
    role = message.pop("role", speaker)
    content = message.pop("value", "")
    content = message.pop("content", content)
    if role is None:
        raise ChatError(f"{where} has no role")
    if not isinstance(role, str) or role not in SPEAKERS:
        raise ChatError(f"{where} has the role {role!r}; use {', '.join(ROLES)}, or name what it is in data.roles")
    calls = _calls(message, where)
    if role == "function_call":
        calls += _called(content, where)
        content = ""
    message |= _text_and_reasoning(content, where)
    if calls:
        message["tool_calls"] = calls
    message["role"] = SPEAKERS[role]
    _set_weight(message, where)
    says = calls or any(message.get(key) for key in REASONING)
    if message["role"] in ("user", "assistant") and not message["content"].strip() and not says:
        raise ChatError(f"the content of {where} is empty")
    return message


def _text_and_reasoning(content: Any, where: str) -> dict[str, str]:
    """Content as text; parts that are reasoning stand under a key of their own."""
    if isinstance(content, str):
        return {"content": content}
    if not isinstance(content, list):
        raise ChatError(f"the content of {where} is {type_in_words(content)}, not text")
    parts = [_part(part, where) for part in content]
    texts = {kind: "".join(text for k, text in parts if k == kind) for kind in ("content", REASONING[0])}
    return {kind: text for kind, text in texts.items() if text or kind == "content"}


def _part(part: Any, where: str) -> tuple[str, str]:
    if isinstance(part, str):
        return "content", part
    if isinstance(part, Mapping):
        kind = part.get("type", "text")
        text = part.get("text") if part.get("text") is not None else part.get(str(kind))
        if isinstance(text, str) and kind in ("text", "reasoning", "thinking"):
            return ("content" if kind == "text" else REASONING[0]), text
    raise ChatError(f"{where} has a part that is not text; only text is learnt")


def _set_weight(message: Message, where: str) -> None:
    """One key for whether a turn is learnt: ``weight`` 0, or none."""
    given = {key: message.pop(key) for key in MASKS if key in message}
    for key, value in given.items():
        if isinstance(value, str | list | Mapping) or value not in (0, 1):
            raise ChatError(f"the {key} of {where} is {value!r}; use 0 or 1 (false or true)")
        if value and message["role"] != "assistant":
            raise ChatError(
                f"{where} is the {message['role']}'s and has {key} {value!r}: only the assistant's turns are learnt"
            )
    if len({bool(value) for value in given.values()}) > 1:
        raise ChatError(f"{' and '.join(given)} of {where} contradict each other; keep one of them")
    if not all(given.values()):
        message["weight"] = 0


def _calls(message: Message, where: str) -> list[Any]:
    """Take a message's calls out of it: a list, one call, or JSON text of either; ``function_call`` is OpenAI's older key."""
    given = [message.pop(key) for key in ("tool_calls", "function_call") if key in message]
    return [call for value in given for call in _called(value, where)]


def _called(value: Any, where: str) -> list[Any]:
    calls = _from_text(value, f"a call in {where}") or []
    calls = [calls] if isinstance(calls, Mapping) else calls
    if not isinstance(calls, list):
        raise ChatError(f"the calls of {where} are {type_in_words(calls)}, not a list")
    return [_call(_from_text(call, f"a call in {where}"), where) for call in calls]


def _call(call: Any, where: str) -> Any:
    """A call as ``{"type": "function", "function": {"name", "arguments"}}``; arguments that are JSON text become values."""
    if not isinstance(call, Mapping):
        raise ChatError(f"a call in {where} is {type_in_words(call)}, not an object with a name and arguments")
    function = call.get("function", call)
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str) or not function["name"]:
        raise ChatError(f"a call in {where} has no name")
    function = {key: v for key, v in function.items() if v is not None}
    if "arguments" not in function and "parameters" in function:
        function["arguments"] = function.pop("parameters")
    if isinstance(function.get("arguments"), str):
        # What a model wrote as arguments may be no JSON: then it stays the text that it is.
        with contextlib.suppress(ValueError, RecursionError):
            function["arguments"] = json.loads(function["arguments"])
    if "function" not in call:
        return {"type": "function", "function": function}
    return {**{key: v for key, v in call.items() if v is not None}, "function": function}


def rename_roles(messages: Any, roles: Mapping[str, str]) -> Any:
    """Messages, or a message, with their speakers under our names; anything else as it is."""
    if isinstance(messages, list):
        return [rename_roles(message, roles) for message in messages]
    if isinstance(messages, Mapping):
        named = {key: roles[messages[key]] for key in ("role", "from") if _is_key(messages.get(key), roles)}
        return {**messages, **named}
    return messages


def _is_key(value: Any, mapping: Mapping[str, str]) -> bool:
    return isinstance(value, str) and value in mapping
