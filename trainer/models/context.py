"""What tokens see of those before them: their documents, or a cache; alone on a rank or divided among several."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from trainer.batch import Branches, Documents
from trainer.functional import VocabularyPart
from trainer.models.attention import Scores, attend
from trainer.models.delta import DeltaInputs, Pass, recur_packed
from trainer.parallel.mesh import UNDIVIDED, Axis, Mesh


class Context(Protocol):
    """What tokens see of those before them: their documents, or a cache."""

    @property
    def positions(self) -> Tensor: ...

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scores: Scores) -> Tensor: ...

    def recur(self, layer: int, passed: Pass, inputs: DeltaInputs) -> Tensor: ...


@dataclass(frozen=True)
class PackedContext:
    """The documents that tokens are packed in."""

    documents: Documents | Branches

    @property
    def positions(self) -> Tensor:
        return self.documents.positions

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scores: Scores) -> Tensor:
        return attend(q, k, v, self.documents, scores)

    def recur(self, layer: int, passed: Pass, inputs: DeltaInputs) -> Tensor:
        return recur_packed(self.documents, passed, inputs)


@dataclass(frozen=True)
class DividedContext:
    """Packed documents whose tokens are divided among ranks (Ulysses; Jacobs et al. 2023, arXiv:2309.14509).

    A rank has consecutive ones of the flattened micro-batch ``(B, T)``, as ``(1, n)``; the last rank's may be followed by
    spare ones, so that all have equally many. For attention the ranks exchange them for all tokens of some of the heads.

    Args:
        packed: The documents, of all tokens.
        shape: Of the micro-batch.
        axis: The ranks.
    """

    packed: PackedContext
    shape: tuple[int, int]
    axis: Axis

    @property
    def total(self) -> int:
        """Tokens of the micro-batch."""
        return math.prod(self.shape)

    @property
    def spare(self) -> int:
        """Tokens that the last ranks have more than there are."""
        return -self.total % self.axis.size

    @property
    def span(self) -> tuple[int, int]:
        """(first, last) token of this rank, spare ones included."""
        each = (self.total + self.spare) // self.axis.size
        return each * self.axis.rank, each * (self.axis.rank + 1)

    @property
    def positions(self) -> Tensor:
        return self.own(self.packed.positions)

    @property
    def real(self) -> Tensor | None:
        """``(1, n)``: which of this rank's tokens are neither padding nor spare; None = all."""
        real = self.packed.documents.real
        if real is None and self.spare:
            real = torch.ones(self.shape, dtype=torch.bool, device=self.packed.positions.device)
        return None if real is None else self.own(real)

    def times_read(self, places: Tensor) -> Tensor:
        """``(1, n)``: how often each of this rank's tokens is read at ``places`` of the micro-batch; padding never is."""
        times = torch.zeros(self.total, device=places.device).index_add_(0, places, torch.ones_like(places).float())
        real = self.packed.documents.real
        times = times if real is None else times * real.flatten()
        return self.own(times.view(self.shape))

    def own(self, x: Tensor) -> Tensor:
        """This rank's part ``(1, n, ...)`` of ``x`` ``(B, T, ...)``; spare tokens are zeros."""
        return self._padded(x.reshape(1, self.total, *x.shape[2:]))[:, slice(*self.span)]

    def joined(self, x: Tensor) -> Tensor:
        """``(B, T, ...)`` of every rank's part ``(1, n, ...)``; each rank has a part of its gradient."""
        return self.axis.gather(x, 1)[:, : self.total].reshape(*self.shape, *x.shape[2:])

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scores: Scores) -> Tensor:
        size, heads = self.axis.size, q.shape[2]
        if (copies := math.lcm(size, k.shape[2]) // k.shape[2]) > 1:
            # Key heads that do not divide: autograd adds up the gradients of the copies.
            k, v = (t.repeat_interleave(copies, 2) for t in (k, v))
        # Behind each other what a rank gets of all three, so that one exchange carries them.
        parts = [t.view(*t.shape[:2], size, -1, t.shape[3]) for t in (q, k, v)]
        swapped = self.axis.swap(torch.cat(parts, 3).flatten(2, 3), 2, 1)[:, : self.total]
        own = torch.split(swapped, [part.shape[3] for part in parts], 2)
        q, k, v = (t.reshape(*self.shape, *t.shape[2:]) for t in own)
        if scores.sinks is not None:
            scores = scores._replace(sinks=scores.sinks[slice(*self.axis.span(heads))])
        out = self.packed.attend(layer, q, k, v, scores)
        return self.axis.swap(self._padded(out.reshape(1, self.total, *out.shape[2:])), 1, 2)

    def recur(self, layer: int, passed: Pass, inputs: DeltaInputs) -> Tensor:
        """Every rank passes on all tokens, and keeps what its own give: that adds up to each input's gradient once."""
        return self.own(self.packed.recur(layer, passed, DeltaInputs(*(self.joined(t) for t in inputs))))

    def _padded(self, x: Tensor) -> Tensor:
        """``x`` ``(1, total, ...)`` with the spare tokens."""
        return F.pad(x, (0, 0) * (x.dim() - 2) + (0, self.spare)) if self.spare else x


def vocabulary_part(rows: int, mesh: Mesh, *, joined: bool) -> VocabularyPart | None:
    """Which of the ``rows`` of the vocabulary this rank reads; None = all.

    ``joined``: of hidden states that the ranks of ``mesh.sequence`` have joined, and read different parts of. Otherwise
    each of these has hidden states by itself, and only those of ``mesh.tensor`` divide the rows.
    """
    axis = mesh.vocabulary if joined else mesh.tensor
    if axis.size == 1:
        return None
    of_tensor = [mesh.tensor.span(rows, rank) for rank in range(mesh.tensor.size)]
    readers = mesh.sequence if joined else UNDIVIDED
    spans = []
    for number in range(readers.size):
        for first, last in of_tensor:
            begin, end = readers.span(last - first, number)
            spans.append((first + begin, first + end))
    return VocabularyPart(tuple(spans), axis.rank, axis)
