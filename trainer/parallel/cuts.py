"""Which part of a logical tensor is this rank's: a block along the axes of the mesh, and of the block some rows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trainer.parallel.boxes import Box
from trainer.parallel.mesh import UNDIVIDED, Axis, Mesh


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
    def rows(self) -> tuple[int, int]:
        """(first, last) row of the block that is this rank's: equal parts, the last of which may lack some."""
        assert self.shards is not None
        count = self.block[0]
        each = -(-count // self.shards.size)
        first = each * self.shards.rank
        return min(first, count), min(first + each, count)

    @property
    def start(self) -> int:
        """The place of the first of its rows' elements in the flattened block."""
        return self.rows[0] * torch.Size(self.block[1:]).numel()

    def own(self, values: Tensor) -> Tensor:
        """This rank's rows of the logical tensor's ``values``, a view."""
        block = values[tuple(slice(*span) for span in self.box)]
        first, last = self.rows
        return block[first:last]

    def joined(self, own: Tensor) -> Tensor:
        """The logical tensor, of which every rank has its rows; collective."""
        assert self.shards is not None
        count, *rest = self.block
        padded = own.new_zeros(-(-count // self.shards.size), *rest)
        padded[: len(own)].copy_(own)
        values = self.shards.stack(padded).flatten(0, 1)[:count]
        for dim, axis in reversed(self.along):
            sizes = [last - first for first, last in (axis.span(self.shape[dim], rank) for rank in range(axis.size))]
            values = values.movedim(dim, 0)
            padded = values.new_zeros(max(sizes), *values.shape[1:])
            padded[: len(values)].copy_(values)
            parts = axis.stack(padded)
            values = torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)]).movedim(0, dim)
        return values

    def on(self, mesh: Mesh) -> Cut:
        """This cut of a module that is placed on ``mesh``."""
        divided = any(axis is mesh.tensor for _, axis in self.along)
        copies = UNDIVIDED if divided else mesh.tensor
        return Cut(self.shape, self.along, mesh.shards if self.shards is None else self.shards, copies)


def cut(module: nn.Module, name: str, dim: int, axis: Axis, shards: Axis | None = None) -> None:
    """Leave this rank's block along ``dim`` of a module's parameter, which has no values yet, and note it in ``cuts``.

    ``shards``: ranks that are to have rows of the block, where they are not those of other weights.
    """
    parameter = module.get_parameter(name)
    before = cuts(module).get(name, Cut(tuple(parameter.shape)))
    after = Cut(before.shape, (*before.along, (dim, axis)), before.shards if shards is None else shards)
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
