"""What preference losses are functions of: log-probabilities of answers, under a policy and a reference."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, Self

import torch
from torch import Tensor

from trainer.data.pairs import AnswerBatch
from trainer.functional import logprobs_at
from trainer.parallel import distributed

MOVED = "moved"


class Read(NamedTuple):
    """Of a micro-batch's A answers: summed log-probabilities and tokens, each ``(A,)``, and entropies of tokens ``(N,)``."""

    sums: Tensor
    counts: Tensor
    entropy: Tensor


class Reads(Protocol):
    """Summed log-probabilities ``(A,)`` of a micro-batch's answers."""

    def __call__(self, batch: AnswerBatch) -> Tensor: ...


class Figure(NamedTuple):
    """A metric: the mean of ``values`` weighted by ``weights``, each ``(B,)``."""

    values: Tensor
    weights: Tensor


class Answers(Protocol):
    """What a loss reads."""

    @classmethod
    def known(cls, policy: Reads, reference: Reads, batches: Iterable[Any]) -> dict[str, Tensor]:
        """What a loss needs to know of all micro-batches of a step, on all ranks, before the first of them. Collective."""
        ...

    @classmethod
    def of(cls, batch: Any, policy: Read, reference: Tensor, known: Mapping[str, Tensor]) -> Self: ...

    @property
    def liked(self) -> Tensor:
        """Mean log-probability of a token of what is to become likelier, ``(B,)``; 0 elsewhere."""
        ...

    def margins(self, beta: float, *, referenced: bool) -> Tensor:
        """How far a unit is on the right side, ``(B,)``: above 0 it is right."""
        ...

    def figures(self, beta: float, *, referenced: bool) -> dict[str, Figure]:
        """Metrics by name."""
        ...


@dataclass(frozen=True)
class PairAnswers:
    """Log-probabilities of B pairs in nats, each ``(B,)``: summed over an answer's tokens, and a token's mean.

    ``ratio_*``: the sum less that of the reference; ``mean_ratio_*``: the mean less the reference's.
    """

    chosen: Tensor
    rejected: Tensor
    mean_chosen: Tensor
    mean_rejected: Tensor
    ratio_chosen: Tensor
    ratio_rejected: Tensor
    mean_ratio_chosen: Tensor
    mean_ratio_rejected: Tensor

    @classmethod
    def known(cls, policy: Reads, reference: Reads, batches: Iterable[Any]) -> dict[str, Tensor]:
        """Nothing: a pair's loss is its own."""
        return {}

    @classmethod
    def of(cls, batch: Any, policy: Read, reference: Tensor, known: Mapping[str, Tensor]) -> PairAnswers:
        """From answers in the order of a `PairBatch`."""
        ratio, count = policy.sums - reference, policy.counts.clamp(min=1)
        table = (policy.sums, policy.sums / count, ratio, ratio / count)
        return cls(*(side for values in table for side in values.view(-1, 2).unbind(1)))

    @property
    def liked(self) -> Tensor:
        return self.mean_chosen

    def margins(self, beta: float, *, referenced: bool) -> Tensor:
        chosen, rejected = self._rewards(beta, referenced=referenced)
        return chosen - rejected

    def figures(self, beta: float, *, referenced: bool) -> dict[str, Figure]:
        """Implicit rewards, and how often the chosen answer's is the larger; an equal one counts as wrong."""
        (chosen, rejected), ones = self._rewards(beta, referenced=referenced), torch.ones_like(self.chosen)
        columns = {
            "rewards/chosen": chosen, "rewards/rejected": rejected, "rewards/margin": chosen - rejected,
            "rewards/accuracy": (chosen > rejected).float(), "logps/chosen": self.chosen, "logps/rejected": self.rejected,
            "logps/accuracy": (self.chosen > self.rejected).float(),
        }  # fmt: skip
        return {name: Figure(column.detach(), ones) for name, column in columns.items()}

    def _rewards(self, beta: float, *, referenced: bool) -> tuple[Tensor, Tensor]:
        sides = (self.ratio_chosen, self.ratio_rejected) if referenced else (self.mean_chosen, self.mean_rejected)
        return beta * sides[0].detach(), beta * sides[1].detach()


@dataclass(frozen=True)
class LabelledAnswers:
    """Log-probabilities of B labelled answers in nats, each ``(B,)``.

    ``ratio``: the sum over the answer less that of the reference. ``labels``: 1 where it is desirable, else -1. ``moved``
    (KTO's z0): how far the policy has moved from the reference on mismatched answers, over the whole step; 0 at least.
    """

    sums: Tensor
    mean: Tensor
    ratio: Tensor
    labels: Tensor
    moved: Tensor

    @classmethod
    def known(cls, policy: Reads, reference: Reads, batches: Iterable[Any]) -> dict[str, Tensor]:
        """The mean log-ratio of mismatched answers over all micro-batches and ranks (docs/algorithms.md#kto)."""
        total: Tensor | None = None
        for batch in batches:
            other = batch.mismatched
            ratio = (policy(other) - reference(other)).double() * other.unit_mask
            part = torch.stack([ratio.sum(), other.weight])
            total = part if total is None else total + part
        assert total is not None
        ratio, weight = distributed.all_sum(total).unbind()
        return {MOVED: (ratio / weight.clamp(min=1)).clamp(min=0).float()}

    @classmethod
    def of(cls, batch: Any, policy: Read, reference: Tensor, known: Mapping[str, Tensor]) -> LabelledAnswers:
        """From answers in the order of a `LabelledBatch`."""
        mean = policy.sums / policy.counts.clamp(min=1)
        return cls(policy.sums, mean, policy.sums - reference, batch.labels, known[MOVED])

    @property
    def liked(self) -> Tensor:
        return self.mean * (self.labels > 0)

    def margins(self, beta: float, *, referenced: bool) -> Tensor:
        return beta * (self.labels * (self.ratio - self.moved)).detach()

    def figures(self, beta: float, *, referenced: bool) -> dict[str, Figure]:
        """Implicit rewards of both kinds, and how often an answer lies on its own side of ``moved``."""
        ones, liked = torch.ones_like(self.ratio), (self.labels > 0).float()
        margins, rewards = self.margins(beta, referenced=referenced), beta * self.ratio.detach()
        return {
            "rewards/chosen": Figure(rewards, liked), "rewards/rejected": Figure(rewards, 1 - liked),
            "rewards/margin": Figure(margins, ones), "rewards/accuracy": Figure((margins > 0).float(), ones),
            "logps/chosen": Figure(self.sums.detach(), liked), "logps/rejected": Figure(self.sums.detach(), 1 - liked),
            "kl": Figure(self.moved * ones, ones),
        }  # fmt: skip


def read_answers(model: Any, batch: AnswerBatch) -> Read:
    """Log-probabilities of a micro-batch's answers under a model."""
    values, entropy = model(batch.tokens, batch.documents, logprobs_at(batch.logit_index, batch.targets))
    sums = values.new_zeros(len(batch.final_index)).index_add(0, batch.sequence_id, values)
    counts = torch.zeros_like(sums).index_add(0, batch.sequence_id, torch.ones_like(values))
    return Read(sums, counts.detach(), entropy)
