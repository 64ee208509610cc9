"""Which rank the others wait for: every rank times its own work, and every `WINDOW` steps they compare."""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from trainer.parallel import distributed

log = logging.getLogger(__name__)

WINDOW = 20
"""Steps of a comparison. A rank's median counts: one slow step makes no slow rank."""
SLOWER = 1.25
"""The slowest rank's time over the median rank's from which on it is named."""


class ComputeTimer:
    """Seconds that this rank itself works in the forwards of training.

    Backwards are left out, where gradients meet. On CPU it is the processor time of the thread, which passes while it
    works, not while it waits for another rank. On CUDA it is the time between two events on the device; they are read when
    they have passed, so nobody waits for them.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._seconds, self._started = 0.0, 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        model.register_forward_pre_hook(self._enter)
        model.register_forward_hook(self._leave)

    def take(self) -> float:
        """Seconds since the last call; forwards that the device has not finished come with the next one."""
        pending = []
        for first, last in self._events:
            if last.query():  # type: ignore[no-untyped-call]
                self._seconds += first.elapsed_time(last) / 1000
            else:
                pending.append((first, last))
        seconds, self._seconds, self._events = self._seconds, 0.0, pending
        return seconds

    def _enter(self, model: nn.Module, _: object) -> None:
        if model.training and self._cuda:
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            first.record()
            self._events.append((first, last))
        self._started = time.thread_time()

    def _leave(self, model: nn.Module, *_: object) -> None:
        if model.training and self._cuda:
            self._events[-1][1].record()
        elif model.training:
            self._seconds += time.thread_time() - self._started


class Stragglers:
    """Compares the ranks' own times, and logs which rank is slow when that begins and when it is over."""

    def __init__(self, model: nn.Module, device: torch.device, hosts: Mapping[int, str]) -> None:
        """``hosts``: where each rank runs, for the warning, as far as it is known."""
        self.timer = ComputeTimer(model, device)
        self.hosts = hosts
        self._window: list[float] = []
        self._slow_rank: int | None = None

    def observe(self, step: int, loading: float) -> dict[str, float]:
        """Note a step of this rank and what it took to load its data, seconds. Collective in every `WINDOW`-th step.

        Returns:
            The metrics of `compare` where the ranks have just been compared, else nothing.
        """
        self._window.append(self.timer.take() + loading)
        if distributed.world().devices == 1 or len(self._window) < WINDOW:
            return {}
        seconds, self._window = distributed.gather(statistics.median(self._window)), []
        return self.compare(step, seconds)

    def compare(self, step: int, seconds: Sequence[float]) -> dict[str, float]:
        """Name a rank that is slow by the ranks' own ``seconds`` in a step.

        Returns:
            ``straggler/rank`` (the slowest), ``straggler/slowness`` (its time over the median) and ``straggler/waiting``
            (seconds a step that the median rank waits for it).
        """
        rank = max(range(len(seconds)), key=lambda r: seconds[r])
        median = statistics.median_low(seconds)
        slowness, waiting = seconds[rank] / max(median, 1e-9), seconds[rank] - median
        before, self._slow_rank = self._slow_rank, rank if slowness >= SLOWER else None
        if distributed.world().is_main:
            self._report(step, before, slowness, waiting)
        return {"straggler/rank": float(rank), "straggler/slowness": slowness, "straggler/waiting": waiting}

    def _report(self, step: int, before: int | None, slowness: float, waiting: float) -> None:
        rank = self._slow_rank
        if rank is not None and rank != before:
            where = f"rank {rank}" + (f" on {self.hosts[rank]}" if rank in self.hosts else "")
            log.warning(
                "step %d: the others wait for %s: %.1f times the median rank's time, %.3g s a step; look at its device and "
                "its node (onecurve preflight)", step, where, slowness, waiting,
            )  # fmt: skip
        elif rank is None and before is not None:
            log.warning("step %d: rank %d is as fast as the others again", step, before)
