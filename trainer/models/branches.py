"""Sequences that begin alike, computed once where they do: what tokens of a row attend to when sequences share them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.batch import Documents
from trainer.models.attention import attend


@dataclass(frozen=True)
class Branches:
    """Which tokens of a single row ``(1, T)`` make up each of S sequences; a token may belong to several.

    Embeddings, projections and MLPs see every token once. Attention gathers each sequence whole, and needs no mask.

    ``whole``: the sequences laid end to end. ``index`` ``(U,)``: the place in the row of each of their tokens. ``back``
    ``(T,)``: where each token of the row is found among them. ``positions`` ``(1, T)``: in its sequence.
    """

    whole: Documents
    index: Tensor
    back: Tensor
    positions: Tensor

    @classmethod
    def of(cls, sequences: Sequence[Sequence[int]], tokens: int) -> Branches:
        """``sequences``: the places in the row of each sequence's tokens; together they are all ``tokens`` places."""
        index = torch.tensor([place for sequence in sequences for place in sequence])
        order = torch.cat([torch.arange(len(sequence)) for sequence in sequences])
        # From the end, so that of several occurrences the first one stays.
        back, positions = torch.empty(tokens, dtype=torch.int64), torch.empty(tokens, dtype=torch.int64)
        back[index.flip(0)] = torch.arange(len(index)).flip(0)
        positions[index] = order
        return cls(Documents.from_lengths([len(s) for s in sequences], 1), index, back, positions[None])

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of every sequence."""
        return self.whole.lengths

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int | None, scale: float) -> Tensor:
        """As `attention.attend`, inside each sequence."""
        q, k, v = (t[:, self.index] for t in (q, k, v))
        return attend(q, k, v, self.whole, window=window, scale=scale)[:, self.back]

    def to(self, device: torch.device) -> Branches:
        moved = (t.to(device, non_blocking=True) for t in (self.index, self.back, self.positions))
        return Branches(self.whole.to(device), *moved)
