"""Single answers that are desirable or not: each learnt beside the next row's, which tells how far a policy has moved."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from trainer.batch import Batch
from trainer.config import schema
from trainer.data.messages import Chat, ChatError, Row, RowFormat, as_messages, columns_of, prompt_messages, read_rows
from trainer.data.pairs import AnswerBatch, Pair, PairStore, answer_start, collate_shared_prefix
from trainer.data.preferences import JudgedAnswers, answered, encode
from trainer.data.rows import Encoded
from trainer.data.sources import DataSource
from trainer.data.store import skipped_summary
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
        label = "desirable" if self.unit(number).margin == DESIRABLE else "undesirable"
        return {**super().preview(number, tokenizer), "rejected": "", "label": label}

    def summary(self, name: str) -> list[str]:
        f, desirable = self.facts, int((self._margins == DESIRABLE).sum())
        line = (
            f"{name}: {f['pairs']:,} labelled completions ({f['form']}), {desirable:,} of them desirable "
            f"({f['cut']:,} cut{self._dropped()}; longest {f['longest']:,} tokens)"
        )
        return [line, *skipped_summary(name, f["skipped"])]


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
        for where, row in read_rows(source, self.columns, LABELLED_FORMATS, "preference"):
            try:
                answer = encode(row.chat, template)
            except TemplateError as error:
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


def _labelled(row: Row) -> LabelledChat:
    chat = answered(row, prompt_messages(row), as_messages(row["completion"], "completion", "assistant"), "completion")
    label = row["label"]
    if not isinstance(label, bool | int | float) or label not in (0, 1):
        raise ChatError(f"label is {label!r}; use true or false (1 or 0)")
    return LabelledChat(chat, bool(label))


LABELLED_FORMATS: list[RowFormat[LabelledChat]] = [
    RowFormat("prompt, completion and label", ("prompt", "completion", "label"), _labelled)
]
"""How rows of labelled answers are written; the first whose columns a row has reads it."""
