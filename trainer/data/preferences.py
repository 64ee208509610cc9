"""Preferences as the data of a run: rendered, their common prompt found, cut without ever emptying an answer."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

from trainer.batch import Batch
from trainer.config import schema, setting
from trainer.data.chats import Truncation
from trainer.data.conversations import Conversations
from trainer.data.messages import Chat, ChatError, Row, tools_of, type_in_words, validate_messages
from trainer.data.pairs import Pair, PairBatch, PairStore, answer_start, prepare_pairs
from trainer.data.row_formats import QUESTION_FORMATS, REPEATED, RowFormat, answered, columns_of, read_rows
from trainer.data.rows import Encoded
from trainer.data.shared_beginnings import common_length
from trainer.data.sources import DataSource
from trainer.data.templates import EncodedChat, Template, TemplateError
from trainer.data.tokenizer import Tokenizer


@dataclass
class JudgedAnswers(Conversations):
    """Answers that were judged; a unit of the batch is what was judged together."""

    store: ClassVar[type[PairStore]] = PairStore

    truncation: Truncation = setting(
        Truncation.keep_end,
        "longer than a row: keep_end cuts the prompt's beginning, keep_start the answers' ends, drop leaves them out",
    )

    @property
    def share(self) -> bool:
        """Whether the answers of a unit share the computation of their prompt."""
        return False

    def rows(self, source: DataSource, tokenizer: Tokenizer, length: int) -> PairStore:
        template = self.open_template(tokenizer)
        content, rendering, on_bad_row, columns = self.cache_key(source, template)
        dropped: Counter[str] = Counter()
        return prepare_pairs(
            self.cache_folder / "rows",
            [content, rendering, self.batch_type.unit, self.truncation, on_bad_row, columns],
            lambda: self.encoded(source, template, length, dropped),
            tokenizer,
            length,
            source=source,
            dropped=dropped,
            share=self.share,
            store=self.store,
        )

    def encoded(self, source: DataSource, template: Template, length: int, dropped: Counter[str]) -> Iterator[Pair]:
        """Ids of every unit; what teaches nothing is counted in ``dropped``."""
        raise NotImplementedError(f"{type(self).__name__} does not implement encoded()")

    def encode(self, chats: Sequence[Chat], template: Template, source: DataSource) -> list[Encoded]:
        """`encode` of what a row holds, where what the template does not write is an error or counted.

        Raises:
            ChatError: if no turn of an answer is learnt.
            TemplateError: if an answer is not written, or something is lost and that is an error.
        """
        encoded = [encode(chat, template) for chat in chats]
        self.account_for_lost(encoded, source)
        return [Encoded(part.ids, part.trained) for part in encoded]

    def truncate(self, pair: Pair, length: int) -> Pair | None:
        """The pair in at most ``length`` ids a side, each answer with at least one id; None where it is to be left out."""
        sides = [pair.chosen, pair.rejected]
        excess = max(len(side.ids) for side in sides) - length
        if excess <= 0:
            return pair
        if self.truncation is Truncation.drop or (self.truncation is Truncation.keep_start and pair.shared >= length):
            return None
        # At least one id of the prompt stays: the first id of an answer is predicted from it.
        start = min(excess, pair.shared - 1) if self.truncation is Truncation.keep_end else 0
        sides = [_slice(side, start, start + length) for side in sides]
        if not all(any((side.trained or [])[1:]) for side in sides):
            return None
        return Pair(sides[0], sides[1], pair.shared - start, pair.margin)


def _slice(side: Encoded, start: int, end: int) -> Encoded:
    ids = side.ids[start:end]
    return Encoded(ids, (side.trained or [])[start:end], len(side.ids) - len(ids))


@schema("data/preference")
@dataclass
class PreferenceData(JudgedAnswers):
    """Pairs of answers from files, folders or the hub; a unit of the batch is a pair."""

    batch_type: ClassVar[type[Batch]] = PairBatch

    share_prompt: bool = setting(True, "compute a prompt once for both of its answers; the numbers are the same")

    @property
    def share(self) -> bool:
        return self.share_prompt

    def columns_read(self) -> tuple[str, ...]:
        return columns_of(PREFERENCE_FORMATS)

    def encoded(self, source: DataSource, template: Template, length: int, dropped: Counter[str]) -> Iterator[Pair]:
        """Ids of every pair; what teaches nothing (equal answers, repeated pairs, too long) is counted in ``dropped``."""
        seen: set[bytes] = set()
        for where, preference, _ in read_rows(source, PREFERENCE_FORMATS, "preference"):
            try:
                chosen, rejected = self.encode((preference.chosen, preference.rejected), template, source)
            except (ChatError, TemplateError) as error:
                source.reject(where, str(error))
                continue
            shared = shared_prefix(chosen, rejected)
            pair = self.truncate(Pair(chosen, rejected, shared, preference.margin), length)
            digest = hashlib.blake2b(repr((chosen.ids, rejected.ids)).encode(), digest_size=16).digest()
            if pair is None:
                dropped["too long"] += 1
            elif list(chosen.ids) == list(rejected.ids):
                dropped["equal answers"] += 1
            elif digest in seen:
                dropped["repeated"] += 1
            else:
                yield pair
            seen.add(digest)


def encode(chat: Chat, template: Template) -> EncodedChat:
    """Ids of a prompt with an answer, without what the template writes behind it; learnt is the assistant's part there.

    Raises:
        ChatError: if no turn of the answer is learnt.
        TemplateError: if the template cannot render it, or does not write the answer.
    """
    turns = [n for n in chat.trained_turns if n >= chat.completion]
    if not turns:
        raise ChatError("all turns of an answer have the weight 0")
    encoded = template.encode(chat.messages, chat.tools, turns=turns, apart=True)
    if not any(encoded.trained):
        what = ", ".join(encoded.lost) or "the answer"
        raise TemplateError(f"the template does not write {what}; use another data.template")
    end = len(encoded.trained) - encoded.trained[::-1].index(True)
    return EncodedChat(encoded.ids[:end], encoded.trained[:end], encoded.lost)


def shared_prefix(first: Encoded, second: Encoded) -> int:
    """How many ids both begin with before either learns one; at least one of each stays outside."""
    before_learnt = min(answer_start(first), answer_start(second))
    return min(common_length(first.ids, second.ids), before_learnt, len(first.ids) - 1, len(second.ids) - 1)


@dataclass(frozen=True)
class Preference:
    """Two conversations that begin alike.

    ``margin``: by how much the chosen one is better, 0 where that is not known.
    """

    chosen: Chat
    rejected: Chat
    margin: float

    @property
    def chats(self) -> tuple[Chat, Chat]:
        """Both conversations."""
        return self.chosen, self.rejected


SIDES = ("chosen", "rejected")
SCORES = ("margin", "score_chosen", "score_rejected")


def _with_question(read: Callable[[Row], Chat], row: Row) -> Preference:
    question = read(row)
    if "prompt" not in row and question.messages[-1]["role"] == "assistant":
        raise ChatError("what chosen and rejected answer ends with the assistant's turn, not with a question")
    chosen, rejected = (answered(question, row[side], side) for side in SIDES)
    if REPEATED in chosen.notes and REPEATED in rejected.notes:
        return _beginning(row, chosen, rejected)
    return Preference(chosen, rejected, _margin(row))


def _shared_beginning(row: Row) -> Preference:
    tools = tools_of(row)
    return _beginning(row, *(Chat(validate_messages(row[side], side), 0, tools) for side in SIDES))


def _beginning(row: Row, chosen: Chat, rejected: Chat) -> Preference:
    """Two whole conversations: what they have in common is the prompt."""
    first, second = chosen.messages, rejected.messages
    shared = min(common_length(first, second), len(first) - 1, len(second) - 1)
    if not shared:
        raise ChatError("chosen and rejected begin differently, so they answer no common prompt")
    for side, messages in zip(SIDES, (first, second), strict=True):
        if messages[-1]["role"] != "assistant":
            raise ChatError(f"the last message of {side} is the {messages[-1]['role']}'s, not the assistant's")
    return Preference(replace(chosen, completion=shared), replace(rejected, completion=shared), _margin(row))


def _openai(row: Row) -> Preference:
    """A row of OpenAI's files for preference fine-tuning."""
    asked = row["input"]
    if not isinstance(asked, Mapping):
        raise ChatError(f"input is {type_in_words(asked)}, not an object with messages")
    messages = validate_messages(asked.get("messages"), "the messages of input")
    question = Chat(messages, len(messages), tools_of(asked))
    chosen, rejected = (answered(question, row[name], name) for name in ("preferred_output", "non_preferred_output"))
    return Preference(chosen, rejected, _margin(row))


def _margin(row: Row) -> float:
    names = ["margin"] if row.get("margin") is not None else ["score_chosen", "score_rejected"]
    values = [row.get(name) for name in names]
    if all(value is None for value in values):
        return 0.0
    for name, value in zip(names, values, strict=True):
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ChatError(f"{name} is {type_in_words(value)}, not a number")
        if not math.isfinite(value):
            raise ChatError(f"{name} is {value}, not a finite number")
    return float(values[0] if len(values) == 1 else values[0] - values[1])  # type: ignore[operator, arg-type]


PREFERENCE_FORMATS: list[RowFormat[Preference]] = [
    *(
        RowFormat(
            f"{form.name}, chosen and rejected",
            (*form.columns, *SIDES),
            partial(_with_question, form.read),
            (*form.optional, *SCORES),
        )
        for form in QUESTION_FORMATS
    ),
    RowFormat("OpenAI's preferences", ("input", "preferred_output", "non_preferred_output"), _openai, SCORES),
    RowFormat("chosen and rejected with a shared beginning", SIDES, _shared_beginning, ("tools", "functions", *SCORES)),
]
"""How rows of preferences are written; the first whose columns a row has reads it. A user's module may add its own."""
