"""Where each message stands in a rendered conversation: it is rendered again with every text replaced, and compared.

A text is replaced by characters that no text holds, and its white space stays, so a template takes the same branches. What
lies between two of these is the template's own. No prefix property, no generation prompt and no marks are needed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Message = Mapping[str, Any]
Render = Callable[[Sequence[Message]], str]

STANDIN = re.compile("(\ufdd3[\ufde0-\ufdef]{4})")
"""What stands for a text: a noncharacter and four that are digits."""
NONCHARACTERS = re.compile("[\ufdd0-\ufdef]")
"""What no text may hold (Unicode 23.7): they mark places while a conversation is rendered."""
MOST = 16**4
THINK = re.compile(r"(\s*<think>)?(.*)(</think>)", re.DOTALL)


@dataclass(frozen=True)
class Piece:
    """A text of a message, without the white space around it.

    ``message``: its number in the conversation.
    ``kind``: ``content``, ``reasoning``, ``thinking`` (reasoning within the content) or ``call``.
    """

    message: int
    kind: str
    text: str


@dataclass
class Passage:
    """Where a message stands in a rendering.

    ``start``, ``end``: from its first piece to its last.
    ``before``, ``after``: what the template writes around it, up to the neighbouring messages' pieces.
    ``pieces``: what of it was written, in order.
    """

    start: int
    end: int
    before: str
    after: str
    pieces: list[Piece] = field(default_factory=list)


def stand_in(number: int) -> str:
    """What stands for a text, by its number."""
    return "\ufdd3" + "".join(chr(0xFDE0 + int(digit, 16)) for digit in f"{number:04x}")


class StandIns:
    """Messages with every text (or those of some message) replaced by what stands for it."""

    def __init__(self, messages: Sequence[Message], only: int | None = None) -> None:
        self.pieces: list[Piece] = []
        self.messages = [m if only not in (None, n) else self._replaced(n, m) for n, m in enumerate(messages)]

    def piece(self, standing: str) -> Piece:
        """The text that is replaced."""
        return self.pieces[int("".join(f"{ord(digit) - 0xFDE0:x}" for digit in standing[1:]), 16)]

    def _new(self, message: int, kind: str, text: str) -> str:
        core = text.strip()
        if not core or len(self.pieces) == MOST:
            return text
        self.pieces.append(Piece(message, kind, core))
        start = text.index(core)
        return text[:start] + stand_in(len(self.pieces) - 1) + text[start + len(core) :]

    def _replaced(self, number: int, message: Message) -> Message:
        count = len(self.pieces)
        changed = dict(message)
        if reasoning := message.get("reasoning_content"):
            changed |= dict.fromkeys(("reasoning_content", "thinking"), self._new(number, "reasoning", reasoning))
        changed["content"] = self._content(number, message)
        if message.get("tool_calls"):
            changed["tool_calls"] = [self._call(number, call, "arguments") for call in message["tool_calls"]]
            if len(self.pieces) == count:
                changed["tool_calls"] = [self._call(number, call, "name") for call in message["tool_calls"]]
        return changed

    def _content(self, number: int, message: Message) -> Any:
        content = message.get("content")
        if isinstance(content, list):
            return [{**p, "text": self._new(number, "content", p["text"])} if "text" in p else p for p in content]
        if not isinstance(content, str):
            return content
        thinking = THINK.match(content) if message["role"] == "assistant" else None
        if thinking is None:
            return self._new(number, "content", content)
        inside = self._new(number, "thinking", thinking[2])
        return f"{thinking[1] or ''}{inside}{thinking[3]}{self._new(number, 'content', content[thinking.end() :])}"

    def _call(self, number: int, call: Any, what: str) -> Any:
        function = call.get("function") if isinstance(call, Mapping) else None
        if isinstance(function, Mapping) and function.get(what):
            return {**call, "function": {**function, what: self._value(number, function[what])}}
        return call

    def _value(self, number: int, value: Any) -> Any:
        if isinstance(value, str):
            return self._new(number, "call", value)
        if isinstance(value, Mapping):
            return {k: self._value(number, v) for k, v in value.items()}
        return [self._value(number, v) for v in value] if isinstance(value, list) else value


def places(text: str, messages: Sequence[Message], render: Render) -> dict[int, list[Passage]] | None:
    """Where each message of ``text`` stands, from one more rendering; None where its texts decide what else is written.

    A message of which the template writes nothing has no place; one whose texts it writes apart has several.
    """
    standing = StandIns(messages)
    parts = STANDIN.split(render(standing.messages))
    at, runs = len(parts[0]), list[Passage]()
    if not text.startswith(parts[0]):
        return None
    before, owner = parts[0], -1
    for written, after in zip(parts[1::2], parts[2::2], strict=True):
        piece = standing.piece(written)
        end = _end_of(piece.text, text, at, after)
        if end is None:
            return None
        if piece.message != owner:
            owner = piece.message
            runs.append(Passage(at, end, before, after, [piece]))
        else:
            runs[-1].end, runs[-1].after = end, after
            runs[-1].pieces.append(piece)
        before, at = after, end + len(after)
    if at != len(text):
        return None
    by_message: dict[int, list[Passage]] = {}
    for run in runs:
        earlier = by_message.setdefault(run.pieces[0].message, [])
        # A text that is written again (a call's name in the header of its result) is not the message.
        if not all(any(piece in other.pieces for other in earlier) for piece in run.pieces):
            earlier.append(run)
    return by_message


def place(text: str, messages: Sequence[Message], number: int, render: Render) -> list[Passage]:
    """Where one message of ``text`` stands, from a rendering in which only its texts are replaced; nowhere if that fails."""
    standing = StandIns(messages, only=number)
    parts = STANDIN.split(render(standing.messages))
    if len(parts) == 1:
        return []
    pieces = [standing.piece(c) for c in parts[1::2]]
    start, end = len(parts[0]), len(text) - len(parts[-1])
    if end < start or not (text.startswith(parts[0]) and text.endswith(parts[-1])):
        return []
    if any(not any(w in text[start:end] for w in written_forms(p.text)) for p in pieces):
        return []
    return [Passage(start, end, text[:start], text[end:], pieces)]


def _end_of(core: str, text: str, at: int, after: str) -> int | None:
    for written in written_forms(core):
        end = at + len(written)
        if text.startswith(written, at) and text.startswith(after, end):
            return end
    return None


def written_forms(core: str) -> Iterator[str]:
    """How a template may write a text: as it is, or quoted by JSON or Python."""
    yield core
    yield json.dumps(core, ensure_ascii=False)[1:-1]
    yield json.dumps(core)[1:-1]
    yield repr(core)[1:-1]
