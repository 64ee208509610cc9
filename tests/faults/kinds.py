"""The faults of a campaign: each strikes a run that is going, and leaves it ended (or going on) so that it can recover."""

from __future__ import annotations

import os
import random
import resource
import signal
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from tests.faults.attempts import Attempts
from trainer.checkpoint.folder import folder_name, steps_in

MOMENTS = ("start", "step", "step", "save")
"""When a fault strikes: while the ranks meet and restore, between two steps, or while a checkpoint is written."""


@dataclass(frozen=True)
class Fault:
    """What happens to a run: ``kind`` at ``moment``, ``after`` steps behind the checkpoint, ``delay`` (0 .. 1) later.

    ``rank``: which one it concerns. ``draw`` (0 .. 1): whatever else there is to choose.
    """

    kind: str
    moment: str
    after: int
    delay: float
    rank: int
    draw: float


def planned(seed: str, count: int, kinds: list[str], ranks: int = 2) -> list[Fault]:
    """``count`` faults: all kinds equally often, in an order and with details that depend on ``seed`` alone."""
    chance = random.Random(f"campaign {seed}")
    order: list[str] = []
    while len(order) < count:
        order += chance.sample(kinds, len(kinds))
    return [
        Fault(
            kind,
            chance.choice(MOMENTS),
            chance.randint(1, 7),
            chance.random(),
            chance.randrange(ranks),
            chance.random(),
        )
        for kind in order[:count]
    ]


class Injector:
    """Strikes. ``limit``: seconds within which every process must have ended by itself."""

    def __init__(self, run: Attempts, cache: Path, limit: float, own_disk: bool) -> None:
        self.run, self.cache, self.limit, self.own_disk = run, cache, limit, own_disk

    def kinds(self) -> dict[str, str | None]:
        """Every kind of fault with the reason why it cannot be made here, if there is one."""
        cut = None if self.run.nodes else "needs the right to make network namespaces (root)"
        return {**dict.fromkeys(LOCAL), "network pause": cut, "network cut": cut}

    def strike(self, fault: Fault) -> float:
        """Make the fault happen; gives the seconds until the last rank had ended by itself, 0 where none had to."""
        return getattr(self, f"_{fault.kind.replace(' ', '_')}")(fault)  # type: ignore[no-any-return]

    def _kill(self, fault: Fault) -> float:
        self.run.ranks[fault.rank].send(signal.SIGKILL)
        return self.run.wait_end(self.limit)

    def _kill_all(self, fault: Fault) -> float:
        self.run.kill()
        return 0.0

    def _pause(self, fault: Fault) -> float:
        """Stopped for less than the watchdog's time: the run goes on as if nothing had been."""
        rank = self.run.ranks[fault.rank]
        rank.send(signal.SIGSTOP)
        time.sleep(0.2 + 2 * fault.draw)
        rank.send(signal.SIGCONT)
        return 0.0

    def _stop(self, fault: Fault) -> float:
        """Stopped for good: the others must not wait for ever, nor may it when it wakes up."""
        stopped, others = self.run.ranks[fault.rank], [r for n, r in enumerate(self.run.ranks) if n != fault.rank]
        stopped.send(signal.SIGSTOP)
        seconds = self.run.wait_end(self.limit, others)
        stopped.send(signal.SIGCONT if fault.draw < 0.5 else signal.SIGKILL)
        self.run.wait_end(self.limit)
        return seconds

    def _signal(self, fault: Fault) -> float:
        number = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP][int(3 * fault.draw)]
        for rank in self.run.ranks if fault.delay < 0.5 else [self.run.ranks[fault.rank]]:
            rank.send(number)
        return self.run.wait_end(self.limit)

    def _full_disk(self, fault: Fault) -> float:
        """No room but for a part of a checkpoint; where no disk can be mounted, a limit on the size of files."""
        if not self.own_disk:
            for rank in self.run.running:
                size = int(2e5 * fault.draw)
                resource.prlimit(rank.pid, resource.RLIMIT_FSIZE, (size, size))
            return self.run.wait_end(self.limit)
        disk = self.run.run_dir.parent
        filler, room = disk / "filler", int(3e5 * fault.draw)
        try:
            with filler.open("wb", buffering=0) as file, suppress(OSError):
                while True:  # what is written meanwhile changes how much is free
                    file.write(bytes(4096))
            os.truncate(filler, max(0, filler.stat().st_size - room))
            return self.run.wait_end(self.limit)
        finally:
            filler.unlink()

    def _damaged_checkpoint(self, fault: Fault) -> float:
        """A bit flips in the newest checkpoint, or one of its files is cut short or gone."""
        self.run.wait_for(lambda: len(steps_in(self._checkpoints)) > 1, 60, "there were two checkpoints")
        self.run.kill()
        newest = self._checkpoints / folder_name(steps_in(self._checkpoints)[0])
        files = sorted(newest.iterdir())
        file = files[int(fault.draw * 997) % len(files)]
        harm(file, ("flip", "cut", "remove")[int(3 * fault.draw)], fault.delay)
        return 0.0

    def _truncated_cache(self, fault: Fault) -> float:
        """A file of the prepared data is cut short while nobody reads it."""
        self.run.kill()
        files = sorted(p for p in (self.cache / "rows").glob("*/*") if p.stat().st_size and ".tmp-" not in str(p))
        harm(files[int(fault.draw * 997) % len(files)], "cut", fault.delay)
        return 0.0

    def _network_pause(self, fault: Fault) -> float:
        """Cut for less than the watchdog's time: what was sent arrives later."""
        assert self.run.nodes
        self.run.nodes.cut()
        time.sleep(0.2 + 2 * fault.draw)
        self.run.nodes.join()
        return 0.0

    def _network_cut(self, fault: Fault) -> float:
        assert self.run.nodes
        self.run.nodes.cut()
        try:
            return self.run.wait_end(self.limit)
        finally:
            self.run.nodes.join()

    @property
    def _checkpoints(self) -> Path:
        return self.run.run_dir / "checkpoints"


LOCAL = ("kill", "kill all", "pause", "stop", "signal", "full disk", "damaged checkpoint", "truncated cache")
"""Kinds of faults that need no network."""


def harm(file: Path, how: str, where: float) -> None:
    """Flip a bit of a file, cut it short, or remove it; ``where``: the part of it (0 .. 1) that comes before."""
    size = file.stat().st_size
    if how == "remove":
        file.unlink()
    elif how == "cut":
        os.truncate(file, int(size * where))
    else:
        with file.open("r+b") as stream:
            stream.seek(int((size - 1) * where))
            byte = stream.read(1)[0]
            stream.seek(-1, os.SEEK_CUR)
            stream.write(bytes([byte ^ 4]))
