"""Chats as the data of a run: rendered by a template, masked to what the assistant wrote, packed by best fit."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum, auto
from itertools import islice
from typing import ClassVar

from trainer.config import ConfigError, schema, setting
from trainer.data.chat import KNOWN, Chat, ChatError, Form, form_of
from trainer.data.corpus import Corpus, Files, Prompt, answer_in
from trainer.data.rows import Encoded, Rows, prepare
from trainer.data.sources import Source
from trainer.data.templates import BUILT_IN, Template, TemplateError, open_template
from trainer.data.tokenizer import Tokenizer


class TrainOn(StrEnum):
    """Which tokens of a conversation are learnt."""

    assistant = auto()
    last_assistant = auto()
    completion = auto()
    all = auto()


class Truncation(StrEnum):
    """What becomes of a conversation that is longer than a row."""

    keep_start = auto()
    keep_end = auto()
    drop = auto()


@dataclass
class Conversations(Files):
    """Data that a chat template renders."""

    template: str | None = setting(None, f"null = the tokenizer's own, or {', '.join(BUILT_IN)}")

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        if self.template is not None and self.template not in BUILT_IN:
            yield f"data.template={self.template} is not known; use {', '.join(BUILT_IN)}, or null for the tokenizer's own"

    def open(self, tokenizer: Tokenizer, length: int, seed: int) -> Corpus:
        template = self.open_template(tokenizer)
        # What the model learns to answer in is what its export must say.
        tokenizer.chat_template = template.source
        tokenizer.stops = tuple(dict.fromkeys((template.end, tokenizer.eos)))
        return super().open(tokenizer, length, seed)

    def open_template(self, tokenizer: Tokenizer) -> Template:
        """The template that conversations are rendered by.

        Raises:
            ConfigError: if there is none, or it does not fit the tokenizer.
        """
        try:
            return open_template(self.template, tokenizer)
        except TemplateError as error:
            raise ConfigError([str(error)]) from None


@schema("data/chat")
@dataclass
class ChatData(Conversations):
    """Conversations from files, folders or the hub, in any of the usual forms."""

    columns_read: ClassVar[tuple[str, ...]] = KNOWN

    train_on: TrainOn = setting(
        TrainOn.assistant,
        "what is learnt: the assistant's turns, its last_assistant turn, the completion (behind the last user turn), or all",
    )
    truncation: Truncation = setting(
        Truncation.keep_start, "conversations longer than a row: keep_start, keep_end, or drop"
    )
    answer: str | None = setting(
        None, "pattern whose first group is the answer in a text; null = the whole text. For exact match"
    )

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        if self.answer is not None:
            try:
                if re.compile(self.answer).groups != 1:
                    yield f"data.answer={self.answer} must have exactly one group, which is the answer"
            except re.error as error:
                yield f"data.answer={self.answer} is no regular expression ({error})"

    def open(self, tokenizer: Tokenizer, length: int, seed: int) -> Corpus:
        corpus, template = super().open(tokenizer, length, seed), self.open_template(tokenizer)
        corpus.prompts = lambda count: list(islice(self._prompts(template), count))
        return corpus

    def rows(self, source: Source, tokenizer: Tokenizer, length: int) -> Rows:
        template = self.open_template(tokenizer)
        columns = sorted(self.columns.items())
        settings = [self.train_on, self.truncation, self.on_bad_row, str(columns), str(self.answer)]
        rendering = hashlib.sha256(template.source.encode()).hexdigest()
        return prepare(
            self.cache_folder / "rows", ["chat", source.fingerprint(), rendering, *settings],
            lambda: self.encoded(source, template, length), tokenizer, length,
            source=source, unit="conversation",
        )  # fmt: skip

    def chats(self, source: Source) -> Iterator[tuple[str, Chat]]:
        """Every conversation with its place (file and line); the first row decides about the form."""
        form: Form | None = None
        for where, found in source.rows():
            row = {**found, **{ours: found[theirs] for ours, theirs in self.columns.items() if theirs in found}}
            try:
                form = form or form_of(row)
                source.form = form.name
                if lacking := [column for column in form.columns if row.get(column) is None]:
                    raise ChatError(f"{', '.join(lacking)} is missing, which earlier rows have")
                yield where, form.read(row)
            except ChatError as error:
                source.reject(where, str(error))

    def encoded(self, source: Source, template: Template, length: int) -> Iterator[Encoded]:
        """Ids and masks of every conversation that has something to learn, cut to ``length`` pairs."""
        for where, chat in self.chats(source):
            try:
                found = self.encode(chat, template)
            except TemplateError as error:
                source.reject(where, str(error))
                continue
            ids, trained = self._cut(found, length)
            if not any(trained[1:]):
                # Too long is no mistake of the row: left out and counted, whatever on_bad_row says.
                source.skipped.append(
                    f"{where}: nothing to learn is left of its {len(found.ids):,} tokens in a row of {length}"
                )
                continue
            yield Encoded(ids, trained, len(found.ids) - len(ids))

    def encode(self, chat: Chat, template: Template) -> Encoded:
        """Ids of a conversation, and which of them are learnt."""
        turns = chat.assistant_turns
        if self.train_on is TrainOn.last_assistant:
            turns = turns[-1:]
        if self.train_on is TrainOn.completion:
            turns = [n for n in turns if n >= chat.completion]
        found = template.encode(chat.messages, chat.tools, turns=turns)
        return Encoded(found.ids, [True] * len(found.ids)) if self.train_on is TrainOn.all else found

    def _cut(self, found: Encoded, length: int) -> tuple[list[int], list[bool]]:
        ids, trained = list(found.ids), list(found.trained or [])
        if len(ids) <= length + 1:
            return ids, trained
        if self.truncation is Truncation.drop:
            return [], []
        part = slice(0, length + 1) if self.truncation is Truncation.keep_start else slice(len(ids) - length - 1, None)
        return ids[part], trained[part]

    def _prompts(self, template: Template) -> Iterator[Prompt]:
        """Held-out prompts with their right answers: ``ideal``, else what the pattern finds in the completion."""
        for source in self.sources(self.eval):
            for _, chat in self.chats(source):
                before = chat.messages[: chat.assistant_turns[-1]]
                ideal = list(chat.ideal)
                if not ideal and self.answer is not None:
                    ideal = [answer_in(str(chat.messages[-1].get("content", "")), self.answer)]
                try:
                    ids = template.prompt(before, chat.tools)
                except TemplateError:
                    continue
                yield Prompt(ids, str(before[-1].get("content", "")) if before else "", ideal, self.answer)
