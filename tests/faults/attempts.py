"""Attempts of a run whose ranks are forked from a process that has imported everything: a start costs no imports.

Where the kernel allows it, every rank lives in a network namespace of its own, joined by a virtual cable that can be pulled.
"""

from __future__ import annotations

import ctypes
import itertools
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from trainer.checkpoint.folder import folder_name, steps_in, verify

CLONE_NEWNET = 0x40000000
PORTS = itertools.count(21000 + os.getpid() % 1000 * 20)


class HangError(AssertionError):
    """A process was still there when the watchdog should long have ended it."""


class Rank:
    """One process of an attempt."""

    def __init__(
        self, arguments: Sequence[str], environment: Mapping[str, str], log: Path, namespace: str | None
    ) -> None:
        self.code: int | None = None
        self.log = log
        self.pid = os.fork()
        if self.pid == 0:
            _become(arguments, environment, log, namespace)

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None while it runs."""
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
        return self.code

    def send(self, number: int) -> None:
        if self.poll() is None:
            with suppress(ProcessLookupError):
                os.kill(self.pid, number)


def _become(arguments: Sequence[str], environment: Mapping[str, str], log: Path, namespace: str | None) -> None:
    """Be a rank, in a process that was just forked; never returns."""
    code = 1
    try:
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for stream in (1, 2):
            os.dup2(out, stream)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        if namespace:
            enter(namespace)
        os.environ.update(environment)
        sys.argv = ["trainer", *arguments]
        from trainer.cli import main

        code = main(default="train")
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


class Attempts:
    """A run on ``size`` ranks, half of them on each node, that is started again and again in the same ``run_dir``."""

    def __init__(self, run_dir: Path, logs: Path, arguments: Sequence[str], nodes: Nodes | None, size: int = 2) -> None:
        self.run_dir, self.logs, self.arguments, self.nodes, self.size = run_dir, logs, list(arguments), nodes, size
        self.ranks: list[Rank] = []
        self.number = 0
        self.resumed = 0
        logs.mkdir(parents=True, exist_ok=True)

    def start(self, *more: str) -> None:
        """Start all ranks; notes the checkpoint that they have to continue from."""
        self.number += 1
        self.resumed = self.newest_whole()
        port = next(PORTS)
        master = self.nodes.addresses[0] if self.nodes else "127.0.0.1"
        self.ranks = []
        for rank in range(self.size):
            environment = {
                "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(self.size), "MASTER_ADDR": master,
                "MASTER_PORT": str(port),
            }  # fmt: skip
            node = 2 * rank // self.size
            if self.nodes:
                environment["GLOO_SOCKET_IFNAME"] = self.nodes.interfaces[node]
            log = self.logs / f"attempt-{self.number:03d}-rank-{rank}.log"
            namespace = self.nodes.names[node] if self.nodes else None
            arguments = [*self.arguments, f"run_dir={self.run_dir}", *more]
            self.ranks.append(Rank(arguments, environment, log, namespace))

    def newest_whole(self) -> int:
        """The step of the newest checkpoint that verifies; 0 if there is none."""
        folder = self.run_dir / "checkpoints"
        return next((step for step in steps_in(folder) if not verify(folder / folder_name(step))), 0)

    def step(self) -> int:
        """The last optimizer step that was logged."""
        file = self.run_dir / "metrics.jsonl"
        if not file.exists():
            return 0
        with file.open("rb") as stream:
            stream.seek(max(0, file.stat().st_size - 4000))
            lines = stream.read().split(b"\n")
        for line in reversed(lines[:-1]):
            with suppress(ValueError):
                return int(json.loads(line)["step"])
        return 0

    def saving(self) -> bool:
        """Whether a checkpoint is being written."""
        return any((self.run_dir / "checkpoints").glob("step-*.tmp-*"))

    @property
    def running(self) -> list[Rank]:
        return [rank for rank in self.ranks if rank.poll() is None]

    def wait_for(self, holds, seconds: float, what: str) -> None:  # type: ignore[no-untyped-def]
        """Wait until ``holds()``.

        Raises:
            HangError: after ``seconds``, or where the ranks have ended before.
        """
        end = time.monotonic() + seconds
        while not holds():
            if not self.running and not holds():
                raise HangError(f"the run ended by itself before {what}:\n{self.said()}")
            if time.monotonic() > end:
                raise HangError(f"{seconds:.0f} s passed before {what}:\n{self.said()}")
            time.sleep(0.003)

    def wait_end(self, seconds: float, among: Sequence[Rank] | None = None) -> float:
        """Wait until all ranks (or those ``among``) have ended; gives the seconds that it took.

        Raises:
            HangError: if one is still there after ``seconds``.
        """
        began, ranks = time.monotonic(), self.ranks if among is None else among
        while left := [rank for rank in ranks if rank.poll() is None]:
            if time.monotonic() - began > seconds:
                raise HangError(
                    f"processes {[rank.pid for rank in left]} are still there after {seconds:.0f} s:\n{self.said()}"
                )
            time.sleep(0.01)
        return time.monotonic() - began

    def kill(self) -> None:
        """SIGKILL what still runs."""
        for rank in self.ranks:
            rank.send(signal.SIGKILL)
        self.wait_end(30)

    def said(self, characters: int = 3000) -> str:
        """The end of what the ranks of this attempt have written."""
        return "\n".join(rank.log.read_text()[-characters:] for rank in self.ranks if rank.log.exists())

    def continued_after(self) -> int | None:
        """The step that this attempt says it continues after; None while it has not said so."""
        for line in self.ranks[0].log.read_text().splitlines() if self.ranks[0].log.exists() else ():
            if ": continuing after step " in line:
                return int(line.split(": continuing after step ")[1].split()[0])
        return None


class Nodes:
    """Two network namespaces and a cable between them."""

    def __init__(self) -> None:
        tag = f"{os.getpid() % 100000}"
        self.names = [f"onecurve-{tag}-{n}" for n in range(2)]
        self.interfaces = [f"oc{tag}n{n}" for n in range(2)]
        self.addresses = [f"10.213.7.{n + 1}" for n in range(2)]
        for name in self.names:
            _ip("netns", "add", name)
        _ip("link", "add", self.interfaces[0], "type", "veth", "peer", "name", self.interfaces[1])
        for name, interface, address in zip(self.names, self.interfaces, self.addresses, strict=True):
            _ip("link", "set", interface, "netns", name)
            _ip("-n", name, "addr", "add", f"{address}/24", "dev", interface)
            _ip("-n", name, "link", "set", interface, "up")
            _ip("-n", name, "link", "set", "lo", "up")

    def cut(self) -> None:
        """Pull the cable."""
        _ip("-n", self.names[0], "link", "set", self.interfaces[0], "down")

    def join(self) -> None:
        """Put the cable back."""
        _ip("-n", self.names[0], "link", "set", self.interfaces[0], "up")

    def close(self) -> None:
        for name in self.names:
            subprocess.run(["ip", "netns", "del", name], check=False)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


def enter(namespace: str) -> None:
    """Move this process into a network namespace."""
    descriptor = os.open(f"/run/netns/{namespace}", os.O_RDONLY)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(descriptor, CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), f"setns {namespace}")
    os.close(descriptor)


@contextmanager
def nodes() -> Iterator[Nodes | None]:
    """Two namespaces, or None where this process may not make them."""
    try:
        made = Nodes()
    except (OSError, subprocess.CalledProcessError):
        yield None
        return
    try:
        yield made
    finally:
        made.close()


@contextmanager
def small_disk(folder: Path, megabytes: int) -> Iterator[bool]:
    """A file system of its own in ``folder``; False where this process may not mount one."""
    folder.mkdir(parents=True, exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(command, capture_output=True).returncode == 0
    except OSError:
        mounted = False
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(folder)], check=False)
