"""Stopping before the end: a signal or a time limit asks, the ranks agree, and the run ends after a step with a checkpoint.

Imported before torch, whose import takes seconds in which a scheduler may already send its signal.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Mapping
from types import FrameType

EXIT_CODE = 75
"""Of a run that stopped early and can be continued (EX_TEMPFAIL), as of one that the watchdog ended."""
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
SAME_REQUEST = 3.0
"""Seconds in which further signals belong to the first: a launcher passes on what the scheduler sent to everyone."""
DEADLINES = ("ONECURVE_DEADLINE", "SLURM_JOB_END_TIME")
"""Variables that tell when this process will be ended, in seconds since 1970."""

TIME_LIMIT = 1000
"""A rank's stop request near the deadline, in place of a signal's number."""

_asked = 0
_process: int | None = None
_before_deadline = 0.0


class Stopped(Exception):  # noqa: N818 - it is no error
    """The run stopped early, as it was asked to, and is saved."""

    def __init__(self, step: int, last: int, reason: str) -> None:
        self.step, self.last, self.reason = step, last, reason
        super().__init__(f"stopped after step {step} of {last} ({reason}) and saved; the same command continues")


def listen() -> None:
    """Take the signals as requests to stop: the first is remembered, a second ends the process at once.

    A thread answers, woken by the signal itself: the interpreter runs handlers between two of its own instructions only, and
    may just then wait for another rank.
    """
    global _process
    if _process == os.getpid():
        return
    _process = os.getpid()
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    # A process that was forked before it executes its own program has our handlers and must die as it would without them.
    os.register_at_fork(after_in_child=forget)
    for number in SIGNALS:
        signal.signal(number, _handled_by_the_thread)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    threading.Thread(target=_answer, args=(reading,), daemon=True, name="signals").start()


def forget() -> None:
    """Give signals their usual effect again."""
    global _asked, _process
    if _process is not None:
        _asked, _process = 0, None
        signal.set_wakeup_fd(-1)
        for number in SIGNALS:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)


def stop_request(environment: Mapping[str, str] = os.environ) -> int:
    """Why this rank was asked to stop: a signal's number, or `TIME_LIMIT`; else 0. The ranks exchange it every step."""
    if not _asked and _before_deadline:
        end = deadline(environment)
        if end is not None and time.time() > end - _before_deadline:
            return TIME_LIMIT
    return _asked


class StopConsensus:
    """What the ranks' stop requests come to: all see the same largest request of the same step, and stop after it."""

    def __init__(self, before_deadline: float) -> None:
        """``before_deadline``: seconds that are left for the last save; 0 = do not look at the time limit."""
        global _before_deadline
        _before_deadline = before_deadline
        self.request = 0

    def update(self, request: float) -> None:
        """Take the largest request of all ranks in a step; the first one that is none of 0 stays."""
        self.request = self.request or int(request)

    @property
    def reached(self) -> bool:
        """Whether to save and end now."""
        return self.request > 0

    @property
    def reason(self) -> str:
        """The signal's name, or the time limit."""
        return "the time limit is near" if self.request == TIME_LIMIT else signal.Signals(self.request).name


def deadline(environment: Mapping[str, str] = os.environ) -> float | None:
    """When this process will be ended, as the scheduler told it; None where nothing is known."""
    for name in DEADLINES:
        text = environment.get(name, "")
        if text.replace(".", "", 1).isdigit():
            return float(text)
    return None


def _answer(reading: int) -> None:
    global _asked
    first = 0.0
    while received := os.read(reading, 1):
        number = received[0]
        if number not in SIGNALS:
            continue
        name = signal.Signals(number).name
        if not _asked:
            _asked, first = number, time.monotonic()
            _say(f"{name}: stopping after the step under way, then saving; a second signal ends at once")
        elif time.monotonic() - first > SAME_REQUEST:
            _say(f"second signal ({name}): ending at once, without saving")
            os._exit(128 + number)


def _say(text: str) -> None:
    # Not print: the thread that was interrupted may hold the stream.
    os.write(2, f"onecurve: {text}\n".encode())


def _handled_by_the_thread(number: int, frame: FrameType | None) -> None:
    pass
