"""Which part of a logical tensor is this rank's: a block along the axes of the mesh, and of the block some rows."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from trainer.parallel.boxes import Box
from trainer.parallel.mesh import UNDIVIDED, Axis, Mesh

STACK = 3
"""Dimensions of a stack of matrices."""


@dataclass(frozen=True)
class Cut:
    """How a parameter is divided.

    Args:
        shape: Of the logical tensor.
        along: (dimension, axis) for every axis that divides it into blocks.
        shards: Ranks that have rows of this rank's block; None = those of the mesh that a module is placed on.
        copies: Ranks that have the same rows of the same block.
    """

    shape: tuple[int, ...]
    along: tuple[tuple[int, Axis], ...] = ()
    shards: Axis | None = None
    copies: Axis = UNDIVIDED

    @property
    def box(self) -> Box:
        """The block: what of the logical tensor this rank and those of ``shards`` have together."""
        spans = [(0, size) for size in self.shape] or [(0, 1)]
        for dim, axis in self.along:
            spans[dim] = axis.span(self.shape[dim])
        return tuple(spans)

    @property
    def block(self) -> tuple[int, ...]:
        """The block's shape."""
        return tuple(last - first for first, last in self.box[: len(self.shape)])

    @property
    def dim(self) -> int:
        """The dimension whose rows ``shards`` divide: the second of a stack of fewer matrices than ranks, if it is even."""
        assert self.shards is not None
        block, ranks = self.block, self.shards.size
        return int(len(block) == STACK and block[0] < ranks and block[1] % ranks == 0)

    @property
    def rows(self) -> tuple[int, int]:
        """(first, last) row of the block that is this rank's: equal parts, the last of which may lack some."""
        assert self.shards is not None
        return _part(self.block[self.dim], self.shards, self.shards.rank)

    @property
    def interval(self) -> tuple[Box, int]:
        """The box in which this rank's elements follow each other, and the first one's place in it."""
        first, last = self.rows
        if self.dim == 0:
            return self.box, first * torch.Size(self.block[1:]).numel()
        matrices, (top, _), *inner = self.box
        return (matrices, (top + first, top + last), *inner), 0

    @property
    def of_matrices(self) -> Cut:
        """The cut of the matrix that this rank has a part of; of a stack without the axes whose ranks have other matrices."""
        outer = len(self.shape) - 2
        along = tuple((dim, axis) for dim, axis in self.along if dim >= outer)
        return replace(self, shape=(*self.block[:outer], *self.shape[outer:]), along=along)

    def own(self, values: Tensor, stacked: int = 0) -> Tensor:
        """This rank's rows of the logical tensor's ``values``, a view.

        ``stacked``: dimensions in front of the tensor's: of many tensors that are cut alike.
        """
        block = values[(*(slice(None),) * stacked, *(slice(*span) for span in self.box))]
        first, last = self.rows
        return block.narrow(stacked + self.dim, first, last - first)

    def joined(self, own: Tensor, stacked: int = 0) -> Tensor:
        """The logical tensor, of which every rank has its rows; collective. ``stacked``: as for `own`."""
        assert self.shards is not None
        rows = self.block[self.dim]
        parts = (_part(rows, self.shards, rank) for rank in range(self.shards.size))
        values = _joined(own, stacked + self.dim, self.shards, parts)
        for dim, axis in reversed(self.along):
            parts = (axis.span(self.shape[dim], rank) for rank in range(axis.size))
            values = _joined(values, stacked + dim, axis, parts)
        return values.contiguous()

    def on(self, mesh: Mesh) -> Cut:
        """This cut of a module that is placed on ``mesh``."""
        divided = any(axis is mesh.tensor for _, axis in self.along)
        copies = UNDIVIDED if divided else mesh.tensor
        if self.copies is not UNDIVIDED:
            copies = self.copies
        return Cut(self.shape, self.along, mesh.shards if self.shards is None else self.shards, copies)


def _part(count: int, shards: Axis, rank: int) -> tuple[int, int]:
    each = -(-count // shards.size)
    return min(each * rank, count), min(each * (rank + 1), count)


def _joined(own: Tensor, dim: int, axis: Axis, spans: Iterable[tuple[int, int]]) -> Tensor:
    """The ranks' parts, their ``spans`` along ``dim``, end to end."""
    sizes = [last - first for first, last in spans]
    rows = own.movedim(dim, 0)
    padded = rows.new_zeros(max(sizes), *rows.shape[1:])
    padded[: len(rows)].copy_(rows)
    parts = zip(axis.stack(padded), sizes, strict=True)
    return torch.cat([part[:size] for part, size in parts]).movedim(0, dim)


def cut(module: nn.Module, name: str, dim: int, axis: Axis, shards: Axis | None = None) -> None:
    """Leave this rank's block along ``dim`` of a module's parameter, which has no values yet, and note it in ``cuts``.

    A module in the parameter's place does so with its own. ``shards``: ranks that are to have rows of the block, where they
    are not those of other weights.
    """
    if isinstance(instead := getattr(module, name), nn.Module):
        instead.cut(dim, axis, shards)  # type: ignore[operator]
        return
    parameter = module.get_parameter(name)
    before = cuts(module).get(name, Cut(tuple(parameter.shape)))
    after = replace(before, along=(*before.along, (dim, axis)), shards=before.shards if shards is None else shards)
    block = parameter.detach().new_empty(after.block)
    setattr(module, name, nn.Parameter(block, requires_grad=parameter.requires_grad))
    module.cuts = {**cuts(module), name: after}  # type: ignore[assignment]


def cuts(module: nn.Module) -> dict[str, Cut]:
    """The cuts of a module's own parameters by name; what is not among them is undivided."""
    return getattr(module, "cuts", {})


def cuts_of(model: nn.Module, mesh: Mesh) -> dict[str, Cut]:
    """The cut of every parameter of a model, by its name."""
    noted = {
        f"{prefix}.{name}" if prefix else name: cut
        for prefix, module in model.named_modules()
        for name, cut in cuts(module).items()
    }
    return {name: noted.get(name, Cut(tuple(p.shape))).on(mesh) for name, p in model.named_parameters()}
