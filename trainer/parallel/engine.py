"""The contract between the loop and a parallel strategy."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from trainer.batch import Batch
from trainer.optim import Optimizer
from trainer.parallel import distributed
from trainer.parallel.boxes import Box, box_of
from trainer.parallel.precision import Precision

T = TypeVar("T")
Report = TypeVar("Report")
LossOf = Callable[[Any], tuple[Tensor, Report]]
"""Of a micro-batch: the sum of its losses, and what the caller wants to know of it."""


@dataclass(frozen=True)
class Fragment:
    """An interval of a box of one logical tensor that this rank holds, as a live one-dimensional view.

    A replica's or a flat shard's box is the tensor; where several dimensions divide a tensor, a rank's rows are of a block.

    Args:
        name: The parameter's Hugging Face name.
        state: ``param`` (the float32 master), or a moment by the optimizer's name (``exp_avg``, ``momentum_buffer``).
        shape: Of the logical tensor.
        box: What of it the interval is counted in.
        start: The first element's place in the flattened box.
        tensor: ``(size,)``; writing into it restores it. Of state in 8 bits its float32 values, which are no view.
    """

    name: str
    state: str
    shape: tuple[int, ...]
    box: Box
    start: int
    tensor: Tensor

    @classmethod
    def of_tensor(cls, name: str, state: str, shape: Sequence[int], start: int, tensor: Tensor) -> Fragment:
        """An interval that is counted in the tensor itself."""
        return cls(name, state, tuple(shape), box_of(shape), start, tensor)


@dataclass(frozen=True)
class Outcome:
    """A step that was taken or skipped, on the device.

    Args:
        grad_norm: The gradient's norm before clipping.
        applied: Whether the optimizer took the step.
    """

    grad_norm: Tensor
    applied: Tensor


class Decision(NamedTuple):
    """How a gradient is applied, decided on the device without waiting for it.

    Args:
        norm: Of the gradient before clipping, without the loss scale; not finite after an overflow.
        applied: Whether the optimizer takes the step.
        divisor: What the gradient is divided by: the loss scale, and what clipping shrinks it by.
    """

    norm: Tensor
    applied: Tensor
    divisor: Tensor


class Engine(ABC):
    """One trained module with its optimizer under a strategy.

    Attributes:
        module: What is trained, with its own names.
        model: What is called: the module, or what a strategy wrapped around it.
        optimizers: Over the parameters, or over this rank's partitions of them.
        scale: The loss scale of fp16; a constant 1 otherwise.
        averaged: Ranks that gradients are averaged over, though the objective is a sum over them; 1 where they add up.
    """

    def __init__(self, module: nn.Module, optimizer: Optimizer, precision: Precision) -> None:
        world = distributed.world()
        self.device, self.ranks = world.device, world.data.size
        self.averaged = self.ranks
        self.module, self.model = module, module
        self.optimizers: list[torch.optim.Optimizer] = []
        self.precision, self.clip = precision, optimizer.clip
        self.scale = precision.loss_scale(self.device)
        self._has_weight = torch.ones((), dtype=torch.bool, device=self.device)
        self._watched, self._pending = False, list[Callable[[], Any]]()

    def accumulate(self, loss_of: LossOf[Report], micro_batches: Sequence[Batch], weight: Tensor) -> list[Report]:
        """Add up the gradient of ``sum(loss) / weight`` over micro-batches and ranks; gives every micro-batch's report.

        Gradients are exchanged with the last micro-batch only.

        Args:
            loss_of: Gives the sum of a micro-batch's losses, and a report.
            micro_batches: Of this rank, as many on every rank.
            weight: The global weight, over all ranks (docs/algorithms.md#weighting).
        """
        reports = []
        self.model.train()
        self._has_weight = weight > 0
        factor = self.factor(weight)
        # One context around all of them: autocast then casts every weight once a step.
        with self.autocast():
            for number, batch in enumerate(micro_batches, start=1):
                with self.exchanging(number == len(micro_batches)):
                    loss, report = loss_of(batch.to(self.device))
                    with torch.autocast(self.device.type, enabled=False):
                        self.backward(loss * factor)
                reports.append(report)
        return reports

    def factor(self, weight: Tensor) -> Tensor:
        """What a sum over ``weight`` units is multiplied by before its backward; 0 units leave a gradient of 0."""
        return self.scale.scale * self.averaged / weight.clamp(min=1e-30).float()

    def exchanging(self, last: bool) -> AbstractContextManager[Any]:
        """The context of a micro-batch's forward and backward; gradients meet those of other ranks in the ``last`` one."""
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a loss that is scaled already."""
        loss.backward()  # type: ignore[no-untyped-call]

    def decide(self, norm: Tensor, limit: Tensor | None) -> Decision:
        """What becomes of a gradient whose norm, times the loss scale, is ``norm``: skipped above ``limit``, or clipped."""
        norm = norm / self.scale.scale
        finite = torch.isfinite(norm)
        applied = finite & self._has_weight
        if limit is not None:
            applied = applied & (norm <= limit)
        shrink = (self.clip / (norm + 1e-6)).clamp(max=1.0) if self.clip else torch.ones_like(norm)
        return Decision(norm, applied, self.scale.scale / torch.where(finite, shrink, 1.0))

    @abstractmethod
    def step(self, limit: Tensor | None = None) -> Outcome:
        """Clip and apply the gradient, or skip it where its norm is not finite or above ``limit``; then clear it."""

    def autocast(self) -> AbstractContextManager[Any]:
        """The compute format of training, where it is not that of the weights."""
        return self.precision.autocast(self.device)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Forwards without gradients or dropout, in the same precision as training."""
        training = self.model.training
        self.model.eval()
        try:
            with torch.no_grad(), self.autocast():
                yield
        finally:
            self.model.train(training)

    def map_batches(self, function: Callable[[Any], T], batches: Iterable[Batch]) -> Iterator[T]:
        """What ``function`` makes of every batch on the device: forwards alone, inside `evaluating`."""
        for batch in batches:
            yield function(batch.to(self.device))

    def before_next_update(self, action: Callable[[], Any]) -> None:
        """Run ``action`` once, before an optimizer next writes to what `fragments` gives."""
        if not self._watched:
            for optimizer in self.optimizers:
                optimizer.register_step_pre_hook(self._run_pending)
        self._watched = True
        self._pending.append(action)

    def _run_pending(self, *_: Any) -> None:
        pending, self._pending = self._pending, []
        for action in pending:
            action()

    def set_lr(self, factor: float) -> None:
        """Set every parameter group's learning rate to ``factor`` times its own base rate."""
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["base_lr"] * factor

    @abstractmethod
    def gathered(self, *, only: Callable[[str], bool] = bool) -> AbstractContextManager[nn.Module]:
        """A plain module with full weights, to generate with; training continues unchanged afterwards.

        ``only``: says by name which weights are needed. Collective at both ends; inside, ranks need not keep step.
        """

    @abstractmethod
    def weights(self, *, frozen: bool = True) -> Iterator[tuple[str, Tensor]]:
        """Collective: one full tensor at a time, under its parameter's name, tied ones once; trained ones are float32.

        Those of a packed weight come as the bytes that they hold, in the order of the module's parameters.
        """

    @abstractmethod
    def fragments(self, *, owned: bool) -> Iterator[Fragment]:
        """This rank's pieces of every trained parameter, its optimizer state, and the buffers.

        What is frozen is not part of a run's state: it comes again from where the model came from.
        ``owned``: only what this rank writes to a checkpoint: over all ranks disjoint and complete. Otherwise all that it
        needs to be restored: what is written into it is there after `restored`. Optimizer state that does not exist yet is
        created as zeros.
        """

    @abstractmethod
    def digest(self) -> list[int]:
        """A number for every tensor that all ranks should hold alike; empty where each holds something else."""

    @abstractmethod
    def optimizer_steps(self) -> dict[str, float]:
        """Updates that the optimizer has applied to each parameter that this rank has a fragment of, by logical name."""

    @abstractmethod
    def restored(self, steps: Mapping[str, float], state: Mapping[str, Any]) -> float:
        """Finish a restore after every fragment was written: optimizer step counts, working copies, `state`.

        Gives the most that rounding optimizer state to 8 bits moved an element, as a part of its block's maximum: 0 if all
        is as it was saved.
        """

    def state(self) -> dict[str, Any]:
        """What else must be saved, as JSON values, equal on all ranks: the loss scale."""
        return {"loss_scale": self.scale.state()}


def shares(sizes: Sequence[int], rank: int, ranks: int) -> Iterator[tuple[int, int, int]]:
    """(tensor, first element, last) of what ``rank`` writes of tensors that all ranks hold: its part of their concatenation.

    So no rank writes much more than another, whatever the tensors' ``sizes`` in elements.
    """
    total, at = sum(sizes), 0
    low, high = total * rank // ranks, total * (rank + 1) // ranks
    for number, size in enumerate(sizes):
        first, last = max(low - at, 0), min(high - at, size)
        at += size
        if first < last:
            yield number, first, last


def owned_spans(
    sizes: Sequence[int], *, owned: bool = True, ranks: distributed.Ranks | None = None
) -> Iterator[tuple[int, int, int]]:
    """(tensor, first element, last) of what this rank writes of tensors that all ranks hold; all of them unless ``owned``.

    ``ranks``: those that hold them, where not all do.
    """
    ranks = distributed.world() if ranks is None else ranks
    return shares(sizes, ranks.rank, ranks.size) if owned else shares(sizes, 0, 1)


def saved_buffers(module: nn.Module) -> list[tuple[str, Tensor]]:
    """Buffers that are part of a model, by name."""
    saved = module.state_dict(keep_vars=True)
    return [(name, b) for name, b in module.named_buffers() if name in saved and b.numel()]


def digest_of(tensors: Iterable[Tensor]) -> list[int]:
    """For each tensor the sum of its bits, taken as integers of its width, modulo 2**64."""
    kinds = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}
    sums = [t.detach().contiguous().view(kinds[t.element_size()]).sum(dtype=torch.int64) for t in tensors]
    return torch.stack(sums).tolist() if sums else []
