"""One trained stage of a model, in shards: micro-batches pass through the stages one behind the other."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from itertools import islice
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from trainer.batch import Batch
from trainer.config import InputError
from trainer.optim import Optimizer
from trainer.parallel import distributed, sharding
from trainer.parallel.distributed import Ranks
from trainer.parallel.engine import LossOf, Report, saved_buffers
from trainer.parallel.mesh import Axis
from trainer.parallel.precision import Precision
from trainer.parallel.sharded_engine import ShardedEngine
from trainer.parallel.stages import LeftStageError, MicroBatch, StagedModel, StageLinks, one_forward_one_backward

T = TypeVar("T")


class StagedTensor(NamedTuple):
    """A parameter or buffer of one of the stages: its name, logical shape, format, and whether it is trained."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    trained: bool


class StagedEngine(ShardedEngine):
    """A stage, whose forwards and backwards alternate (1F1B) so that few micro-batches are under way at once.

    Every rank of a replica gives the same reports: results of the last stage go to all of them, and what is made of these
    is computed everywhere. What `gathered` gives stays divided: inside, the ranks of a replica keep step.

    Attributes:
        stages: The parameters of every stage, in the model's order.
        buffers_of: Its buffers.
        links: What carries hidden states, gradients and results.
    """

    model: StagedModel

    def __init__(self, module: nn.Module, optimizer: Optimizer, precision: Precision, axis: Axis, **how: bool) -> None:
        parameters = [
            [n, sharding.cut_of(p).shape, str(p.dtype), p.requires_grad] for n, p in module.named_parameters()
        ]
        buffers = [[n, b.shape, str(b.dtype), False] for n, b in saved_buffers(module)]
        every: list[Any] = distributed.gather([parameters, buffers])
        self.stages, self.buffers_of = (
            [[StagedTensor(n, tuple(shape), *rest) for n, shape, *rest in every[rank][kind]] for rank in axis.members]
            for kind in (0, 1)
        )
        idle = [str(n) for n, parameters in enumerate(self.stages) if not any(p.trained for p in parameters)]
        if idle:
            raise InputError(
                f"strategy.pipeline={len(self.stages)}: no weight of stage {', '.join(idle)} (counted from 0) is trained; "
                "let adapter.targets name layers of every stage, or use fewer stages"
            )
        super().__init__(module, optimizer, precision, **how)
        self.links = StageLinks(axis)
        self.model = StagedModel(module, self.links)

    def accumulate(self, loss_of: LossOf[Report], micro_batches: Sequence[Batch], weight: Tensor) -> list[Report]:
        self.model.train()
        self._has_weight = weight > 0
        factor, axis = self.factor(weight), self.links.axis
        passing = [MicroBatch(batch) for batch in micro_batches]
        with self.autocast():
            for forward, number in one_forward_one_backward(axis.rank, axis.size, len(passing)):
                if forward:
                    self._forward(loss_of, passing[number])
                else:
                    with self.exchanging(number == len(passing) - 1):
                        self._backward(passing[number], factor)
            reports = [report for _, report in self._outcomes(loss_of, passing)]
        self._add_tied_gradients()
        return reports

    def exchanging(self, last: bool) -> AbstractContextManager[Any]:
        # Forwards lie between the backwards of a step; what they have noted for prefetching counts until the last one.
        self.units[0].set_is_last_backward(last)
        return super().exchanging(last)

    def map_batches(self, function: Callable[[Any], T], batches: Iterable[Batch]) -> Iterator[T]:
        rest = iter(batches)
        # As many at once as keep every stage at work most of the time.
        while window := [MicroBatch(batch) for batch in islice(rest, 4 * self.links.axis.size)]:
            for micro in window:
                self._forward(function, micro)
            yield from self._outcomes(function, window)

    def weights(self, *, frozen: bool = True) -> Iterator[tuple[str, Tensor]]:
        own = super().weights(frozen=frozen)
        yield from self._of_stages([[p for p in stage if frozen or p.trained] for stage in self.stages], own)
        yield from self._of_stages(self.buffers_of, own)

    def _of_stages(
        self, stages: Sequence[Sequence[StagedTensor]], own: Iterator[tuple[str, Tensor]]
    ) -> Iterator[tuple[str, Tensor]]:
        """What each stage has, from where it is; ``own``: what this one has."""
        names = set[str]()
        for stage, tensors in enumerate(stages):
            for name, shape, dtype, _ in tensors:
                mine = next(own)[1] if stage == self.links.axis.rank else None
                if name in names:  # the first stage's tied table
                    continue
                names.add(name)
                if mine is None:
                    mine = torch.empty(shape, dtype=getattr(torch, dtype.removeprefix("torch.")), device=self.device)
                yield name, self.links.broadcast(mine.contiguous(), stage)

    def copies(self) -> Ranks:
        world, stages = distributed.world(), self.links.axis.size
        each = world.replica // stages
        return Ranks(world.data.rank * each + world.rank % each, world.size // stages)

    def digest(self) -> list[int]:
        return []  # the buffers of other stages are others

    def _forward(self, function: Callable[[Any], Any], micro: MicroBatch) -> None:
        micro.batch = micro.batch.to(self.device)
        with self.model.passing(micro):
            try:
                micro.outcome = function(micro.batch)
            except LeftStageError:
                return
        if micro.result is None:
            raise RuntimeError("a function that a pipeline passes on did not call the trained model")

    def _backward(self, micro: MicroBatch, factor: Tensor) -> None:
        with torch.autocast(self.device.type, enabled=False):
            if self.links.last:
                self.backward(micro.outcome[0] * factor)
            else:
                assert micro.hidden is not None
                torch.autograd.backward(micro.hidden, self.links.receive_gradient(micro.hidden))
        if micro.received is not None:
            gradient = micro.received.grad
            self.links.send_gradient(torch.zeros_like(micro.received) if gradient is None else gradient)
        micro.received = micro.hidden = None

    def _outcomes(self, function: Callable[[Any], T], passing: Sequence[MicroBatch]) -> list[T]:
        """What ``function`` makes of the last stage's results: known there, computed again from them elsewhere."""
        results = self.links.spread([micro.result for micro in passing if micro.result is not None])
        self.links.wait()
        if not self.links.last:
            for micro, result in zip(passing, results, strict=True):
                micro.result = result
                self._forward(function, micro)
        return [micro.outcome for micro in passing]

    def _add_tied_gradients(self) -> None:
        """Let both ends of the pipeline have all of the gradient of a tied table, bitwise the same: a + b = b + a."""
        tied = {p.name for p in self.stages[0] if p.trained} & {p.name for p in self.stages[-1]}
        for name in sorted(tied) if self.links.first or self.links.last else ():
            parameter = self.parameters[name]
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            own: Any = parameter.grad
            own.to_local().add_(self.links.swapped(own.to_local()))
