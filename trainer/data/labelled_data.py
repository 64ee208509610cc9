"""Single answers that are desirable or not: each learnt beside the next row's, which tells how far a policy has moved."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from trainer.config import schema
from trainer.data.pairs import AnswerBatch, Pair, Pairs, collate_shared_prefix
from trainer.data.preference import KNOWN_LABELLED, LABELLED
from trainer.data.preference_data import Answers, encode
from trainer.data.rows import Encoded, left_out
from trainer.data.sources import Source
from trainer.data.templates import Template, TemplateError
from trainer.data.tokenizer import Tokenizer

DESIRABLE, UNDESIRABLE = 1.0, -1.0


@dataclass
class LabelledBatch(AnswerBatch):
    """B labelled answers: answer b is unit b's. ``labels`` ``(B,)``: 1 where it is desirable, -1 where it is not.

    ``mismatched``: the same prompts, each with the answer of the data set's next row (Ethayarajh et al. 2024,
    arXiv:2402.01306, section 4.1): which one that is depends neither on the split into micro-batches nor on their order.
    """

    labels: Tensor
    mismatched: AnswerBatch

    @property
    def parts(self) -> tuple[AnswerBatch, ...]:
        return (self, self.mismatched)


class Labelled(Pairs):
    """Labelled answers on disk: pairs of an answer and the next row's, whose margin is the label."""

    def _collate(self, pairs: Sequence[Pair], numbers: Sequence[int]) -> LabelledBatch:
        own, other = (
            AnswerBatch(
                **collate_shared_prefix([(0, (answer,)) for answer in answers], numbers),
                reference=torch.tensor([pair.reference[side] for pair in pairs], dtype=torch.float32),
            )
            for side, answers in enumerate(([p.chosen for p in pairs], [p.rejected for p in pairs]))
        )
        return LabelledBatch(**vars(own), labels=torch.tensor([pair.margin for pair in pairs]), mismatched=other)

    def preview(self, number: int, tokenizer: Tokenizer) -> dict[str, str]:
        label = "desirable" if self.unit(number).margin == DESIRABLE else "undesirable"
        return {**super().preview(number, tokenizer), "rejected": "", "label": label}

    def summary(self, name: str) -> list[str]:
        f, liked = self.facts, int((self._margins == DESIRABLE).sum())
        dropped = f", dropped {', '.join(f'{n:,} {why}' for why, n in f['dropped'].items())}" if f["dropped"] else ""
        line = (
            f"{name}: {f['pairs']:,} labelled completions ({f['form']}), {liked:,} of them desirable "
            f"({f['cut']:,} cut{dropped}; longest {f['longest']:,} tokens)"
        )
        return [line, *left_out(name, f["skipped"])]


@schema("data/labelled")
@dataclass
class LabelledData(Answers):
    """Answers with a label (desirable or not) from files, folders or the hub; a unit of the batch is an answer."""

    unit: ClassVar[str] = "labelled completions"
    columns_read: ClassVar[tuple[str, ...]] = KNOWN_LABELLED
    kind: ClassVar[type[Pairs]] = Labelled

    def encoded(self, source: Source, template: Template, length: int, dropped: dict[str, int]) -> Iterator[Pair]:
        """Every answer with the next one; repeated ones and those too long are counted in ``dropped``."""
        first: tuple[Encoded, float] | None = None
        held: tuple[Encoded, float] | None = None
        for found in self._answers(source, template, length, dropped):
            first = first or found
            if held is not None:
                yield self._beside(held, found[0], length)
            held = found
        if held is not None and first is not None:
            yield self._beside(held, first[0], length)

    def _answers(
        self, source: Source, template: Template, length: int, dropped: dict[str, int]
    ) -> Iterator[tuple[Encoded, float]]:
        seen: set[bytes] = set()
        for where, row in self.read(source, LABELLED):
            try:
                found = encode(row.chat, template)
            except TemplateError as error:
                source.reject(where, str(error))
                continue
            # Alone, it is a pair of itself with itself.
            pair = self.cut(Pair(found, found, answer_of(found)), length)
            digest = hashlib.blake2b(repr((found.ids, row.desirable)).encode(), digest_size=16).digest()
            why = "too long" if pair is None else "repeated" if digest in seen else None
            seen.add(digest)
            if why is not None:
                dropped[why] = dropped.get(why, 0) + 1
            elif pair is not None:
                yield pair.chosen, DESIRABLE if row.desirable else UNDESIRABLE

    def _beside(self, own: tuple[Encoded, float], following: Encoded, length: int) -> Pair:
        prompt = answer_of(own[0])
        assert own[0].trained is not None and following.trained is not None  # noqa: PT018
        ids, trained = following.ids[answer_of(following) :], following.trained[answer_of(following) :]
        # At least one id of the prompt stays: the first id of an answer is predicted from it.
        ids, trained = ids[: length - 1], trained[: length - 1]
        keep = slice(max(0, prompt + len(ids) - length), prompt)
        other = Encoded([*own[0].ids[keep], *ids], [*own[0].trained[keep], *trained])
        return Pair(own[0], other, 0, own[1])


def answer_of(found: Encoded) -> int:
    """The place of the first id that the assistant wrote."""
    assert found.trained is not None
    return list(found.trained).index(True)
