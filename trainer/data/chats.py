"""Chats as the data of a run: rendered by a template, masked to what the assistant wrote, packed by best fit."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum, auto
from itertools import islice

from trainer.config import ConfigError, schema, setting
from trainer.data.corpus import Corpus, Files, Prompt, answer_in
from trainer.data.messages import ROLES, Chat, ChatError
from trainer.data.row_formats import CHAT_FORMATS, columns_of, read_rows
from trainer.data.rows import Encoded, RowStore, prepare_rows
from trainer.data.sources import DataSource
from trainer.data.templates import BUILT_IN, Template, TemplateError, open_template
from trainer.data.tokenizer import Tokenizer

READING = 2
"""Of the rules by which rows are read: what other rules prepared is prepared again."""


class TrainOn(StrEnum):
    """Which tokens of a conversation are learnt."""

    assistant = auto()
    last_assistant = auto()
    completion = auto()
    all = auto()


class Truncation(StrEnum):
    """How a conversation that is longer than a row is handled."""

    keep_start = auto()
    keep_end = auto()
    drop = auto()


@dataclass
class Conversations(Files):
    """Data that a chat template renders."""

    template: str | None = setting(None, f"null = the tokenizer's own, or {', '.join(BUILT_IN)}")
    roles: dict[str, str] = setting(
        dict, f"what a speaker is whose name is not known: {{customer: user}}; one of {', '.join(ROLES)}"
    )

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        if self.template is not None and self.template not in BUILT_IN:
            yield f"data.template={self.template} is not known; use {', '.join(BUILT_IN)}, or null for the tokenizer's own"
        for name, role in self.roles.items():
            if role not in ROLES:
                yield f"data.roles.{name}={role} is not a role; use {', '.join(ROLES)}"

    def sources(self, paths: Sequence[str], *, heldout: bool = False) -> list[DataSource]:
        sources = super().sources(paths, heldout=heldout)
        for source in sources:
            source.roles = self.roles
        return sources

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

    def cache_key(self, source: DataSource, template: Template) -> list[str]:
        """What prepared data depends on: the files, the rendering, and how rows are read."""
        rendering = hashlib.sha256(template.source.encode()).hexdigest()
        names = str([sorted(source.columns.items()), sorted(source.roles.items()), READING])
        return [source.fingerprint(), rendering, self.on_bad_row, names]


@schema("data/chat")
@dataclass
class ChatData(Conversations):
    """Conversations from files, folders or the hub, in any of the usual formats."""

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
                yield f"data.answer={self.answer} is not a valid regular expression ({error})"

    def columns_read(self) -> tuple[str, ...]:
        return columns_of(CHAT_FORMATS)

    def open(self, tokenizer: Tokenizer, length: int, seed: int) -> Corpus:
        corpus, template = super().open(tokenizer, length, seed), self.open_template(tokenizer)
        corpus.prompts = lambda count: list(islice(self._prompts(template), count))
        return corpus

    def rows(self, source: DataSource, tokenizer: Tokenizer, length: int) -> RowStore:
        template = self.open_template(tokenizer)
        content, rendering, on_bad_row, columns = self.cache_key(source, template)
        key = ["chat", content, rendering, self.train_on, self.truncation, on_bad_row, columns, str(self.answer)]
        return prepare_rows(
            self.cache_folder / "rows",
            key,
            lambda: self.encoded(source, template, length),
            tokenizer,
            length,
            source=source,
            unit="conversation",
        )

    def encoded(self, source: DataSource, template: Template, length: int) -> Iterator[Encoded]:
        """Ids and masks of every conversation that has something to learn, cut to ``length`` positions."""
        for where, chat in read_rows(source, CHAT_FORMATS):
            try:
                full = self.encode(chat, template)
            except (ChatError, TemplateError) as error:
                source.reject(where, str(error))
                continue
            ids, trained = self._cut(full, length)
            if not any(trained[1:]):
                # Too long is no mistake of the row: left out and counted, whatever on_bad_row says.
                source.skipped.append(
                    f"{where}: nothing to learn is left of its {len(full.ids):,} tokens in a row of {length}"
                )
                continue
            yield Encoded(ids, trained, len(full.ids) - len(ids))

    def encode(self, chat: Chat, template: Template) -> Encoded:
        """Ids of a conversation, and which of them are learnt.

        Raises:
            ChatError: if nothing is learnt because of the weights of its messages.
            TemplateError: if the template cannot render it.
        """
        turns = chat.assistant_turns
        if self.train_on is TrainOn.last_assistant:
            turns = turns[-1:]
        if self.train_on is TrainOn.completion:
            turns = [n for n in turns if n >= chat.completion]
        trained = [n for n in turns if n in chat.trained_turns]
        if turns and not trained:
            raise ChatError(f"all turns that data.train_on={self.train_on} learns have the weight 0")
        if self.train_on is TrainOn.all and trained != turns:
            raise ChatError(
                "a turn has the weight 0, and data.train_on=all learns everything; use data.train_on=assistant"
            )
        encoded = template.encode(chat.messages, chat.tools, turns=trained)
        return Encoded(encoded.ids, [True] * len(encoded.ids)) if self.train_on is TrainOn.all else encoded

    def _cut(self, encoded: Encoded, length: int) -> tuple[list[int], list[bool]]:
        ids, trained = list(encoded.ids), list(encoded.trained or [])
        if len(ids) <= length + 1:
            return ids, trained
        if self.truncation is Truncation.drop:
            return [], []
        part = slice(0, length + 1) if self.truncation is Truncation.keep_start else slice(len(ids) - length - 1, None)
        return ids[part], trained[part]

    def _prompts(self, template: Template) -> Iterator[Prompt]:
        """Held-out prompts with their right answers: ``ideal``, else what the pattern finds in the completion."""
        for source in self.sources(self.eval, heldout=True):
            for _, chat in read_rows(source, CHAT_FORMATS):
                before = chat.messages[: chat.assistant_turns[-1]]
                ideal = list(chat.ideal)
                if not ideal and self.answer is not None:
                    ideal = [answer_in(str(chat.messages[-1].get("content", "")), self.answer)]
                try:
                    ids = template.prompt(before, chat.tools)
                except TemplateError:
                    continue
                yield Prompt(ids, str(before[-1].get("content", "")) if before else "", ideal, self.answer)
