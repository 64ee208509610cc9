"""What a pipeline learns from: tensors with their shapes, where documents begin and end, and a weight."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor


@dataclass(frozen=True)
class Documents:
    """Where the documents of a micro-batch begin and end, counted along its flattened tokens.

    Documents do not attend to each other, and positions restart at 0 in each. Padding is a document of its own.

    ``lengths``: tokens of each document, over all rows of the micro-batch; they sum to B * T. Known to the host.
    ``longest``: the largest of them. A field, because a compiled block reads it.
    ``offsets`` ``(D + 1,)``: int32, the first token of each, and the end (``cu_seqlens`` of varlen attention).
    ``positions`` ``(B, T)``: int64, the position of every token in its document.
    """

    lengths: tuple[int, ...]
    longest: int
    offsets: Tensor
    positions: Tensor

    @classmethod
    def from_lengths(cls, lengths: list[int] | tuple[int, ...], rows: int) -> Documents:
        """Lay documents of ``lengths`` tokens end to end over ``rows`` rows of equal length."""
        counts = torch.tensor(lengths, dtype=torch.int64)
        ends = counts.cumsum(0)
        offsets = torch.cat([torch.zeros(1, dtype=torch.int64), ends])
        total = int(offsets[-1])
        positions = torch.arange(total) - torch.repeat_interleave(offsets[:-1], counts)
        counted = tuple(int(n) for n in lengths)
        return cls(counted, max(counted, default=0), offsets.to(torch.int32), positions.view(rows, -1))

    def to(self, device: torch.device) -> Documents:
        offsets, positions = (t.to(device, non_blocking=True) for t in (self.offsets, self.positions))
        return replace(self, offsets=offsets, positions=positions)


@dataclass(frozen=True)
class Branches:
    """Which tokens of a single row ``(1, T)`` make up each of S sequences; a token may belong to several.

    Embeddings, projections and MLPs see every token once. Attention gathers each sequence whole, and needs no mask.

    ``sequences``: the U tokens of all sequences, laid end to end.
    ``index`` ``(U,)``: the place in the row of each of them.
    ``back`` ``(T,)``: the place among them of each token of the row.
    ``positions`` ``(1, T)``: the position of each token of the row in its sequence.
    """

    sequences: Documents
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
        return self.sequences.lengths

    def to(self, device: torch.device) -> Branches:
        moved = (t.to(device, non_blocking=True) for t in (self.index, self.back, self.positions))
        return Branches(self.sequences.to(device), *moved)


@dataclass
class Batch:
    """A micro-batch of one rank.

    ``rows`` ``(B,)`` int64: the number of every unit in the data set, the same on any number of ranks; -1 for one that only
    fills up a forward.
    """

    unit: ClassVar[str] = "units"
    """What ``rows`` numbers, in words."""

    rows: Tensor

    def to(self, device: torch.device) -> Self:
        """Move every tensor, and everything that holds tensors, to a device; only ``rows`` is the host's."""
        moved = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor) and field.name != "rows":
                value = value.to(device, non_blocking=True)
            elif not isinstance(value, Tensor) and hasattr(value, "to"):
                value = value.to(device)
            moved[field.name] = value
        return type(self)(**moved)

    @property
    def weight(self) -> Tensor:
        """The units that the loss is a sum of (loss tokens, pairs or sequences), a float64 scalar."""
        raise NotImplementedError(f"{type(self).__name__} does not say what its loss is a sum of")

    @property
    def seen(self) -> Tensor:
        """Real tokens of this micro-batch, padding aside: what tokens per second counts."""
        raise NotImplementedError(f"{type(self).__name__} does not count its tokens")

    @property
    def attention_pairs(self) -> int:
        """(query, key) pairs that attention looks at, known to the host."""
        raise NotImplementedError(f"{type(self).__name__} does not count what it attends to")

    @property
    def texts(self) -> list[dict[str, Any]]:
        """Texts to show with the step that learns from it, as rows of ``samples.jsonl``."""
        return []


@dataclass
class TokenBatch(Batch):
    """Rows of tokens that a model reads.

    ``tokens`` ``(B, T)``: int64 ids.
    ``documents``: which of them attend to which.
    ``real``: tokens that are not padding, a float64 scalar.
    """

    tokens: Tensor
    documents: Documents | Branches
    real: Tensor

    @property
    def seen(self) -> Tensor:
        return self.real

    @property
    def attention_pairs(self) -> int:
        return sum(n * (n + 1) // 2 for n in self.documents.lengths)


@dataclass
class PackedRows(TokenBatch):
    """Documents packed into rows of equal length; every position is an (input, next token) pair.

    ``targets`` ``(B, T)``: int64, the token that follows each.
    ``mask`` ``(B, T)``: float32, 1 where the target counts, 0 for context and padding.
    """

    unit: ClassVar[str] = "packed rows"

    documents: Documents
    targets: Tensor
    mask: Tensor

    @property
    def weight(self) -> Tensor:
        """Loss tokens, a float64 scalar (float32 would miscount above 2**24)."""
        return self.mask.sum(dtype=torch.float64)
