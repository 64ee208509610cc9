"""Single answers that are desirable or not: each learnt beside the next row's, which tells how far a policy has moved."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from trainer.batch import Batch
from trainer.config import schema
from trainer.data.messages import Chat, ChatError, Row
from trainer.data.pairs import AnswerBatch, Pair, PairStore, answer_start, collate_shared_prefix
from trainer.data.preferences import JudgedAnswers
from trainer.data.row_formats import CHAT_FORMATS, RowFormat, columns_of, read_rows
from trainer.data.rows import Encoded
from trainer.data.sources import DataSource
from trainer.data.store import Span, source_summary
from trainer.data.templates import Template, TemplateError
from trainer.data.tokenizer import Tokenizer

DESIRABLE, UNDESIRABLE = 1.0, -1.0


@dataclass
class LabelledBatch(AnswerBatch):
    """B labelled answers: answer b is unit b's.

    ``labels`` ``(B,)``: 1 where it is desirable, -1 where it is not.
    ``mismatched``: the same prompts, each with the answer of the data set's next row (Ethayarajh et al. 2024,
    arXiv:2402.01306, section 4.1): which one that is depends neither on the split into micro-batches nor on their order.
    """

    unit: ClassVar[str] = "labelled completions"

    labels: Tensor
    mismatched: AnswerBatch

    @property
    def parts(self) -> tuple[AnswerBatch, ...]:
        return (self, self.mismatched)


class LabelledStore(PairStore):
    """Labelled answers on disk: pairs of an answer and the next row's, whose margin is the label."""

    def _collate(self, pairs: Sequence[Pair], numbers: Sequence[int]) -> LabelledBatch:
        matched = _answers([p.chosen for p in pairs], [p.reference[0] for p in pairs], numbers)
        mismatched = _answers([p.rejected for p in pairs], [p.reference[1] for p in pairs], numbers)
        labels = torch.tensor([pair.margin for pair in pairs])
        return LabelledBatch(**vars(matched), labels=labels, mismatched=mismatched)

    def preview(self, number: int, tokenizer: Tokenizer) -> dict[str, str]:
        label = _label(self.unit(number))
        return {**super().preview(number, tokenizer), "rejected": "", "label": label}

    def spans(self, number: int) -> list[Span]:
        pair = self.unit(number)
        return [Span(_label(pair), *pair.chosen[:2]), Span("with the next row's answer", *pair.rejected[:2])]

    def summary(self, name: str) -> list[str]:
        f, desirable = self.facts, int((self._margins == DESIRABLE).sum())
        line = (
            f"{name}: {f['pairs']:,} labelled completions ({f['form']}), {desirable:,} of them desirable "
            f"({f['cut']:,} cut{self._dropped()}; longest {f['longest']:,} tokens)"
        )
        one_kind = {0: "undesirable", f["pairs"]: "desirable"}.get(desirable)
        alone = (
            [f"{name}: all of them are {one_kind}; what is to be learnt from the other kind is not in it"]
            if one_kind
            else []
        )
        return [line, *alone, *source_summary(name, f)]


def _label(pair: Pair) -> str:
    return "desirable" if pair.margin == DESIRABLE else "undesirable"


def _answers(answers: Sequence[Encoded], reference: Sequence[float], numbers: Sequence[int]) -> AnswerBatch:
    fields = collate_shared_prefix([(0, [answer]) for answer in answers], numbers)
    return AnswerBatch(**fields, reference=torch.tensor(reference, dtype=torch.float32))


@schema("data/labelled")
@dataclass
class LabelledData(JudgedAnswers):
    """Answers with a label (desirable or not) from files, folders or the hub; a unit of the batch is an answer."""

    batch_type: ClassVar[type[Batch]] = LabelledBatch
    store: ClassVar[type[PairStore]] = LabelledStore

    def columns_read(self) -> tuple[str, ...]:
        return columns_of(LABELLED_FORMATS)

    def encoded(self, source: DataSource, template: Template, length: int, dropped: Counter[str]) -> Iterator[Pair]:
        """Every answer with the next one, the last with the first; repeated ones and those too long are ``dropped``."""
        answers = self._answers(source, template, length, dropped)
        first = previous = next(answers, None)
        if first is None:
            return
        for following in answers:
            assert previous is not None
            yield mismatched(*previous, following[0], length)
            previous = following
        assert previous is not None
        yield mismatched(*previous, first[0], length)

    def _answers(
        self, source: DataSource, template: Template, length: int, dropped: Counter[str]
    ) -> Iterator[tuple[Encoded, float]]:
        seen: set[bytes] = set()
        for where, row, _ in read_rows(source, LABELLED_FORMATS, "labelled completion"):
            try:
                [answer] = self.encode([row.chat], template, source)
            except (ChatError, TemplateError) as error:
                source.reject(where, str(error))
                continue
            # Alone, it is a pair of itself with itself.
            pair = self.truncate(Pair(answer, answer, answer_start(answer)), length)
            digest = hashlib.blake2b(repr((answer.ids, row.desirable)).encode(), digest_size=16).digest()
            if pair is None:
                dropped["too long"] += 1
            elif digest in seen:
                dropped["repeated"] += 1
            else:
                yield pair.chosen, DESIRABLE if row.desirable else UNDESIRABLE
            seen.add(digest)


def mismatched(answer: Encoded, label: float, following: Encoded, length: int) -> Pair:
    """The answer, and its prompt with the answer of the ``following`` row in at most ``length`` ids."""
    prompt, start = answer_start(answer), answer_start(following)
    assert answer.trained is not None and following.trained is not None  # noqa: PT018
    # At least one id of the prompt stays: the first id of an answer is predicted from it.
    ids, trained = following.ids[start:][: length - 1], following.trained[start:][: length - 1]
    rest = slice(max(0, prompt + len(ids) - length), prompt)
    return Pair(answer, Encoded([*answer.ids[rest], *ids], [*answer.trained[rest], *trained]), 0, label)


@dataclass(frozen=True)
class LabelledChat:
    """A conversation whose completion is desirable, or is not."""

    chat: Chat
    desirable: bool

    @property
    def chats(self) -> tuple[Chat]:
        """The conversation."""
        return (self.chat,)


def _labelled(read: Callable[[Row], Chat], row: Row) -> LabelledChat:
    chat, label = read(row), row["label"]
    if chat.messages[-1]["role"] != "assistant":
        raise ChatError(f"the last message is the {chat.messages[-1]['role']}'s, not the assistant's")
    if not isinstance(label, bool | int | float) or label not in (0, 1):
        raise ChatError(f"label is {label!r}; use true or false (1 or 0)")
    return LabelledChat(chat, bool(label))


LABELLED_FORMATS: list[RowFormat[LabelledChat]] = [
    RowFormat(
        f"{form.name.replace(' and ', ', ')} and label",
        (*form.columns, "label"),
        partial(_labelled, form.read),
        form.optional,
    )
    for form in CHAT_FORMATS
]
"""How rows of labelled answers are written; the first whose columns a row has reads it."""
