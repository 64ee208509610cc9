"""Which rank the others wait for: every rank's own time before it meets the others, compared where metrics meet anyway."""

from __future__ import annotations

import logging
import statistics
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

log = logging.getLogger(__name__)

OWN = "own_seconds"
"""The metric that carries a rank's own time of a step."""
WINDOW = 20
"""Steps that are looked at together: one slow step is no slow rank."""
OFTEN = 0.8
"""Part of them in which the same rank must have been the slowest."""
SLOWER = 1.25
"""Its own time over the median of all ranks, from which on it is named."""


class OwnTime:
    """Seconds of this rank's work since they were last taken: loading data, and forwards.

    Backwards are left out, where gradients meet. On CUDA a forward's time is between two events on the device, read when they
    have passed: it comes a step late, and nobody waits for it.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._seconds = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def host(self) -> Iterator[None]:
        """What happens inside is this rank's own work, done by the CPU."""
        began = time.perf_counter()
        yield
        self._seconds += time.perf_counter() - began

    @contextmanager
    def forward(self) -> Iterator[None]:
        """What happens inside is this rank's own work, done by its device."""
        if not self._cuda:
            with self.host():
                yield
            return
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        first.record()
        yield
        last.record()
        self._events.append((first, last))

    def take(self, waited: float = 0.0) -> float:
        """Seconds since the last call, less those ``waited`` for others inside of them."""
        later = []
        for first, last in self._events:
            if last.query():  # type: ignore[no-untyped-call]
                self._seconds += first.elapsed_time(last) / 1000
            else:
                later.append((first, last))
        taken, self._seconds, self._events = self._seconds, 0.0, later
        return max(0.0, taken - waited)


def spread(own: Tensor) -> dict[str, Tensor]:
    """What the ranks' own seconds ``(W,)`` of a step say, on their device; nothing for a single rank.

    ``straggler/waiting``: seconds that a rank in the middle waits for the slowest; ``straggler/rank``: which one that is;
    ``straggler/slowness``: its time over the median.
    """
    if len(own) == 1:
        return {}
    slowest, rank = own.max(0)
    median = own.quantile(0.5) if len(own) > 2 else own.min()
    return {
        "straggler/waiting": slowest - median,
        "straggler/rank": rank.double(),
        "straggler/slowness": slowest / median.clamp(min=1e-9),
    }


class Straggler:
    """Names the rank that the others have been waiting for."""

    def __init__(self, hosts: Mapping[int, str]) -> None:
        self.hosts = hosts
        self._slowest: deque[int] = deque(maxlen=WINDOW)
        self._slowness: deque[float] = deque(maxlen=WINDOW)
        self._waiting: deque[float] = deque(maxlen=WINDOW)
        self._named: int | None = None

    def observe(self, step: int, values: Mapping[str, float]) -> str | None:
        """Take note of a step; gives the warning that is logged when a rank begins to be slow, or is so no longer."""
        if "straggler/rank" not in values:
            return None
        self._slowest.append(int(values["straggler/rank"]))
        self._slowness.append(values["straggler/slowness"])
        self._waiting.append(values["straggler/waiting"])
        if len(self._slowest) < WINDOW:
            return None
        rank = statistics.mode(self._slowest)
        slowness = statistics.median(self._slowness)
        slow = self._slowest.count(rank) >= OFTEN * WINDOW and slowness >= SLOWER
        if (rank if slow else None) == self._named:
            return None
        before, self._named = self._named, rank if slow else None
        if slow:
            where = f"rank {rank}" + (f" on {self.hosts[rank]}" if rank in self.hosts else "")
            said = (
                f"step {step}: the others wait for {where}: {slowness:.1f} times the median rank's time before they meet, "
                f"{statistics.median(self._waiting):.3g} s a step; look at its device and its node (launch/preflight.py)"
            )
        else:
            said = f"step {step}: rank {before} is as fast as the others again"
        log.warning(said)
        return said
