"""Where the metrics of a run go: metrics.jsonl, the console, W&B and TensorBoard; the first rank alone writes."""

from __future__ import annotations

import json
import logging
import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np

from trainer.config import Node, schema, setting
from trainer.disk import DiskError, disk_error, read_lines, write_bytes, write_text, writing
from trainer.report.live import LiveReport
from trainer.tracking.console import Console
from trainer.tracking.wandb import BINS, WandB, WandBSink, wandb_mode

log = logging.getLogger(__name__)

RESULTS = ("export", "adapter", "report.html")
"""What a finished run leaves for its user, in its folder."""
COUNTS = ("tokens", "skipped", "skipped_in_a_row")
PROGRESS = "progress.json"
"""Steps ``done`` when an attempt begins, and its ``last`` one: with metrics.jsonl it tells how far a run is."""


@schema("tracking")
@dataclass
class Tracking(Node):
    """Where metrics go besides the console and metrics.jsonl, which are always on."""

    every: int = setting(1, "steps between logged ones", least=1)
    wandb: WandB = setting(WandB)
    tensorboard: bool = setting(True, "write event files under run_dir/tensorboard")
    report: bool = setting(True, "write run_dir/report.html at each evaluation and at the end")


class Sink(Protocol):
    """Takes the scalars of a step, the histogram of a metric over examples, and tables of texts by name."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None: ...
    def histogram(self, step: int, name: str, values: Sequence[float]) -> None: ...
    def table(self, step: int, name: str, rows: Sequence[Mapping[str, Any]]) -> None: ...
    def close(self) -> None: ...


class JsonLines:
    """``metrics.jsonl``, ``histograms.jsonl`` and a file for each table of texts (``samples.jsonl``, ``errors.jsonl``).

    An object a line; metrics are on the disk before a checkpoint that counts on them.

    A run that continues from step n drops what an earlier attempt wrote about later steps, and one that begins again all of
    it; the lines, and those that are damaged, are kept in ``<name>.replaced.jsonl``.
    """

    def __init__(self, folder: Path, done: int) -> None:
        for name in ("metrics", "samples", "errors", "histograms"):
            _rewind(folder / f"{name}.jsonl", folder / f"{name}.replaced.jsonl", done)
        self._file, self._folder = folder / "metrics.jsonl", folder
        with writing(self._file):
            self._metrics = self._file.open("a")

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        counts = {name: int(values[name]) for name in COUNTS if name in values}
        with writing(self._file):
            self._metrics.write(json.dumps({"step": step, **values, **counts}) + "\n")
            self._metrics.flush()

    def histogram(self, step: int, name: str, values: Sequence[float]) -> None:
        counts, edges = np.histogram(values, bins=BINS)
        line = {"step": step, "name": name, "edges": edges.tolist(), "counts": counts.tolist()}
        line["positive"] = int((np.asarray(values) > 0).sum())  # bins do not tell
        self._append("histograms", [line])

    def table(self, step: int, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        self._append(name, [{"step": step, **row} for row in rows])

    def _append(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        file = self._folder / f"{name}.jsonl"
        with writing(file), file.open("a", encoding="utf-8", errors="surrogatepass") as stream:
            stream.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)

    def sync(self) -> None:
        """Wait until what was written is on the disk itself."""
        with writing(self._file):
            os.fsync(self._metrics.fileno())

    def close(self) -> None:
        with writing(self._file):
            self._metrics.close()


class TensorBoardSink:
    """Event files for TensorBoard; what an earlier attempt wrote about later steps is hidden."""

    def __init__(self, folder: Path, done: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._thread_failed = threading.excepthook
        threading.excepthook = self._unless_disk
        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=done + 1 if done else 0)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def histogram(self, step: int, name: str, values: Sequence[float]) -> None:
        self._writer.add_histogram(name, np.asarray(values), step, bins=BINS)

    def table(self, step: int, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        for number, row in enumerate(rows):
            text = f"**{row['prompt']}**{row['completion']}"
            self._writer.add_text(f"{name}/{number}", text, step)

    def close(self) -> None:
        try:
            self._writer.close()
        finally:
            threading.excepthook = self._thread_failed

    def _unless_disk(self, failed: threading.ExceptHookArgs) -> None:
        """What its thread fails by, it raises where it is called next: a full disk needs no traceback before."""
        if not isinstance(failed.exc_value, Exception) or disk_error(failed.exc_value) is None:
            self._thread_failed(failed)


class Tracker:
    """Hands metrics to every sink; on other ranks than the first there is none.

    Args:
        config: what is on.
        folder: the run's.
        rank: of this process.
        done: steps that the run has already taken.
        last: its last step.
        facts: the record of the run with its settings (``config``), for W&B.

    Attributes:
        next_command: what to do with what the run exports; shown at its end.
    """

    def __init__(
        self,
        config: Tracking,
        folder: Path,
        *,
        main: bool,
        done: int,
        last: int,
        facts: Mapping[str, Any],
    ) -> None:
        self.config, self.last, self.latest = config, last, dict[str, float]()
        self.next_command = ""
        self._folder = folder
        self._sinks: list[Sink] = []
        self._lines: JsonLines | None = None
        self._console: Console | None = None
        self._report = LiveReport(folder) if config.report and main else None
        if not main:
            return
        self._lines = JsonLines(folder, done)
        self._sinks = [self._lines]
        write_text(folder / PROGRESS, json.dumps({"done": done, "last": last}) + "\n")
        if config.tensorboard:
            self._sinks.append(TensorBoardSink(folder, done))
        mode = wandb_mode(config.wandb.mode)
        if mode != "disabled":
            self._sinks.append(WandBSink(config.wandb, mode, folder, facts))
        self._console = Console(folder.name, done, last)
        self._sinks.append(self._console)
        steps = f"continuing after step {done:,} of {last:,}" if done else f"{last:,} steps"
        tensorboard, wandb = ["TensorBoard"] * config.tensorboard, [f"W&B {mode}"] * (mode != "disabled")
        logged = ", ".join(["metrics.jsonl", *tensorboard, *wandb])
        self.say([f"{folder}: {steps} on {facts.get('device', 'an unknown device')}; logged to {logged}"])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        failure = error
        for close in (self.sync, *(sink.close for sink in reversed(self._sinks))):
            try:
                with writing(self._folder):
                    close()
            except DiskError as full:  # what ended the run first is what is said
                failure = failure or full
        if self._report is not None:
            self._report.close(failure)
        if failure is not None and error is None:
            raise failure
        if error is None:
            left = [str(self._folder / name) for name in RESULTS if (self._folder / name).exists()]
            self.say([f"done: {', '.join(left)}"] if left else [])
            exported = (self._folder / RESULTS[0]).exists()
            self.say([f"next: {self.next_command}"] if exported and self.next_command else [])

    def step(self, number: int, values: Mapping[str, float]) -> None:
        """Log an optimizer step, if it is one of those that are logged."""
        self.latest.update(values)
        if number % self.config.every == 0 or number == self.last:
            self._write(number, values)

    def log(self, number: int, values: Mapping[str, float]) -> None:
        """Log values of an evaluation after step ``number``."""
        self.latest.update(values)
        self._write(number, values)

    def histograms(self, number: int, by_metric: Mapping[str, Sequence[float]]) -> None:
        """Log how a metric's values are distributed over examples."""
        with writing(self._folder):
            for name, values in by_metric.items():
                for sink in self._sinks:
                    sink.histogram(number, name, values)

    def table(self, number: int, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Log a table of texts."""
        with writing(self._folder):
            for sink in self._sinks if rows else ():
                sink.table(number, name, rows)

    def report(self) -> None:
        """Write ``report.html`` anew, as far as the run has come."""
        if self._report is not None:
            self._report.write()

    def say(self, lines: Sequence[str]) -> None:
        """Show text on the console."""
        if self._console is not None:
            for line in lines:
                self._console.say(line)

    def sync(self) -> None:
        """Wait until what was logged is on the disk itself: a checkpoint is going to count on it."""
        if self._lines is not None:
            self._lines.sync()

    def _write(self, number: int, values: Mapping[str, float]) -> None:
        with writing(self._folder):
            for sink in self._sinks if values else ():  # an evaluation without data measures nothing
                sink.scalars(number, values)


def _rewind(file: Path, aside: Path, done: int) -> None:
    """Keep the lines of steps up to ``done``, none where that is 0; move the others, and damaged ones, to ``aside``."""
    if not file.exists():
        return
    keep, dropped, damaged = list[bytes](), list[bytes](), 0
    for line, row in read_lines(file):
        step = row.get("step") if row is not None else None
        damaged += not isinstance(step, int)
        (keep if isinstance(step, int) and step <= done and done else dropped).append(line)
    if not dropped:
        return
    if damaged:
        log.warning("%s: %d damaged line(s) were moved to %s", file, damaged, aside.name)
    with writing(aside), aside.open("ab") as out:
        out.writelines(line if line.endswith(b"\n") else line + b"\n" for line in dropped)
        os.fsync(out.fileno())
    write_bytes(file, b"".join(keep))
