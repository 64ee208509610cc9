"""Numbers that a step reports: sums kept on the device, combined over micro-batches and ranks in one exchange."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from enum import Enum
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class Kind(Enum):
    """How a metric combines: each keeps three numbers (total, count or squares, ...) so that all exchange alike."""

    total = "total"
    mean = "mean"
    std = "std"
    minimum = "min"
    maximum = "max"


class Metrics:
    """Named statistics of a step: ``(sum, count)`` means, ``(sum, squares, count)`` deviations, extremes.

    Tensors stay on their device until `reduced` values are read. All ranks hold the same names in the same order.
    """

    def __init__(self) -> None:
        self._entries: dict[str, tuple[Kind, Tensor]] = {}
        self.units: dict[str, list[tuple[Tensor, Tensor]]] = {}

    def mean(self, name: str, total: Tensor, count: Tensor | float) -> None:
        """Report ``total / count``, both summed over micro-batches and ranks; 0 where nothing was counted."""
        count = count if isinstance(count, Tensor) else total.new_full((), count, dtype=torch.float64)
        self._add(name, Kind.mean, total, total.new_zeros(()), count)

    def total(self, name: str, value: Tensor) -> None:
        """Report the sum over micro-batches and ranks."""
        self._add(name, Kind.total, value, value.new_zeros(()), value.new_zeros(()))

    def std(self, name: str, values: Tensor, mask: Tensor | None = None) -> None:
        """Report the standard deviation of all ``values`` (any shape), population form; of those with a ``mask`` of 1."""
        values = values.detach().double()
        mask = torch.ones_like(values) if mask is None else mask.double()
        self._add(name, Kind.std, (values * mask).sum(), (values.square() * mask).sum(), mask.sum())

    def minimum(self, name: str, value: Tensor) -> None:
        self._add(name, Kind.minimum, value, value.new_zeros(()), value.new_zeros(()))

    def maximum(self, name: str, value: Tensor) -> None:
        self._add(name, Kind.maximum, value, value.new_zeros(()), value.new_zeros(()))

    def per_example(self, name: str, values: Tensor, rows: Tensor) -> None:
        """Keep the value ``(B,)`` of every unit with its number ``(B,)``, for the histograms and errors of an evaluation."""
        self.units.setdefault(name, []).append((rows, values.detach()))

    @classmethod
    def merged(cls, reports: Iterable[Metrics]) -> Metrics:
        """The numbers of several micro-batches together."""
        metrics = cls()
        for report in reports:
            metrics.merge(report)
        return metrics

    def merge(self, other: Metrics) -> None:
        """Fold another micro-batch's numbers in."""
        for name, (kind, entry) in other._entries.items():
            self._fold(name, kind, entry)
        for name, values in other.units.items():
            self.units.setdefault(name, []).extend(values)

    def packed(self) -> Tensor:
        """``(K, 3)`` float64, a row a name: what the ranks exchange."""
        return (
            torch.stack([entry for _, entry in self._entries.values()])
            if self._entries
            else torch.zeros(0, 3, dtype=torch.float64)
        )

    def reduced(
        self, stack: Callable[[Tensor], Tensor], *, replica: int = 1, drop_empty: bool = False
    ) -> dict[str, Tensor]:
        """Values by name, float64 scalars on the device. Collective where ``stack`` is.

        Args:
            stack: Gives the packed numbers ``(K, 3)`` of every rank, ``(W, K, 3)``.
            replica: Neighbours among these ranks that report the same: in sums each group counts once, in extremes all do.
            drop_empty: Leave out means of nothing, which are 0 else; the host waits for the device.
        """
        values = {}
        for (name, (kind, _)), column in zip(self._entries.items(), stack(self.packed()).unbind(1), strict=True):
            total, squares, count = column[::replica].sum(0).unbind(0)
            if drop_empty and kind in (Kind.mean, Kind.std) and not count.item():
                continue
            mean = total / count.clamp(min=1e-300)
            if kind is Kind.total:
                values[name] = total
            elif kind is Kind.mean:
                values[name] = torch.where(count > 0, mean, torch.zeros_like(mean))
            elif kind is Kind.std:
                values[name] = (squares / count.clamp(min=1e-300) - mean.square()).clamp(min=0).sqrt()
            else:
                values[name] = column[:, 0].min() if kind is Kind.minimum else column[:, 0].max()
        return values

    def _add(self, name: str, kind: Kind, *numbers: Tensor) -> None:
        self._fold(name, kind, torch.stack([n.detach().double().reshape(()) for n in numbers]))

    def _fold(self, name: str, kind: Kind, entry: Tensor) -> None:
        if name not in self._entries:
            self._entries[name] = (kind, entry)
            return
        before = self._entries[name][1]
        fold = {Kind.minimum: torch.minimum, Kind.maximum: torch.maximum}.get(kind, torch.add)
        self._entries[name] = (kind, fold(before, entry))


class Readback(Generic[T]):
    """Scalars on their way from the device to the host, a step at a time, each with what the host knows about the step.

    From CUDA they are copied while the next step runs and read when that one is pushed, so that nobody waits for the device.
    """

    def __init__(self) -> None:
        self._pending: list[tuple[list[str], Tensor, Any, T]] = []

    def push(self, values: Mapping[str, Tensor], known: T) -> list[tuple[dict[str, float], T]]:
        """Hand over the values of a step; gives those that have arrived, in order, with what is known of their steps."""
        packed = torch.stack([value.detach().double().reshape(()) for value in values.values()])
        if not packed.is_cuda:
            self._pending.append((list(values), packed, None, known))
            return self.flush()
        arrived = self.flush()
        copied, event = packed.to("cpu", non_blocking=True), torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        self._pending.append((list(values), copied, event, known))
        return arrived

    def flush(self) -> list[tuple[dict[str, float], T]]:
        """Everything that was pushed and not yet given back."""
        arrived = []
        for names, packed, event, known in self._pending:
            if event is not None:
                event.synchronize()
            arrived.append((dict(zip(names, packed.tolist(), strict=True)), known))
        self._pending = []
        return arrived
