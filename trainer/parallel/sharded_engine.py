"""One trained module in shards, under the contract of every engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from trainer.optim import Optimizer, gradient_norm
from trainer.optim.muon import Replicas
from trainer.optim.state import create_state, elements
from trainer.parallel import distributed, sharding
from trainer.parallel.cuts import Cut
from trainer.parallel.distributed import Ranks
from trainer.parallel.engine import Fragment, Outcome, digest_of, owned_spans, saved_buffers
from trainer.parallel.native import NativeEngine
from trainer.parallel.precision import Precision


@runtime_checkable
class Joinable(Protocol):
    """A part of a module that ranks with different data divide among them."""

    def joined(self) -> AbstractContextManager[None]:
        """All of it on every rank for a while, so that forwards need not keep step; collective when it begins."""


@dataclass(frozen=True, eq=False)
class MatrixParts(Replicas):
    """Ranks that have parts of the same matrices, or the same part: each orthogonalises some of them.

    Args:
        cut: Of every one of the matrices, or stacks of them.
    """

    cut: Cut = field(kw_only=True)

    @classmethod
    def of_cut(cls, cut: Cut) -> MatrixParts:
        """Those of matrices that are cut so."""
        assert cut.shards is not None
        axes = [cut.shards, *(axis for _, axis in cut.along), cut.copies]
        rank, size = 0, 1
        for axis in axes:
            rank, size = rank + size * axis.rank, size * axis.size

        def stack(mine: Tensor) -> Tensor:
            every = mine[None]
            for axis in axes:
                every = axis.stack(every).flatten(0, 1)
            return every

        return cls(rank, size, stack, cut=cut)

    def shape_of(self, parameter: Tensor) -> torch.Size:
        return torch.Size(self.cut.shape)

    def joined(self, updates: Tensor) -> Tensor:
        return self.cut.joined(updates, stacked=1)

    def own(self, updates: Tensor) -> Tensor:
        return self.cut.own(updates, stacked=1)


@dataclass(frozen=True, eq=False)
class DividedMatrices(Replicas):
    """The ranks that have parts of the same matrices, for every parameter.

    Args:
        parts: By what this rank has of a parameter.
    """

    parts: Mapping[Tensor, Replicas] = field(kw_only=True)

    @classmethod
    def of_cuts(cls, cuts: Mapping[Tensor, Cut]) -> DividedMatrices:
        """Of matrices, or stacks of them, by what this rank has of them."""
        by_cut = {cut: MatrixParts.of_cut(cut) for cut in {cut.of_matrices for cut in cuts.values()}}
        return cls(parts={part: by_cut[cut.of_matrices] for part, cut in cuts.items()})

    def of(self, parameter: Tensor) -> Replicas:
        return self.parts[parameter]


class ShardedEngine(NativeEngine):
    """A module divided by `sharding.shard`, whose optimizers hold this rank's rows as plain tensors.

    Weights are to be read and written when they are in shards only: a forward without a backward leaves some of them
    gathered, in memory of their own, and what is written there is lost.

    Args:
        low_precision: Weights are gathered in the compute format; else they are float32, and autocast casts them.
        reshard: Gradients are exchanged with every micro-batch, instead of being added up whole until the last one.

    Attributes:
        parts: Of each trained parameter this rank's rows, which the optimizers hold.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizer: Optimizer,
        precision: Precision,
        *,
        low_precision: bool,
        reshard: bool,
    ) -> None:
        super().__init__(module, optimizer, precision)
        if plain := [name for name, p in module.named_parameters() if not isinstance(p, DTensor)]:
            raise ValueError(
                f"{', '.join(plain[:5])}: not divided among the ranks; call strategy.place() behind construction()"
            )
        self.averaged, self.low_precision, self.reshards = 1, low_precision, reshard
        self.units = sharding.units(module)
        self.parameters = dict(module.named_parameters())
        self.parts = {p: nn.Parameter(sharding.local(p)) for p in self.parameters.values() if p.requires_grad}
        self.buffers = saved_buffers(module)
        self.optimizers = optimizer.build(module, lambda p: sharding.cut_of(p).shape)
        for group in (group for o in self.optimizers for group in o.param_groups):
            group["params"] = [self.parts[p] for p in group["params"]]
        cuts: dict[Tensor, Cut] = {part: sharding.cut_of(p) for p, part in self.parts.items()}
        optimizer.share_work(self.optimizers, DividedMatrices.of_cuts(cuts))

    def autocast(self) -> AbstractContextManager[Any]:
        # Without its cache, which would keep a cast of every weight to the end of the step.
        return nullcontext() if self.low_precision else self.precision.autocast(self.device, cache=False)

    def exchanging(self, last: bool) -> AbstractContextManager[Any]:
        for unit in self.units:
            unit.set_requires_gradient_sync(last or self.reshards, recurse=False)
            unit.set_reshard_after_backward(last or self.reshards, recurse=False)
        return nullcontext()

    def step(self, limit: Tensor | None = None) -> Outcome:
        self.reshard()
        for parameter, part in self.parts.items():
            gradient: Any = parameter.grad
            part.grad, parameter.grad = None if gradient is None else gradient.to_local(), None
        return super().step(limit)

    def norm(self, parameters: Sequence[Tensor]) -> Tensor:
        # What several ranks have alike counts once.
        counted = [part for p, part in self.parts.items() if sharding.cut_of(p).copies.rank == 0]
        return distributed.sum_over_ranks(gradient_norm(counted).double().square()).sqrt().float()

    def _step_fused(self, divisor: Tensor, applied: Tensor) -> None:
        memory = next(iter(self.parts.values())).device  # not this rank's device where shards are offloaded
        super()._step_fused(divisor.to(memory), applied.to(memory))

    def reshard(self) -> None:
        """Free what is gathered."""
        for unit in self.units:
            unit.reshard()

    @contextmanager
    def gathered(self, *, only: Callable[[str], bool] = bool) -> Iterator[nn.Module]:
        self.reshard()
        training = self.module.training
        with sharding.without_hooks(self.units):
            for unit in self._units_with(only):
                unit.unshard()
            self.module.eval()
            try:
                with ExitStack() as joined:
                    for part in self._joinable(only):
                        joined.enter_context(part.joined())
                    yield self.model
            finally:
                self.module.train(training)
                self.reshard()

    def _units_with(self, only: Callable[[str], bool]) -> list[FSDPModule]:
        """The parts that are gathered for any of the parameters that ``only`` names."""
        parts = {name: part for name, part in self.module.named_modules() if isinstance(part, FSDPModule)}
        paths = (name.split(".") for name in self.parameters if only(name))
        above = ([".".join(path[:n]) for n in range(len(path) - 1, -1, -1)] for path in paths)
        owners = {next(prefix for prefix in prefixes if prefix in parts) for prefixes in above}
        return [part for name, part in parts.items() if name in owners]

    def _joinable(self, only: Callable[[str], bool]) -> Iterator[Joinable]:
        """The parts that ranks divide among them and that have any of the parameters which ``only`` names."""
        for name, part in self.module.named_modules():
            if isinstance(part, Joinable) and any(only(own) for own in self.parameters if own.startswith(f"{name}.")):
                yield part

    def weights(self, *, frozen: bool = True) -> Iterator[tuple[str, Tensor]]:
        self.reshard()
        for name, parameter in self.parameters.items():
            if frozen or parameter.requires_grad:
                yield name, sharding.cut_of(parameter).joined(sharding.local(parameter)).to(self.device)
        yield from self.buffers

    def trained(self) -> Iterator[tuple[str, Tensor]]:
        yield from ((name, self.parts[p]) for name, p in self.parameters.items() if p.requires_grad)

    def fragments(self, *, owned: bool) -> Iterator[Fragment]:
        self.reshard()
        for optimizer in self.optimizers:
            create_state(optimizer)
        for name, part in self.trained():
            cut = sharding.cut_of(self.parameters[name])
            if (owned and cut.copies.rank) or not part.numel():
                continue
            for state, values in self.states(part).items():
                own = elements(values, 0, part.numel(), restoring=not owned)
                yield Fragment(name, state, cut.shape, *cut.interval, own)
        sizes = [b.numel() for _, b in self.buffers]
        for number, first, last in owned_spans(sizes, owned=owned, ranks=self.copies()):
            name, buffer = self.buffers[number]
            yield Fragment.of_tensor(name, "param", buffer.shape, first, buffer.detach().view(-1)[first:last])

    def copies(self) -> Ranks:
        """This rank's place among those that have the same buffers."""
        return distributed.world()

    def digest(self) -> list[int]:
        return digest_of(buffer for _, buffer in self.buffers)
