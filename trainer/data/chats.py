"""Chats as the data of a run: rendered by a template, masked to what the assistant wrote, packed by best fit."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum, auto
from itertools import islice

from trainer.config import ConfigError, schema, setting
from trainer.data.corpus import Corpus, Files, Prompt, answer_in
from trainer.data.messages import (
    Chat,
    ChatError,
    Message,
    Row,
    RowFormat,
    as_messages,
    columns_of,
    prompt_messages,
    read_rows,
    system_messages,
    text_of,
    type_in_words,
    validate_messages,
)
from trainer.data.rows import Encoded, RowStore, prepare_rows
from trainer.data.sources import DataSource
from trainer.data.templates import BUILT_IN, Template, TemplateError, open_template
from trainer.data.tokenizer import Tokenizer

SHAREGPT = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "system": "system",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}
"""Names of speakers in ShareGPT's format, and the roles that they are."""


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

    def cache_key(self, source: DataSource, template: Template) -> list[str]:
        """What prepared data depends on: the files, the rendering, and how rows are read."""
        rendering = hashlib.sha256(template.source.encode()).hexdigest()
        return [source.fingerprint(), rendering, self.on_bad_row, str(sorted(self.columns.items()))]


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
        for where, chat in read_rows(source, self.columns, CHAT_FORMATS):
            try:
                full = self.encode(chat, template)
            except TemplateError as error:
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
        """Ids of a conversation, and which of them are learnt."""
        turns = chat.assistant_turns
        if self.train_on is TrainOn.last_assistant:
            turns = turns[-1:]
        if self.train_on is TrainOn.completion:
            turns = [n for n in turns if n >= chat.completion]
        encoded = template.encode(chat.messages, chat.tools, turns=turns)
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
        for source in self.sources(self.eval):
            for _, chat in read_rows(source, self.columns, CHAT_FORMATS):
                before = chat.messages[: chat.assistant_turns[-1]]
                ideal = list(chat.ideal)
                if not ideal and self.answer is not None:
                    ideal = [answer_in(str(chat.messages[-1].get("content", "")), self.answer)]
                try:
                    ids = template.prompt(before, chat.tools)
                except TemplateError:
                    continue
                yield Prompt(ids, str(before[-1].get("content", "")) if before else "", ideal, self.answer)


def _messages(row: Row) -> Chat:
    messages, ideal = validate_messages(row["messages"], "messages"), ideal_answers(row)
    if messages[-1]["role"] != "assistant" and ideal:
        messages.append({"role": "assistant", "content": ideal[0]})
    return _chat(messages, _after_last_question(messages), row)


def _prompt_completion(row: Row) -> Chat:
    prompt = prompt_messages(row)
    return _chat([*prompt, *as_messages(row["completion"], "completion", "assistant")], len(prompt), row)


def _sharegpt(row: Row) -> Chat:
    turns = row["conversations"]
    if not isinstance(turns, list) or not turns:
        raise ChatError(f"conversations is {type_in_words(turns)}, not a list of turns")
    messages = []
    for number, turn in enumerate(turns, start=1):
        if not isinstance(turn, Mapping) or "from" not in turn or "value" not in turn:
            raise ChatError(f"turn {number} of conversations has no 'from' and 'value'")
        if turn["from"] not in SHAREGPT:
            raise ChatError(f"turn {number} of conversations is from {turn['from']!r}; use {', '.join(SHAREGPT)}")
        messages.append({"role": SHAREGPT[turn["from"]], "content": turn["value"]})
    messages = validate_messages(system_messages(row) + messages, "conversations")
    return _chat(messages, _after_last_question(messages), row)


def _alpaca(row: Row) -> Chat:
    instruction, given, output = (text_of(row, column) for column in ("instruction", "input", "output"))
    if not instruction:
        raise ChatError("the instruction is empty")
    question = f"{instruction}\n\n{given}" if given else instruction
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": output}]
    return _chat(messages, 1, row)


def _prompt_ideal(row: Row) -> Chat:
    ideal = ideal_answers(row)
    if not ideal:
        raise ChatError("ideal is an empty list")
    return _prompt_completion({**row, "completion": ideal[0]})


CHAT_FORMATS: list[RowFormat[Chat]] = [
    RowFormat("messages", ("messages",), _messages, ("system", "tools", "ideal")),
    RowFormat("prompt and completion", ("prompt", "completion"), _prompt_completion),
    RowFormat("ShareGPT", ("conversations",), _sharegpt),
    RowFormat("Alpaca", ("instruction", "output"), _alpaca, ("input",)),
    RowFormat("prompt and ideal", ("prompt", "ideal"), _prompt_ideal),
]
"""How rows of conversations are written; the first whose columns a row has reads it. A user's module may add its own."""


def ideal_answers(row: Row) -> list[str]:
    """The right answers of the column ``ideal``: a text, a list of texts, or none.

    Raises:
        ChatError: if it is something else.
    """
    value = row.get("ideal")
    values = [] if value is None else value if isinstance(value, list) else [value]
    if any(not isinstance(v, str) for v in values):
        raise ChatError(f"ideal is {type_in_words(value)}, not text or a list of texts")
    return values


def _chat(messages: list[Message], completion: int, row: Row) -> Chat:
    if not any(m["role"] == "assistant" for m in messages):
        raise ChatError("no turn is the assistant's, so there is nothing to learn")
    tools = row.get("tools")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except json.JSONDecodeError as error:
            raise ChatError(f"tools is not JSON ({error.msg} at column {error.colno})") from None
    return Chat(messages, completion, tools or None, ideal_answers(row))


def _after_last_question(messages: list[Message]) -> int:
    """The first message behind the last one that is the user's or the system's."""
    return 1 + max((n for n, m in enumerate(messages) if m["role"] in ("user", "system")), default=-1)
