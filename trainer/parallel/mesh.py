"""The dimensions along which the ranks of a replica divide its work, and what they exchange along each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from trainer.parallel import distributed
from trainer.parallel.distributed import Json, Ranks


@dataclass(frozen=True)
class MeshShape:
    """How many ranks divide what of a replica: its layers, rows of tokens, matrices; and, among replicas, its experts.

    Ranks are laid out data x pipeline x sequence x tensor: those of ``tensor``, which exchange most, are neighbours.
    """

    pipeline: int = 1
    sequence: int = 1
    tensor: int = 1
    expert: int = 1

    @property
    def replica(self) -> int:
        """Ranks that read the same data."""
        return self.pipeline * self.sequence * self.tensor

    @property
    def axes(self) -> dict[str, int]:
        """The sizes that are more than 1, by the name of their setting."""
        sizes = {"tensor": self.tensor, "sequence": self.sequence, "expert": self.expert, "pipeline": self.pipeline}
        return {name: size for name, size in sizes.items() if size > 1}


def lacks(shape: MeshShape, ranks: int) -> str | None:
    """Why so many ranks cannot be laid out in a shape, and how many can; None where they can."""
    given = " ".join(f"strategy.{name}={size}" for name, size in shape.axes.items())
    if ranks % shape.replica:
        below = ranks // shape.replica * shape.replica
        near = f"{below} or {below + shape.replica}" if below else f"{shape.replica}"
        return f"{given} divides a model among {shape.replica} ranks, and {ranks} are not a multiple; start {near}"
    if (readers := ranks // shape.replica * shape.sequence) % shape.expert:
        return f"{given} needs a multiple of {shape.expert} ranks with other tokens, and there are {readers}; use fewer"
    return None


def run_on_leaders(action: Callable[[], Json]) -> Json:
    """Run ``action`` on the rank that leads each replica, and give its result to all ranks of the replica.

    Raises:
        InputError, RunError, RankError: as `run_on_all_ranks`, if it failed on one; where each rank leads, what it raised.
    """
    world = distributed.world()
    if world.replica == 1:
        return action()
    every = distributed.run_on_all_ranks(lambda: action() if world.leads else None)
    return every[world.rank - world.rank % world.replica]  # type: ignore[return-value]


@dataclass(frozen=True)
class Axis(Ranks):
    """Ranks that divide something among them. Of size 1 every exchange gives its argument back.

    Args:
        group: What carries their exchanges; None where there is one rank.
        members: Their numbers among all ranks.
    """

    group: dist.ProcessGroup | None = None
    members: tuple[int, ...] = (0,)

    def span(self, count: int, rank: int | None = None) -> tuple[int, int]:
        """(first, last) of ``count`` things that a rank, else this one, has: parts that differ by one at most."""
        rank = self.rank if rank is None else rank
        return count * rank // self.size, count * (rank + 1) // self.size

    def enter(self, x: Tensor) -> Tensor:
        """``x`` in front of what each rank computes a part of: the gradient is summed over the axis."""
        return x if self.size == 1 else _Entered.apply(x, self)  # type: ignore[no-untyped-call]

    def leave(self, x: Tensor) -> Tensor:
        """The sum of ``x`` over the axis, behind what each rank has computed a part of; every rank has its gradient."""
        return x if self.size == 1 else _Left.apply(x, self)  # type: ignore[no-untyped-call]

    def even(self, x: Tensor) -> Tensor:
        """``x`` in front of what all ranks compute alike, where gradients are summed over the axis later: a part of each."""
        return x if self.size == 1 else _Evened.apply(x, self.size)  # type: ignore[no-untyped-call]

    def gather(self, x: Tensor, dim: int) -> Tensor:
        """The ranks' equal parts ``x`` joined along a dimension; the gradient is summed over the axis, and a part of it."""
        return x if self.size == 1 else _Gathered.apply(x, dim, self)  # type: ignore[no-untyped-call]

    def swap(self, x: Tensor, split: int, join: int) -> Tensor:
        """All-to-all: dimension ``split`` is divided among the ranks, their parts of dimension ``join`` are joined."""
        return x if self.size == 1 else _Swapped.apply(x, split, join, self)  # type: ignore[no-untyped-call]

    def exchange(self, rows: Tensor, sent: Sequence[int], received: Sequence[int]) -> Tensor:
        """Rows ``(n, d)`` that go to the ranks in turn, ``sent`` to each; gives those that come, ``received`` of each."""
        if self.size == 1:
            return rows
        return _Exchanged.apply(rows, list(sent), list(received), self)  # type: ignore[no-any-return, no-untyped-call]

    def stack(self, x: Tensor) -> Tensor:
        """``x`` ``(...)`` of every rank, ``(size, ...)``, of one shape everywhere; without a gradient."""
        x = x.detach().contiguous()
        if self.size == 1 or not x.numel():
            return x[None].expand(self.size, *x.shape)
        every = x.new_empty(self.size, *x.shape)
        # As bytes: what carries tensors between CPUs does not know every format.
        dist.all_gather_into_tensor(every.view(torch.uint8).view(-1), x.view(torch.uint8).view(-1), group=self.group)
        return every

    def sum(self, x: Tensor) -> Tensor:
        """The sum over the axis, bitwise the same on its ranks; without a gradient."""
        x = x.detach().clone(memory_format=torch.contiguous_format)
        if self.size > 1:
            dist.all_reduce(x, group=self.group)
        return x


UNDIVIDED = Axis(0, 1)
"""The axis of what is on one rank alone."""


@dataclass(frozen=True)
class Mesh:
    """This rank's place on every axis.

    Args:
        pipeline: Ranks that have different layers.
        sequence: Ranks that have different tokens of the same rows.
        tensor: Ranks that have parts of the same matrices.
        expert: Ranks that have different experts; they read different data, or different tokens of it.
        shards: Ranks that have rows of the same weights: data x sequence.
        expert_shards: Those of them that have rows of the same experts.
        vocabulary: Ranks that read the same hidden states off different parts of the vocabulary: sequence x tensor.
    """

    pipeline: Axis
    sequence: Axis
    tensor: Axis
    expert: Axis
    shards: Axis
    expert_shards: Axis
    vocabulary: Axis

    @classmethod
    def of(cls, shape: MeshShape) -> Mesh:
        """That of the current session, whose groups are made once; collective the first time.

        Raises:
            ValueError: if the ranks cannot be laid out so.
        """
        distributed.ensure_group()
        key = dist.group.WORLD, shape
        if key not in _meshes:
            _meshes.clear()  # those of a session that ended
            _meshes[key] = _laid_out(shape)
        return _meshes[key]


_meshes: dict[tuple[Any, MeshShape], Mesh] = {}


def _laid_out(shape: MeshShape) -> Mesh:
    world = distributed.world()
    if lack := lacks(shape, world.size):
        raise ValueError(lack)
    data = world.size // shape.replica
    # (data, pipeline, sequence, tensor)
    numbers = torch.arange(world.size).view(data, shape.pipeline, shape.sequence, shape.tensor)
    d, p, s, t = (int(n) for n in (numbers == world.rank).nonzero()[0])
    shards = numbers[:, p, :, t].flatten()
    of_experts = shards.view(-1, shape.expert)
    place, expert = divmod(int((shards == world.rank).nonzero()), shape.expert)
    everyone = dist.group.WORLD

    def axis(members: Tensor, *, grouped: bool = False) -> Axis:
        """``grouped``: with a group even of one rank."""
        ranks = tuple(members.tolist())
        group = None
        if len(ranks) == world.size:
            group = everyone
        elif len(ranks) > 1 or grouped:
            group = distributed.group_of(ranks)
        return Axis(ranks.index(world.rank), len(ranks), group, ranks)

    return Mesh(
        pipeline=axis(numbers[d, :, s, t]),
        sequence=axis(numbers[d, p, :, t]),
        tensor=axis(numbers[d, p, s, :]),
        expert=axis(of_experts[place]),
        shards=axis(shards, grouped=True),
        expert_shards=axis(of_experts[:, expert], grouped=True),
        vocabulary=axis(numbers[d, p].flatten()),
    )


class _Entered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return ctx.axis.sum(gradients[0]), None


class _Left(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        return axis.sum(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


class _Evened(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, size: int) -> Tensor:
        ctx.size = size
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0] / ctx.size, None


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, axis: Axis) -> Tensor:
        ctx.dim, ctx.axis = dim, axis
        return torch.cat(axis.stack(x).unbind(), dim)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        axis: Axis = ctx.axis
        parts = torch.stack(gradients[0].chunk(axis.size, ctx.dim)).contiguous()
        own = torch.empty_like(parts[0])
        dist.reduce_scatter_tensor(own.view(-1), parts.view(-1), group=axis.group)
        return own, None, None


class _Swapped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, split: int, join: int, axis: Axis) -> Tensor:
        ctx.dims, ctx.axis = (split, join), axis
        return _swap(x, split, join, axis)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        split, join = ctx.dims
        return _swap(gradients[0], join, split, ctx.axis), None, None, None


def _swap(x: Tensor, split: int, join: int, axis: Axis) -> Tensor:
    sent = torch.stack(x.chunk(axis.size, split)).contiguous()
    received = torch.empty_like(sent)
    dist.all_to_all_single(received.view(torch.uint8).view(-1), sent.view(torch.uint8).view(-1), group=axis.group)
    return torch.cat(received.unbind(), join)


class _Exchanged(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, sent: list[int], received: list[int], axis: Axis) -> Tensor:
        ctx.sizes, ctx.axis = (sent, received), axis
        return _exchange(rows, sent, received, axis)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        sent, received = ctx.sizes
        return _exchange(gradients[0], received, sent, ctx.axis), None, None, None


def _exchange(rows: Tensor, sent: list[int], received: list[int], axis: Axis) -> Tensor:
    out = rows.new_empty(sum(received), *rows.shape[1:])
    as_bytes = out.view(torch.uint8), rows.contiguous().view(torch.uint8)
    dist.all_to_all_single(*as_bytes, received, sent, group=axis.group)
    return out
