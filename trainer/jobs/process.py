"""Ranks as processes of this machine: started with their environment and logs, told of signals, ended together."""

from __future__ import annotations

import ctypes
import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from trainer import stopping
from trainer.parallel.environment import Place, place, variables

EVERY = 0.1
"""Seconds between looks at the processes."""
GRACE = 15.0
"""Seconds in which the other ranks of one that failed may log what they saw."""


@dataclass(frozen=True)
class ExitStatus:
    """How processes ended.

    Attributes:
        code: exit code of the first rank that failed, negative for a signal; else the largest, 0 or `stopping.EXIT_CODE`.
        signalled: whether this process was told to stop meanwhile.
    """

    code: int
    signalled: bool


@contextmanager
def places(ranks: int) -> Iterator[list[Place]]:
    """Places for ``ranks`` new ranks on this machine, which have a port to meet at for so long.

    This process's own place where it is one of several ranks or one is asked.
    """
    own = place()
    if own.size > 1 or ranks == 1:
        yield [own]
        return
    with reserved_port() as port:
        yield [Place(rank, ranks, rank, ("127.0.0.1", port)) for rank in range(ranks)]


@contextmanager
def reserved_port() -> Iterator[int]:
    """A port that a server may listen on meanwhile, and that nobody else is given: neither connections nor who asks for any.

    It stays bound, but is not listened on: a server that allows the reuse of addresses, as torch's store does, binds it, too.
    """
    with socket.socket() as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        s.bind(("", 0))
        yield int(s.getsockname()[1])


def run_ranks(
    arguments: Sequence[str],
    ranks: Sequence[Place],
    log: Callable[[Place], Path],
    *,
    environment: Mapping[str, str] = os.environ,
    failed_elsewhere: Callable[[], bool] = lambda: False,
    while_running: Callable[[], None] = lambda: None,
    save_seconds: float = math.inf,
) -> ExitStatus:
    """Run ``python ARGUMENTS`` on every rank, and wait for all of them.

    Signals to this process are passed on: the ranks save and stop. When a rank fails, the others are killed after `GRACE`.

    Args:
        arguments: of the interpreter.
        ranks: from `places`.
        log: the file that a rank's output is appended to.
        environment: variables of all ranks.
        failed_elsewhere: whether a rank that another process started has failed.
        while_running: called about ten times a second.
        save_seconds: the longest time between the first signal and the end.
    """
    running = [_start([sys.executable, *arguments], where, len(ranks), log(where), environment) for where in ranks]
    signalled = failed = math.inf
    failures: list[int] = []
    with _signals_passed_on(running) as signals:
        while any(process.poll() is None for process in running):
            while_running()
            time.sleep(EVERY)
            now = time.monotonic()
            failures = failures or _failures(running)  # those of ranks that are killed below are no reason
            if failures or failed_elsewhere():
                failed = min(failed, now)
            if signals:
                signalled = min(signalled, now)
            if now > failed + GRACE or now > signalled + save_seconds:
                _kill(running)
    failures = failures or _failures(running)
    return ExitStatus(failures[0] if failures else max(process.wait() for process in running), bool(signals))


def _start(
    command: Sequence[str], where: Place, here: int, log: Path, environment: Mapping[str, str]
) -> subprocess.Popen[bytes]:
    """Start one of the ranks that are started ``here``; a single one keeps the place of this process."""
    own = {**variables(where), "LOCAL_WORLD_SIZE": str(here)} if here > 1 else {}
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as output:
        return subprocess.Popen(
            command,
            env={**environment, **own},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=_die_with_parent,
        )


def _die_with_parent() -> None:
    """Let a rank stop when the process that watches it is killed, or it would hold the folder of its run (Linux only)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)


def _kill(running: Sequence[subprocess.Popen[bytes]]) -> None:
    """End the ranks at once, and the processes that they started."""
    for process in running:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def _failures(running: Sequence[subprocess.Popen[bytes]]) -> list[int]:
    """Exit codes of the ranks that have failed by now."""
    return [code for code in (process.poll() for process in running) if code not in (None, 0, stopping.EXIT_CODE)]


@contextmanager
def _signals_passed_on(running: Sequence[subprocess.Popen[bytes]]) -> Iterator[list[int]]:
    """Meanwhile signals are for the processes; yields those that came."""
    signals: list[int] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        signals.append(number)
        for process in running:
            if process.poll() is None:
                process.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in stopping.SIGNALS}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
