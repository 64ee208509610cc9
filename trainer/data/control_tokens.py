"""Control tokens that a conversation names are text that somebody wrote: nobody opens a turn by typing its token."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from trainer.data.tokenizer import Tokenizer

BREAK = "\ufdd2"
"""A noncharacter behind the first one of a control token's name, while a text is rendered: this place is text."""
CONTROL_FORM = re.compile(r"<[|｜].*[|｜]>|\[\|.*\|\]", re.DOTALL)


class ControlTokens:
    """Which of a tokenizer's added tokens mean something to a chat template, and texts in which they mean nothing.

    ``names``: all special tokens, and added ones that the template writes or that have the form ``<|name|>``.
    ``tags``: pairs such as ``<think>`` and ``</think>`` that are added but not special: they give an answer its parts and
    cannot open a turn, so the assistant's own texts may hold them.
    """

    def __init__(self, tokenizer: Tokenizer, source: str) -> None:
        added = tokenizer.added - tokenizer.specials
        written = {name for name in added if name.strip() and (name in source or CONTROL_FORM.fullmatch(name))}
        self.names = frozenset(tokenizer.specials | written)
        roles = {name for name in tokenizer.role_names.values() if name}
        self.pairs = frozenset(n for n in self.names - roles if _partner(n) in tokenizer.added)
        self.tags = frozenset(self.pairs - tokenizer.specials)
        self.turns = pattern(self.names - self.pairs)
        """Finds tokens that can begin or end a turn."""
        self._tokenizer = tokenizer
        self._all, self._beyond_tags = pattern(self.names), pattern(self.names - self.tags)
        broken = [f"{re.escape(n[0])}{BREAK}{re.escape(n[1:])}" for n in _longest_first(self.names)]
        self._broken = re.compile(f"({'|'.join(broken)})" if broken else "((?!))")
        self._broken_or_stray = re.compile(f"{self._broken.pattern}|{BREAK}")

    def as_text(self, value: Any, *, tags: bool = False) -> Any:
        """A text, or every text in lists and objects (keys, too), with each name of a control token broken.

        ``tags``: leave `tags` as they are.
        """
        if isinstance(value, str):
            names = self._beyond_tags if tags else self._all
            return names.sub(lambda m: f"{m[0][0]}{BREAK}{m[0][1:]}", value)
        if isinstance(value, Mapping):
            return {self.as_text(k, tags=tags): self.as_text(v, tags=tags) for k, v in value.items()}
        if isinstance(value, list | tuple):
            return [self.as_text(v, tags=tags) for v in value]
        return value

    def settled(self, text: str) -> str:
        """A rendered text without the breaks whose names a template has cut or changed."""
        return self._broken_or_stray.sub(lambda m: m[1] or "", text) if BREAK in text else text

    def encode(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids, and each one's first and last character in ``text``: broken names are encoded as text."""
        ids: list[int] = []
        offsets: list[tuple[int, int]] = []
        at = 0
        for number, part in enumerate(self._broken.split(text) if BREAK in text else [text]):
            if number % 2:
                encoded, places = self._tokenizer.encode_as_text(part.replace(BREAK, ""), self.names)
                # The break is behind the first character.
                places = [(first + (first > 0), last + (last > 0)) for first, last in places]
            else:
                encoded, places = self._tokenizer.encode_with_offsets(part, specials=True)
            ids += encoded
            offsets += [(at + first, at + last) for first, last in places]
            at += len(part)
        return ids, offsets


def pattern(names: frozenset[str] | set[str]) -> re.Pattern[str]:
    """Finds any of the names, the longest first."""
    return re.compile("|".join(map(re.escape, _longest_first(names))) or r"(?!)")


def _longest_first(names: frozenset[str] | set[str]) -> list[str]:
    return sorted(names, key=lambda name: (-len(name), name))


def _partner(name: str) -> str:
    opened = re.fullmatch(r"([<\[])(/?)(\w+)([>\]])", name)
    return "" if opened is None else f"{opened[1]}{'' if opened[2] else '/'}{opened[3]}{opened[4]}"
