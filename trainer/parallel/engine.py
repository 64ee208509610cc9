"""The contract between the loop and a parallel strategy."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from trainer.batch import Batch
from trainer.parallel import distributed
from trainer.parallel.precision import Precision

Report = TypeVar("Report")
LossOf = Callable[[Any], tuple[Tensor, Report]]
"""Of a micro-batch: the sum of its losses, and what the caller wants to know of it."""


@dataclass(frozen=True)
class Fragment:
    """A contiguous piece of one logical tensor that this rank holds, as a live one-dimensional view.

    ``name``: the parameter's Hugging Face name. ``state``: ``param`` (the float32 master), or the optimizer's name for a
    moment (``exp_avg``, ``exp_avg_sq``, ``momentum_buffer``). ``shape``: of the whole logical tensor. ``start``: the first
    element's place in the flattened tensor. ``tensor`` ``(size,)``: writing into it restores it.
    """

    name: str
    state: str
    shape: tuple[int, ...]
    start: int
    tensor: Tensor


@dataclass(frozen=True)
class Outcome:
    """What became of a step: the gradient's norm before clipping, and whether it was applied (both on the device)."""

    grad_norm: Tensor
    applied: Tensor


class Engine(ABC):
    """One trained module with its optimizer under a strategy."""

    device: torch.device
    model: nn.Module
    precision: Precision

    @abstractmethod
    def accumulate(self, loss_of: LossOf[Report], micro_batches: Sequence[Batch], weight: Tensor) -> list[Report]:
        """Add up the gradient of ``sum(loss) / weight`` over micro-batches and ranks; gives every micro-batch's report.

        Gradients are exchanged with the last micro-batch only.

        Args:
            loss_of: Gives the sum of a micro-batch's losses, and a report.
            micro_batches: Of this rank, as many on every rank.
            weight: The global weight, over all ranks (docs/algorithms.md#weighting).
        """

    @abstractmethod
    def step(self, limit: Tensor | None = None) -> Outcome:
        """Clip and apply the gradient, or skip it where its norm is not finite or above ``limit``; then clear it."""

    @abstractmethod
    def autocast(self) -> AbstractContextManager[Any]:
        """The compute format of training, where it is not that of the weights."""

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

    @abstractmethod
    def set_lr(self, factor: float) -> None:
        """Set every parameter group's learning rate to ``factor`` times its own base rate."""

    @abstractmethod
    def gathered(self, *, only: Callable[[str], bool] = bool) -> AbstractContextManager[nn.Module]:
        """A plain module with full weights, to generate with; training continues unchanged afterwards.

        ``only``: says by name which weights are needed. Collective at both ends; inside, ranks need not keep step.
        """

    @abstractmethod
    def weights(self, *, frozen: bool = True) -> Iterator[tuple[str, Tensor]]:
        """Collective: one full tensor at a time, under its logical name, tied ones once; trained ones are float32."""

    @abstractmethod
    def fragments(self, *, owned: bool) -> Iterator[Fragment]:
        """This rank's pieces of every trained parameter, its optimizer state, and the buffers.

        What is frozen is not part of a run's state: it comes again from where the model came from.
        ``owned``: only what this rank writes to a checkpoint: over all ranks disjoint and complete. Otherwise all that it
        needs to be restored. Optimizer state that does not exist yet is created as zeros.
        """

    @abstractmethod
    def digest(self) -> list[int]:
        """A number for every tensor that all ranks should hold alike; empty where each holds something else."""

    @abstractmethod
    def optimizer_steps(self) -> dict[str, float]:
        """Updates that the optimizer has applied to each parameter that this rank has a fragment of, by logical name."""

    @abstractmethod
    def restored(self, steps: Mapping[str, float], state: Mapping[str, Any]) -> None:
        """Finish a restore after every fragment was written: optimizer step counts, working copies, `state`."""

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """What else must be saved, as JSON values, equal on all ranks: the loss scaler."""


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


def owned_spans(sizes: Sequence[int], *, owned: bool = True) -> Iterator[tuple[int, int, int]]:
    """(tensor, first element, last) of what this rank writes of tensors that all ranks hold; all of them unless ``owned``."""
    world = distributed.world()
    return shares(sizes, world.rank, world.size) if owned else shares(sizes, 0, 1)


def digest_of(tensors: Iterable[Tensor]) -> list[int]:
    """For each tensor the sum of its bits, taken as integers of its width, modulo 2**64."""
    kinds = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}
    sums = [t.detach().contiguous().view(kinds[t.element_size()]).sum(dtype=torch.int64) for t in tensors]
    return torch.stack(sums).tolist() if sums else []
