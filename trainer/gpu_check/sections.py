"""The sections of the check, each in a process of its own: one that fails, hangs or poisons its device stops no other."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from trainer.gpu_check import kernels, speed, training
from trainer.gpu_check.bench import Bench

SECTIONS: dict[str, Callable[[Bench], None]] = {
    "device": kernels.device,
    "varlen": kernels.varlen,
    "model": kernels.model,
    "pipelines": training.pipelines,
    "strategies": training.strategies,
    "generation": speed.generation,
    "stalls": training.stalls,
    "compile": speed.compiling,
    "checkpoint": training.checkpoints,
    "launcher": training.launcher,
    "mfu-125m": speed.utilisation_125m,
    "mfu-1b": speed.utilisation_1b,
}
"""In the order in which they run: what everything else rests on comes first, what takes longest last."""


@dataclass(frozen=True)
class SectionResult:
    """What became of a section.

    section: its name
    status: ok, failed, or skipped because the time was up
    seconds: that it took
    figures: what it measured, by name
    problems: what is wrong, a sentence each
    """

    section: str
    status: str
    seconds: float
    figures: dict[str, Any]
    problems: list[str]

    def line(self) -> str:
        """For people; `json` is for programs."""
        figures = ", ".join(f"{name} {value}" for name, value in self.figures.items())
        head = f"{self.status:<7} {self.section:<11} {self.seconds:6.1f} s  {figures}"
        return "\n".join([head, *(f"        {problem}" for problem in self.problems)])

    def json(self) -> str:
        """On one line."""
        return json.dumps(vars(self))


def run_sections(names: Sequence[str], folder: Path, seconds: float) -> Iterator[SectionResult]:
    """Run sections one after the other; what would begin after ``seconds`` is skipped, what still runs then has failed.

    This process never asks for a device: a process that has cannot be forked any more.
    """
    end = time.monotonic() + seconds
    for name in names:
        left = end - time.monotonic()
        if left <= 0:
            yield SectionResult(name, "skipped", 0.0, {}, ["the time was up; give more --minutes, or name sections"])
            continue
        yield _in_process(name, folder / name, left)


def _in_process(name: str, folder: Path, limit: float) -> SectionResult:
    folder.mkdir(parents=True)
    began, log = time.monotonic(), folder / "output.log"
    process = multiprocessing.get_context("fork").Process(target=_child, args=(name, folder, log))
    process.start()
    process.join(limit)
    late = process.is_alive()
    if late:
        assert process.pid is not None
        os.killpg(process.pid, signal.SIGKILL)
        process.join()
    spent, result = time.monotonic() - began, folder / "result.json"
    if result.is_file():
        written = json.loads(result.read_text())
        return SectionResult(
            name, "failed" if written["problems"] else "ok", spent, written["figures"], written["problems"]
        )
    reason = f"it was not done after {limit:.0f} s" if late else f"its process ended with exit code {process.exitcode}"
    return SectionResult(name, "failed", spent, {}, [f"{reason}; see {log}"])


def _child(name: str, folder: Path, log: Path) -> None:
    """A section, in a process group of its own, whatever it prints in a file."""
    os.setsid()
    file = os.open(log, os.O_WRONLY | os.O_CREAT)
    os.dup2(file, 1)
    os.dup2(file, 2)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    cuda = torch.cuda.is_available()
    bench = Bench(torch.device("cuda", 0) if cuda else torch.device("cpu"), not cuda, folder)
    try:
        SECTIONS[name](bench)
    except Exception as error:
        traceback.print_exc()
        bench.problems.append(f"{type(error).__name__}: {str(error).strip()[:300]}; see {log}")
    partial = folder / "result.tmp"
    partial.write_text(json.dumps({"figures": bench.figures, "problems": bench.problems}))
    partial.rename(folder / "result.json")
    os._exit(0)  # what libraries do when an interpreter ends is no part of the check
