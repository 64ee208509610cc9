"""What a pipeline learns from: tensors with their shapes, where documents begin and end, and a weight."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, ClassVar, Self, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
ALIGNMENT = 16
"""Bytes that a tensor's place in a shared copy is a multiple of: those of the widest element, and of vector loads."""


def copy_to(device: torch.device, tensors: Sequence[Tensor]) -> list[Tensor]:
    """``tensors`` on ``device``. To CUDA those of the host go together, in one copy that nobody waits for.

    A copy from memory that is not pinned may wait until all that was launched before it has run.
    """
    hosts = [tensor for tensor in tensors if tensor.device.type == "cpu"]
    if device.type != "cuda" or not hosts:
        return [tensor.to(device) for tensor in tensors]
    arrived = iter(unpacked(packed(hosts, pin=True).to(device, non_blocking=True), hosts))
    return [next(arrived) if tensor.device.type == "cpu" else tensor for tensor in tensors]


def packed(tensors: Sequence[Tensor], *, pin: bool) -> Tensor:
    """The bytes of all ``tensors`` in one tensor of the host, which ``pin`` keeps from being swapped out."""
    memory = room_for(tensors, pin=pin)
    for view, tensor in zip(unpacked(memory, tensors), tensors, strict=True):
        view.copy_(tensor)
    return memory


def room_for(tensors: Sequence[Tensor], *, pin: bool) -> Tensor:
    """Memory of the host for the bytes of all ``tensors``, which ``pin`` keeps from being swapped out."""
    return torch.empty(_starts(tensors)[1], dtype=torch.uint8, pin_memory=pin)


def unpacked(memory: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """What `packed` laid into ``memory``: views with the shapes and formats of ``like``."""
    return [_view(memory, start, tensor) for start, tensor in zip(_starts(like)[0], like, strict=True)]


def _starts(tensors: Sequence[Tensor]) -> tuple[list[int], int]:
    """Where each tensor begins, and how many bytes there are."""
    ends = list(accumulate(-(-tensor.nbytes // ALIGNMENT) * ALIGNMENT for tensor in tensors))
    return [0, *ends[:-1]][: len(ends)], ends[-1] if ends else 0


def _view(memory: Tensor, start: int, like: Tensor) -> Tensor:
    return memory[start : start + like.nbytes].view(like.dtype).view(like.shape)


def on_device(value: T, device: torch.device) -> T:
    """A dataclass with every tensor in it, and in the dataclasses in it, on ``device``, but for its ``of_host`` fields."""
    return _rebuilt(value, device, iter(copy_to(device, list(_tensors(value)))))  # type: ignore[no-any-return]


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif dataclasses.is_dataclass(value):
        for name in _moving(value):
            yield from _tensors(getattr(value, name))


def _rebuilt(value: Any, device: torch.device, tensors: Iterator[Tensor]) -> Any:
    if isinstance(value, Tensor):
        return next(tensors)
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        return value.to(device) if hasattr(value, "to") else value
    fields = {name: _rebuilt(getattr(value, name), device, tensors) for name in _moving(value)}
    return dataclasses.replace(value, **fields)


def _moving(value: Any) -> list[str]:
    return [f.name for f in dataclasses.fields(value) if f.name not in getattr(value, "of_host", ())]


@dataclass(frozen=True)
class Documents:
    """Where the documents of a micro-batch begin and end, counted along its flattened tokens.

    Documents do not attend to each other, and positions restart at 0 in each. Padding is a document of its own.

    ``lengths``: tokens of each document, over all rows of the micro-batch; they sum to B * T. Known to the host.
    ``longest``: the largest of them. A field, because a compiled block reads it.
    ``offsets`` ``(D + 1,)``: int32, the first token of each, and the end (``cu_seqlens`` of varlen attention).
    ``positions`` ``(B, T)``: int64, the position of every token in its document.
    ``real`` ``(B, T)``: bool, which tokens are not padding; None = all.
    """

    lengths: tuple[int, ...]
    longest: int
    offsets: Tensor
    positions: Tensor
    real: Tensor | None = None

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
        return on_device(self, device)


@dataclass(frozen=True)
class Branches:
    """Which tokens of a single row ``(1, T)`` make up each of S sequences; a token may belong to several.

    Embeddings, projections and MLPs see every token once. Attention gathers each sequence whole, and needs no mask.

    ``sequences``: the U tokens of all sequences, laid end to end.
    ``index`` ``(U,)``: the place in the row of each of them.
    ``back`` ``(T,)``: the place among them of each token of the row.
    ``positions`` ``(1, T)``: the position of each token of the row in its sequence.
    ``real`` ``(1, T)``: bool, which tokens are not padding; None = all.
    """

    sequences: Documents
    index: Tensor
    back: Tensor
    positions: Tensor
    real: Tensor | None = None

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
        return on_device(self, device)


@dataclass
class Batch:
    """A micro-batch of one rank.

    ``rows`` ``(B,)`` int64: the number of every unit in the data set, the same on any number of ranks; -1 for one that only
    fills up a forward.
    """

    unit: ClassVar[str] = "units"
    """What ``rows`` numbers, in words."""

    of_host: ClassVar[tuple[str, ...]] = ("rows",)
    """Fields that stay on the host."""

    rows: Tensor

    def to(self, device: torch.device) -> Self:
        """Move every tensor, and everything that holds tensors, to a device; only ``rows`` is the host's."""
        return on_device(self, device)

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
    def tokens_by_row(self) -> tuple[int, ...] | None:
        """Tokens of each unit, where units of different lengths lie end to end in a single row; None where they do not."""
        return None

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

    Where a document continues the beginning of another one, all rows lie end to end in a single one ``(1, B * T)``.

    ``targets`` ``(B, T)``: int64, the token that follows each.
    ``mask`` ``(B, T)``: float32, 1 where the target counts, 0 for context and padding.
    ``places`` ``(n,)``: int64, the flattened positions with a mask, where somebody counted them; None where nobody did.
    """

    unit: ClassVar[str] = "packed rows"

    targets: Tensor
    mask: Tensor
    places: Tensor | None = None

    @property
    def weight(self) -> Tensor:
        """Loss tokens, a float64 scalar (float32 would miscount above 2**24)."""
        return self.mask.sum(dtype=torch.float64)
