"""Chats as the data of a run: rendered by a template, masked to what the assistant wrote, packed by best fit."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import StrEnum, auto
from itertools import islice

from trainer.config import schema, setting
from trainer.data.conversations import Conversations
from trainer.data.corpus import Corpus, Prompt, answer_in
from trainer.data.messages import Chat, ChatError
from trainer.data.row_formats import CHAT_FORMATS, columns_of, read_rows
from trainer.data.rows import Encoded, RowStore, prepare_rows
from trainer.data.shared_beginnings import branched
from trainer.data.sources import DataSource
from trainer.data.templates import EncodedChat, Template, TemplateError
from trainer.data.tokenizer import Tokenizer

SHARING = "a shared beginning once"
"""How samples of a conversation lie in a row: what was prepared otherwise is not used."""


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
        key = [
            "chat",
            SHARING,
            content,
            rendering,
            self.train_on,
            self.truncation,
            on_bad_row,
            columns,
            str(self.answer),
        ]
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
        for where, chat, _ in read_rows(source, CHAT_FORMATS):
            try:
                samples = self.samples(chat, template)
                self.account_for_lost(samples, source)
            except (ChatError, TemplateError) as error:
                source.reject(where, str(error))
                continue
            learnt = list[Encoded]()
            for sample in samples:
                if sample.lost and not any(sample.trained):
                    continue  # counted as lost
                ids, trained = self._cut(sample, length)
                if not any(trained[1:]):
                    # Too long is no mistake of the row: left out and counted, whatever on_bad_row says.
                    source.skipped.append(
                        f"{where}: nothing to learn is left of its {len(sample.ids):,} tokens in a row of {length}; "
                        "use a larger batch.length, or another data.truncation"
                    )
                    continue
                learnt.append(Encoded(ids, trained, len(sample.ids) - len(ids)))
            yield from branched(learnt, length)

    def samples(self, chat: Chat, template: Template) -> list[EncodedChat]:
        """What is learnt from a conversation: one sample, or several where turns are generated otherwise than remembered.

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
        if self.train_on is TrainOn.all:
            encoded = template.encode(chat.messages, chat.tools)
            return [replace(encoded, trained=[True] * len(encoded.ids))]
        return template.samples(chat.messages, chat.tools, turns=trained)

    def _cut(self, encoded: EncodedChat, length: int) -> tuple[list[int], list[bool]]:
        ids, trained = encoded.ids, encoded.trained
        if len(ids) <= length + 1:
            return ids, trained
        if self.truncation is Truncation.drop:
            return [], []
        part = slice(0, length + 1) if self.truncation is Truncation.keep_start else slice(len(ids) - length - 1, None)
        return ids[part], trained[part]

    def _prompts(self, template: Template) -> Iterator[Prompt]:
        """Held-out prompts with their right answers: ``ideal``, else what the pattern finds in the completion."""
        for source in self.sources(self.eval, heldout=True):
            for _, chat, _ in read_rows(source, CHAT_FORMATS):
                before = chat.messages[: chat.assistant_turns[-1]]
                ideal = list(chat.ideal)
                if not ideal and self.answer is not None:
                    ideal = [answer_in(str(chat.messages[-1].get("content", "")), self.answer)]
                try:
                    ids = template.prompt(before, chat.tools)
                except TemplateError:
                    continue
                yield Prompt(ids, str(before[-1].get("content", "")) if before else "", ideal, self.answer)
