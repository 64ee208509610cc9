"""Stages as processes on this machine, and what a person sees of a lifecycle while they work."""

from __future__ import annotations

import ctypes
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import rich.console
import torch
from rich.live import Live
from rich.table import Table

from trainer.jobs.lifecycle import Lifecycle
from trainer.jobs.recipe import Stage

ROOT = Path(__file__).resolve().parents[2]
EVERY = 0.5
"""Seconds between looks at a stage."""
QUIET = 15.0
"""Seconds between plain lines where there is no terminal."""
PATIENCE = 120.0
"""Seconds that a stage has to save and stop."""
STEP = re.compile(rb"^step (\d+)/(\d+)", re.MULTILINE)


class Interrupted(Exception):  # noqa: N818  (not an error: somebody asked for it)
    """The lifecycle was told to stop."""


class Overview:
    """Stages with their progress: a live table on a terminal, plain lines elsewhere."""

    def __init__(self, life: Lifecycle) -> None:
        self.life = life
        self._console = rich.console.Console(highlight=False)
        self._live: Live | None = None
        self._running, self._progress, self._began, self._said = "", "", 0.0, 0.0

    def __enter__(self) -> Overview:
        if self._console.is_terminal:
            self._live = Live(self._table(), console=self._console, refresh_per_second=4)
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.update(self._table())
            self._live.stop()

    def say(self, text: str) -> None:
        """A line of its own."""
        if text:
            self._console.print(text, markup=False)
        self._running = ""

    def begins(self, name: str, command: Sequence[str]) -> None:
        """A stage starts."""
        self._running, self._progress, self._began, self._said = name, "", time.monotonic(), time.monotonic()
        if self._live is None:
            print(f"{name}: {' '.join(command)}", flush=True)

    def looks(self, progress: str) -> None:
        """How the stage that runs is getting on."""
        self._progress = progress
        now = time.monotonic()
        if self._live is not None:
            self._live.update(self._table())
        elif progress and now - self._said >= QUIET:
            self._said = now
            print(f"{self._running}: {progress}", flush=True)

    def _table(self) -> Table:
        table = Table(box=None, pad_edge=False)
        for column in ("stage", "status", "", "seconds"):
            table.add_column(column, justify="right" if column == "seconds" else "left")
        results: dict[str, list[str]] = {}
        for row in self.life.record.get("results", []):
            results.setdefault(row["of"], []).append(f"{row['name'].partition(': ')[2]} {row['value']:.4g}")
        for name, entry in self.life.stages.items():
            running = name == self._running
            seconds = time.monotonic() - self._began if running else entry.get("seconds")
            shown = self._progress if running else ", ".join(results.get(name, []))
            table.add_row(name, entry["status"], shown, f"{seconds:.0f}" if seconds is not None else "")
        return table


class Local:
    """Starts stages here: scripts as one process, runs on ``ranks`` of them."""

    def __init__(self, ranks: int, logs: Path) -> None:
        self.ranks, self.logs = ranks, logs
        logs.mkdir(parents=True, exist_ok=True)

    def log(self, name: str) -> Path:
        """Everything that a stage's processes said, of all attempts."""
        return self.logs / f"{name}.log"

    def tail(self, name: str) -> str:
        """The end of it."""
        return "\n".join(self.log(name).read_text(errors="replace").splitlines()[-25:])

    def start(self, stage: Stage, arguments: Sequence[str], folder: str, overview: Overview) -> int:
        """Carry a stage out and give its exit code.

        Raises:
            Interrupted: if the lifecycle was told to stop meanwhile; the stage has stopped by then.
        """
        command, shown = self.command(stage, arguments, folder)
        overview.begins(stage.name, shown)
        stop: list[int] = []

        def told(number: int, frame: FrameType | None) -> None:
            stop.append(number)

        before = {number: signal.signal(number, told) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            with self.log(stage.name).open("ab") as log:
                begin = log.tell()
                process = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=self.environment(),
                    start_new_session=True, preexec_fn=_die_with_parent,
                )  # fmt: skip
                while process.poll() is None and not stop:
                    overview.looks(progress(self.log(stage.name), begin, Path(folder)))
                    time.sleep(EVERY)
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGTERM)
                    try:
                        process.wait(PATIENCE)
                    except subprocess.TimeoutExpired:
                        os.killpg(process.pid, signal.SIGKILL)
                        process.wait()
                if stop:
                    raise Interrupted
                return process.returncode
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def command(self, stage: Stage, arguments: Sequence[str], folder: str) -> tuple[list[str], list[str]]:
        """What is started, and how a person would write it."""
        if stage.run is None:
            return [sys.executable, str(ROOT / arguments[0]), *arguments[1:]], ["python", *arguments]
        overrides = [*arguments, f"run_dir={folder}", f"name={stage.name}"]
        if self.ranks == 1:
            return [sys.executable, "-m", "trainer", *overrides], ["python -m trainer", *overrides]
        launch = ["--standalone", "--nproc-per-node", str(self.ranks), "-m", "trainer"]
        return [sys.executable, "-m", "torch.distributed.run", *launch, *overrides], ["torchrun", *launch, *overrides]

    def environment(self) -> Mapping[str, str]:
        """Several ranks share the machine's cores: one process of two threads is slower than two of one."""
        found = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")])),
        }
        if not torch.cuda.is_available():
            found.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // self.ranks)))
        return found


def progress(log: Path, begin: int, folder: Path) -> str:
    """How far a stage is: the step, and the newest loss and held-out figures."""
    with log.open("rb") as stream:
        stream.seek(max(begin, log.stat().st_size - 20_000))
        steps = STEP.findall(stream.read())
    file = folder / "metrics.jsonl"
    rows = _last_rows(file) if file.is_file() else []
    said = [f"step {int(rows[-1]['step'])}" + (f" of {int(steps[-1][1])}" if steps else "")] if rows else []
    for key in ("loss", "objective/score", "eval/loss", "eval/accuracy", "eval/exact_match"):
        value = next((row[key] for row in reversed(rows) if key in row), None)
        said += [] if value is None else [f"{key} {value:.4g}"]
    return "  ".join(said)


def _last_rows(file: Path) -> list[dict[str, Any]]:
    """The rows at the end of a file that may be growing."""
    with file.open("rb") as stream:
        stream.seek(max(0, file.stat().st_size - 50_000))
        lines = stream.read().split(b"\n")
    rows = []
    for line in lines[1:-1] if len(lines) > 2 else lines[:-1]:
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


def _die_with_parent() -> None:
    """Let a stage stop when the lifecycle is killed, or it would hold the folder of its run (Linux only)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)
