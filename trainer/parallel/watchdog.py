"""A collective that hangs says nothing: this thread does, and ends the process."""

from __future__ import annotations

import faulthandler
import hashlib
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Self

from trainer.config import Node, RunError, schema, setting
from trainer.parallel import distributed
from trainer.parallel.engine import Engine

EXIT_CODE = 75
"""What a process that hung exits with (EX_TEMPFAIL: trying again may help)."""


_awaited: int | None = None


@contextmanager
def awaiting(rank: int) -> Iterator[None]:
    """What happens inside is held up by one ``rank`` alone: a watchdog that ends this one names it."""
    global _awaited
    _awaited = rank
    try:
        yield
    finally:
        _awaited = None


class DivergenceError(RunError):
    """Replicas that should be equal are not; the message names the ranks."""


@dataclass(frozen=True)
class _Phase:
    name: str
    until: float


@schema("watchdog")
@dataclass
class WatchdogSettings(Node):
    """When a run is taken for hung, and how often replicas are compared."""

    seconds: float = setting(1800.0, "longest time in one phase (data, forward_backward, ...); 0 = no limit", least=0)
    digest_every: int = setting(0, "steps between comparisons of the weights of all ranks; 0 = never", least=0)


class Watchdog:
    """Ends this process when it stays too long in one phase, with rank, phase, step and the stacks of all threads.

    The first phase, ``start``, begins with the context: ranks that wait for one which never comes end too.
    """

    def __init__(self, settings: WatchdogSettings) -> None:
        self.settings = settings
        self.step = 0
        self._phase: _Phase | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="watchdog")

    def __enter__(self) -> Self:
        if self.settings.seconds:
            self._phase = _Phase("start", time.monotonic() + self.settings.seconds)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(timeout=5)

    def started(self) -> None:
        """The ranks have met and the models are there; what comes now has phases of its own, or no limit."""
        self._phase = None

    @contextmanager
    def phase(self, name: str, seconds: float | None = None) -> Iterator[None]:
        """What happens inside has a time limit of its own: ``seconds``, None = that of the settings."""
        limit = self.settings.seconds if seconds is None else seconds
        before, self._phase = self._phase, _Phase(name, time.monotonic() + limit)
        try:
            yield
        finally:
            self._phase = before and _Phase(before.name, time.monotonic() + self.settings.seconds)

    def done(self, step: int, engine: Engine) -> None:
        """``step`` has been taken. Compares the replicas where that is due; collective then.

        Raises:
            DivergenceError: naming the ranks whose weights differ from rank 0's.
        """
        self.step = step
        if self.settings.digest_every and step % self.settings.digest_every == 0:
            digests = distributed.gather(hashlib.sha256(repr(engine.digest()).encode()).hexdigest())
            other = [str(rank) for rank, digest in enumerate(digests) if digest != digests[0]]
            if other:
                raise DivergenceError(
                    f"after step {step} the weights of ranks {', '.join(other)} differ from those of rank 0; their memory or "
                    "their devices are at fault: restart from the last checkpoint on other machines"
                )

    def _watch(self) -> None:
        while not self._stop.wait(min(1.0, self.settings.seconds / 4)):
            phase = self._phase
            if phase is not None and time.monotonic() > phase.until:
                where = f"rank {distributed.world().rank}, after step {self.step}, phase {phase.name}"
                where += "" if _awaited is None else f", waiting for rank {_awaited}"
                limit = f"no progress in {self.settings.seconds:g} s (watchdog.seconds)"
                print(f"onecurve: {where}: {limit}; stacks of all threads follow", file=sys.stderr, flush=True)
                faulthandler.dump_traceback(sys.stderr, all_threads=True)
                os._exit(EXIT_CODE)
