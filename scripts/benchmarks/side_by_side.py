"""Benchmarks whose sides run in processes of their own, alternating: a machine that slows down slows all of them."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

KEPT_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(32 * 2**20), "MALLOC_TRIM_THRESHOLD_": str(2**30)}
"""What `trainer.parallel.malloc.tune_malloc` sets for its own process, for a side that does not."""


def alternate(
    script: str,
    sides: Sequence[str],
    rounds: int,
    rate: str,
    unit: str,
    interpreters: Mapping[str, str] | None = None,
) -> None:
    """Run every side ``rounds`` times as ``script --side NAME`` and print a table; ``rate`` is the figure to compare.

    ``interpreters``: of sides that live in an environment of their own.
    """
    runs: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
    for number in range(rounds):
        for side in sides if number % 2 == 0 else reversed(sides):
            runs[side].append(child(script, side, (interpreters or {}).get(side, sys.executable)))
            print(f"round {number + 1}: {side:12} {json.dumps(runs[side][-1])}", flush=True)
    for side, held in runs.items():
        pairs = list(zip(runs[sides[0]], held, strict=True))
        speed = statistics.median(o[rate] / t[rate] for o, t in pairs)
        memory = statistics.median(o["memory_gb"] / t["memory_gb"] for o, t in pairs)
        figure, most = statistics.median(r[rate] for r in held), max(r["memory_gb"] for r in held)
        beside = f"{sides[0]} beside it: {speed:.2f}x the rate, {memory:.2f}x the memory"
        print(f"{side:21} {figure:9,.2f} {unit} {most:5.2f} GB   {beside}")


def child(script: str, side: str, interpreter: str) -> dict[str, Any]:
    """What one process of the comparison measured."""
    kept = KEPT_MEMORY if "--kept-memory" in sys.argv else {}
    command = [interpreter, script, *sys.argv[1:], "--side", side]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **kept})
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if not lines:
        sys.exit(f"{side} failed:\n{done.stdout}\n{done.stderr}")
    return json.loads(lines[-1].removeprefix("RESULT "))  # type: ignore[no-any-return]


def lines_of(file: Path) -> list[str]:
    """The lines of a file of JSON lines. Only a line feed ends one: a text may hold U+2028, at which ``splitlines`` cuts."""
    return file.read_text(encoding="utf-8").strip("\n").split("\n")


def memory_gb() -> float:
    """Most memory that this process has held: of the GPU where there is one."""
    from trainer.tracking.throughput import peak_memory_gb

    return peak_memory_gb(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
