"""A vocabulary that several ranks have parts of: what they exchange of a block of tokens, in one go."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from trainer.functional.chunks import blocks


class Across(Protocol):
    """The ranks that a vocabulary is divided among."""

    def stack(self, x: Tensor, /) -> Tensor:
        """``x`` of every rank, ``(ranks, *x.shape)``."""
        ...


class Softmax(NamedTuple):
    """Of n tokens over all of the vocabulary, ``(n,)`` each, float32 and bitwise the same on all ranks.

    top: the largest logit
    total: the sum of exp(logit - top)
    chosen: the logit of the target
    parts: what each part gave, ``(ranks, n)`` each
    share: what exp(logit - own largest logit) of a part is to be multiplied by, ``(ranks, n)``
    """

    top: Tensor
    total: Tensor
    chosen: Tensor
    parts: tuple[Tensor, ...]
    share: Tensor


@dataclass(frozen=True)
class VocabularyPart:
    """Which rows of the vocabulary a head's weight is.

    Args:
        spans: (first row, the one behind the last) of every rank, in the order that ``across`` stacks them in.
        rank: Whose of them this rank has.
        across: The ranks that have all of the vocabulary together.
    """

    spans: tuple[tuple[int, int], ...]
    rank: int
    across: Across

    @property
    def span(self) -> tuple[int, int]:
        """The rows of this rank."""
        return self.spans[self.rank]

    @property
    def size(self) -> int:
        """Rows of the vocabulary."""
        return max(last for _, last in self.spans)

    @property
    def largest(self) -> int:
        """Rows of the largest part: by it blocks are cut, so that all ranks exchange equally often."""
        return max(last - first for first, last in self.spans)

    def places(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """The row of this part that each id is, the nearest one where it is another's; and whether it is here."""
        first, last = self.span
        return (ids - first).clamp(0, last - first - 1), (ids >= first) & (ids < last)

    def softmax(self, top: Tensor, total: Tensor, chosen: Tensor, *extra: Tensor) -> Softmax:
        """Of all ranks' parts, given those of this one: its largest logit, its sum of exp(logit - that), its chosen logits.

        All are float32 ``(n,)``; ``chosen`` is 0 where the target is another's.
        """
        parts = self.across.stack(torch.stack([top, total, chosen, *extra])).unbind(1)
        tops, totals, every = parts[:3]
        highest = tops.amax(0)
        share = (tops - highest).exp()
        return Softmax(highest, (totals * share).sum(0), every.sum(0), parts, share)

    def joined(self, logits: Tensor) -> Tensor:
        """Logits ``(..., V)`` of those that every rank has of its part, without a gradient; bitwise the same on all."""
        first, last = self.span
        padded = logits.new_zeros(*logits.shape[:-1], self.largest)
        padded[..., : last - first] = logits.detach()
        every = self.across.stack(padded)
        parts = sorted(zip(self.spans, every, strict=True), key=lambda part: part[0])
        return torch.cat([part[..., : last - first] for (first, last), part in parts], -1)

    def likeliest(self, scores: Tensor) -> Tensor:
        """The id ``(n,)`` of the largest logit, the first of equal ones, given this rank's logits ``(n, own rows)``."""
        top, place = scores.max(1)
        tops, ids = self.across.stack(torch.stack([top.double(), (place + self.span[0]).double()])).unbind(1)
        return torch.where(tops == tops.amax(0), ids, float(self.size)).amin(0).long()


def part_of_gradient(
    scores: Tensor, ids: Tensor, scale: Tensor, z: float, s: float, part: VocabularyPart
) -> tuple[Tensor, Tensor, Tensor]:
    """As `eager_gradient`, of this rank's logits ``(n, own rows)`` alone; ``ids`` ``(n,)`` are of all the vocabulary."""
    target, here = part.places(ids)
    lse, chosen, mean = (torch.empty_like(scale) for _ in range(3))
    even = scale * (-s / part.size)
    for rows in blocks(len(scores), scores.T, part.largest):
        own = scores[rows]
        probabilities = torch.softmax(own, 1, dtype=torch.float32)
        top, place = own.max(1)
        # The largest probability is that of exp(0).
        total = 1 / probabilities.gather(1, place[:, None]).squeeze(1)
        at_target = own.gather(1, target[rows, None]).squeeze(1).float()
        sums = (own.sum(1, dtype=torch.float32),) if s else ()
        every = part.softmax(top.float(), total, torch.where(here[rows], at_target, 0.0), *sums)
        lse[rows], chosen[rows] = every.total.log() + every.top, every.chosen
        mean[rows] = every.parts[-1].sum(0) / part.size if s else every.chosen
        factor = (1 + 2 * z * lse[rows]) * scale[rows] * (total * every.share[part.rank] / every.total)
        torch.addcmul(even[rows, None], probabilities, factor[:, None], out=own)
        del probabilities  # or two blocks' would meet
    # From float32: near 1 the difference of p and 1 is lost to a shorter format.
    at_target = (((chosen - lse).exp() * (1 + 2 * z * lse) - (1 - s)) * scale + even).to(scores.dtype)
    target = target[:, None]
    scores.scatter_(1, target, torch.where(here, at_target, scores.gather(1, target).squeeze(1))[:, None])
    return lse, chosen, mean
