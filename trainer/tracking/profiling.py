"""Profiler traces and memory snapshots of a few steps."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from trainer.config import Node, schema, setting
from trainer.disk import write_text, writing
from trainer.parallel import distributed

RANGE = re.compile(r"(\d+)-(\d+)")


@schema("profile")
@dataclass
class Profile(Node):
    """Which steps to profile."""

    steps: str | None = setting(None, "A-B: write a trace and a memory snapshot of steps A to B; null = none")

    def problems(self) -> Iterator[str]:
        if self.steps is not None:
            span = RANGE.fullmatch(self.steps)
            if not span or not 1 <= int(span[1]) <= int(span[2]):
                yield f"profile.steps={self.steps} is not A-B with 1 <= A <= B; use for example 10-12"

    @contextmanager
    def recording(self, folder: Path, first: int) -> Iterator[Recorder]:
        """A recorder that is called after every step, beginning with ``first``; it writes to ``folder``."""
        span = tuple(map(int, self.steps.split("-"))) if self.steps else (0, 0)
        recorder = Recorder((span[0], span[-1]), folder)
        recorder.begins(first)
        try:
            yield recorder
        finally:
            recorder.stop()


class Recorder:
    """Starts before step A and stops after step B; every rank writes its own trace."""

    def __init__(self, span: tuple[int, int], folder: Path) -> None:
        self.span, self.folder = span, folder
        self._profiler: Any = None

    def done(self, step: int) -> None:
        """``step`` has been taken."""
        if self._profiler is not None and step >= self.span[1]:
            self.stop()
        self.begins(step + 1)

    def begins(self, step: int) -> None:
        """``step`` is about to be taken."""
        if step != self.span[0] or self._profiler is not None:
            return
        if torch.cuda.is_available():
            torch.cuda.memory._record_memory_history(max_entries=200_000)
        self._profiler = torch.profiler.profile(record_shapes=True, profile_memory=True)
        self._profiler.start()

    def stop(self) -> None:
        """Write what was recorded."""
        profiler, self._profiler = self._profiler, None
        if profiler is None:
            return
        profiler.stop()
        self.folder.mkdir(parents=True, exist_ok=True)
        stem = f"{distributed.world().name}-steps-{self.span[0]}-{self.span[1]}"
        with writing(self.folder):
            profiler.export_chrome_trace(str(self.folder / f"{stem}.trace.json.gz"))
        averages = profiler.key_averages()
        cuda = torch.cuda.is_available()
        order = "self_cuda_time_total" if cuda else "self_cpu_time_total"
        memory = "self_cuda_memory_usage" if cuda else "self_cpu_memory_usage"
        tables = [averages.table(sort_by=order, row_limit=40), averages.table(sort_by=memory, row_limit=40)]
        write_text(self.folder / f"{stem}.operations.txt", "\n\n".join(tables) + "\n")
        if cuda:
            torch.cuda.memory._dump_snapshot(str(self.folder / f"{stem}.memory.pickle"))  # type: ignore[no-untyped-call]
            torch.cuda.memory._record_memory_history(enabled=None)
