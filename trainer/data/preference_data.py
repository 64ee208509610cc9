"""Preferences as the data of a run: rendered, their common prompt found, cut without ever emptying an answer."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, TypeVar

from trainer.config import schema, setting
from trainer.data.chat import Chat, ChatError
from trainer.data.chat_data import Conversations, Truncation
from trainer.data.pairs import Pair, Pairs, prepare_pairs
from trainer.data.preference import FORMS, KNOWN, Form, form_of
from trainer.data.rows import Encoded
from trainer.data.sources import Source
from trainer.data.templates import Template, TemplateError
from trainer.data.tokenizer import Tokenizer

T = TypeVar("T")


@dataclass
class Answers(Conversations):
    """Answers that were judged; a unit of the batch is what was judged together."""

    kind: ClassVar[type[Pairs]]

    truncation: Truncation = setting(
        Truncation.keep_end,
        "longer than a row: keep_end cuts the prompt's beginning, keep_start the answers' ends, drop leaves them out",
    )

    @property
    def share(self) -> bool:
        """Whether the answers of a unit share the computation of their prompt."""
        return False

    def rows(self, source: Source, tokenizer: Tokenizer, length: int) -> Pairs:
        template = self.open_template(tokenizer)
        settings = [self.unit, self.truncation, self.on_bad_row, str(sorted(self.columns.items()))]
        rendering = hashlib.sha256(template.source.encode()).hexdigest()
        dropped: dict[str, int] = {}
        return prepare_pairs(
            self.cache_folder / "rows", [source.fingerprint(), rendering, *settings],
            lambda: self.encoded(source, template, length, dropped), tokenizer, length,
            source=source, dropped=dropped, share=self.share, kind=self.kind,
        )  # fmt: skip

    def encoded(self, source: Source, template: Template, length: int, dropped: dict[str, int]) -> Iterator[Pair]:
        """Ids of every unit; what teaches nothing is counted in ``dropped``."""
        raise NotImplementedError(f"{type(self).__name__} does not say what its units are")

    def read(self, source: Source, forms: Sequence[Form[T]]) -> Iterator[tuple[str, T]]:
        """Every row with its place; the first one decides about the form."""
        form: Form[T] | None = None
        for where, found in source.rows():
            row = {**found, **{ours: found[theirs] for ours, theirs in self.columns.items() if theirs in found}}
            try:
                form = form or form_of(row, forms)
                source.form = form.name
                if lacking := [column for column in form.columns if row.get(column) is None]:
                    raise ChatError(f"{', '.join(lacking)} is missing, which earlier rows have")
                yield where, form.read(row)
            except ChatError as error:
                source.reject(where, str(error))

    def cut(self, pair: Pair, length: int) -> Pair | None:
        """The pair in at most ``length`` ids a side, each answer with at least one id; None where it is to be left out."""
        room = length
        longest = max(len(pair.chosen.ids), len(pair.rejected.ids))
        if longest <= room:
            return pair
        if self.truncation is Truncation.drop:
            return None
        prompt, over = pair.shared, longest - room
        if self.truncation is Truncation.keep_end:
            # At least one id of the prompt stays: the first id of an answer is predicted from it.
            away = min(over, prompt - 1)
            sides = [Encoded(s.ids[away:], (s.trained or [])[away:], away) for s in (pair.chosen, pair.rejected)]
        else:
            away, sides = 0, [pair.chosen, pair.rejected]
            if prompt >= room:
                return None
        sides = [Encoded(s.ids[:room], (s.trained or [])[:room], s.cut + max(0, len(s.ids) - room)) for s in sides]
        if not all(any((s.trained or [])[1:]) for s in sides):
            return None
        return Pair(sides[0], sides[1], prompt - away, pair.margin)


@schema("data/preference")
@dataclass
class PreferenceData(Answers):
    """Pairs of answers from files, folders or the hub; a unit of the batch is a pair."""

    unit: ClassVar[str] = "preference pairs"
    columns_read: ClassVar[tuple[str, ...]] = KNOWN
    kind: ClassVar[type[Pairs]] = Pairs

    share_prompt: bool = setting(True, "compute a prompt once for both of its answers; the numbers are the same")

    @property
    def share(self) -> bool:
        return self.share_prompt

    def encoded(self, source: Source, template: Template, length: int, dropped: dict[str, int]) -> Iterator[Pair]:
        """Ids of every pair; what teaches nothing (equal answers, repeated pairs, too long) is counted in ``dropped``."""
        seen: set[bytes] = set()
        for where, preference in self.read(source, FORMS):
            try:
                chosen, rejected = (encode(chat, template) for chat in (preference.chosen, preference.rejected))
            except TemplateError as error:
                source.reject(where, str(error))
                continue
            pair = self.cut(Pair(chosen, rejected, common(chosen, rejected), preference.margin), length)
            digest = hashlib.blake2b(repr((chosen.ids, rejected.ids)).encode(), digest_size=16).digest()
            why = (
                "too long" if pair is None
                else "equal answers" if list(chosen.ids) == list(rejected.ids)
                else "repeated" if digest in seen
                else None
            )  # fmt: skip
            seen.add(digest)
            if why is not None:
                dropped[why] = dropped.get(why, 0) + 1
            elif pair is not None:
                yield pair


def encode(chat: Chat, template: Template) -> Encoded:
    """Ids of a prompt with an answer, without what the template writes behind it; learnt is the assistant's part there."""
    turns = [n for n in chat.assistant_turns if n >= chat.completion]
    ids, trained, _ = template.encode(chat.messages, chat.tools, turns=turns)
    assert trained is not None
    end = len(trained) - list(reversed(trained)).index(True)
    return Encoded(list(ids[:end]), list(trained[:end]))


def common(first: Encoded, second: Encoded) -> int:
    """How many ids both begin with before either learns one; at least one of each stays outside."""
    assert first.trained is not None and second.trained is not None  # noqa: PT018
    limit = min(len(first.ids), len(second.ids)) - 1
    columns = zip(first.ids, second.ids, first.trained, second.trained, strict=False)
    differing = (n for n, (a, b, *learnt) in enumerate(columns) if a != b or any(learnt))
    return min(limit, next(differing, limit))
