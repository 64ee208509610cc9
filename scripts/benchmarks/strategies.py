"""What a strategy costs: time to the first step, time of a step beside DDP's, memory of a rank.

    python scripts/benchmarks/strategies.py [--ranks 2] [--rounds 3] [--steps 8] [-- OVERRIDES]

Every run is a process group of its own, started as a user starts it; strategies alternate, so that a machine that slows down
slows all of them. The figure to read is the ratio to DDP of the same round.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from side_by_side import lines_of

STRATEGIES = ("ddp", "zero1", "zero2", "zero3", "fsdp")
ROOT = Path(__file__).resolve().parents[2]
RUN = (
    "experiment=tinyworld", "tokenizer.path=null", "optimizer=adamw", "optimizer.lr=0.001", "model.vocab_size=16384",
    "model.hidden_size=512", "model.intermediate_size=1536", "model.num_hidden_layers=8", "model.num_attention_heads=8",
    "model.num_key_value_heads=4", "model.head_dim=64", "data.documents=2000", "tracking.wandb.mode=disabled",
    "evaluation.every=0", "checkpoint.every=0", "schedule.warmup=1",
)  # fmt: skip
"""34 million parameters on tiny world."""


def main() -> None:
    """Alternate the strategies and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8, help="steps of a run; the first two are not timed")
    parser.add_argument("overrides", nargs="*", help="settings of the run")
    a = parser.parse_args()
    rounds: list[dict[str, dict[str, float]]] = []
    for number in range(a.rounds):
        order = STRATEGIES if number % 2 == 0 else STRATEGIES[::-1]
        rounds.append({strategy: measured(strategy, a) for strategy in order})
        print(json.dumps(rounds[-1]), flush=True)
    print(f"{'':6} {'first step':>11} {'step':>9} {'to ddp':>22} {'memory':>9}")
    for strategy in STRATEGIES:
        first, step, memory = (statistics.median(r[strategy][k] for r in rounds) for k in ("first", "step", "memory"))
        ratios = sorted(r[strategy]["step"] / r["ddp"]["step"] for r in rounds)
        spread = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
        print(f"{strategy:6} {first:9.1f} s {step:7.2f} s {spread:>22} {memory:6.2f} GB")


def measured(strategy: str, a: argparse.Namespace, threads: int | None = None) -> dict[str, float]:
    """Seconds from the command to the first step's end, median seconds of a later step, and GB of rank 0.

    ``threads``: of a rank; None = its part of the cores.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "run" / "metrics.jsonl"
        command = [
            str(ROOT / "launch" / "local.sh"), "-n", str(a.ranks), "--", *RUN, f"run_dir={folder}/run",
            f"strategy={strategy}", f"steps={a.steps}", *a.overrides,
        ]  # fmt: skip
        threads = threads or max(1, (os.cpu_count() or 1) // a.ranks)
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT), "PATH": path}
        started = time.perf_counter()
        process = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        while process.poll() is None and not (file.exists() and file.read_text().count("\n")):
            time.sleep(0.02)
        first = time.perf_counter() - started
        said = process.communicate()[0]
        if process.returncode:
            sys.exit(f"strategy={strategy} failed:\n{said}")
        lines = [line for line in map(json.loads, lines_of(file)) if "tokens_per_second" in line]
        counts = [line["tokens"] - before["tokens"] for before, line in itertools.pairwise(lines)]
        seconds = [n / line["tokens_per_second"] for n, line in zip(counts, lines[1:], strict=True)]
        memory = max(line["memory_gb"] for line in lines)
        return {"first": first, "step": statistics.median(seconds[1:]), "memory": memory}


if __name__ == "__main__":
    main()
