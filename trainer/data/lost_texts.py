"""What a conversation holds and its rendering does not: text never vanishes unseen."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from trainer.data.answer_spans import StandIns, written_forms

Message = Mapping[str, Any]
Span = tuple[int, int]


def lost_texts(
    messages: Sequence[Message],
    tools: Any,
    text: str,
    spans: Mapping[int, Sequence[Span]],
    unwritten: frozenset[str] = frozenset(),
) -> list[str]:
    """A phrase for every text that is lost.

    ``spans``: where the turns stand that are to be learnt; of other turns of the assistant nothing is asked.
    ``unwritten``: kinds of pieces that the template never writes; it is known for that.
    """
    lost = [f"tool {name!r}" for name in _tool_names(tools) if name not in text]
    standing = StandIns(messages)
    for number, message in enumerate(messages):
        if message["role"] == "assistant" and number not in spans:
            continue
        turn = "".join(text[first:last] for first, last in spans.get(number, ()))
        within = turn if message["role"] == "assistant" else text
        pieces = [p for p in standing.pieces if p.message == number and p.kind != "call"]
        for piece in pieces:
            if piece.kind not in unwritten and not _in(piece.text, within):
                lost.append(f"the {piece.kind} of message {number + 1} ({message['role']})")
        calls = [call for call in message.get("tool_calls") or [] if isinstance(call, Mapping)]
        lost += [f"a tool call's {what} in message {number + 1}" for call in calls for what in _lost_of(call, within)]
    return lost


def leaves(value: Any) -> Iterator[Any]:
    """What lists and objects hold at last: every value that is neither, and every key."""
    if isinstance(value, Mapping):
        yield from value
        value = list(value.values())
    if isinstance(value, list | tuple):
        for inside in value:
            yield from leaves(inside)
    else:
        yield value


def _tool_names(tools: Any) -> Iterator[str]:
    for tool in tools or []:
        function = tool.get("function", tool) if isinstance(tool, Mapping) else {}
        if isinstance(function, Mapping) and isinstance(function.get("name"), str):
            yield function["name"]


def _lost_of(call: Message, text: str) -> Iterator[str]:
    function = call.get("function", call)
    if not isinstance(function, Mapping):
        return
    if not _in(str(function.get("name", "")), text):
        yield "name"
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        with contextlib.suppress(ValueError):
            arguments = json.loads(arguments)
    values = (leaf if isinstance(leaf, str) else json.dumps(leaf) for leaf in leaves(arguments) if leaf is not None)
    if not all(_in(value, text) for value in values):
        yield "arguments"


def _in(core: str, text: str) -> bool:
    forms = [*written_forms(core.strip()), *([core.title()] if core in ("true", "false") else [])]
    return any(form in text for form in forms)
