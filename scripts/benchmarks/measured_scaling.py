"""The times that `scripts/benchmarks/plan.py` predicts, beside times of real steps on 1, 2 and 4 ranks of this machine.

    python scripts/benchmarks/measured_scaling.py [--ranks 2 4] [--rounds 3] [--steps 12] [-- OVERRIDES]

Speed and latency of the links are fitted to collectives of a few bytes and of 64 MiB on as many ranks, each kind to its own:
gloo's reduce-scatter is an all-reduce. Computing is a step of the same strategy on a single rank with one thread (as often
one after the other as ranks share a core), the rest is trainer/diagnostics/traffic.py. Every rank has a row of 64 tokens a
step, so that exchanging is a large part of it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from strategies import ROOT, RUN, STRATEGIES, measured

PIECE = 64 * 2**20
"""Bytes of the tensors that speeds are taken from."""


def main() -> None:
    """Measure, predict, and print both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=12, help="steps of a run; the first two are not timed")
    parser.add_argument("--links", action="store_true", help="one rank that measures the links")
    parser.add_argument("overrides", nargs="*", help="settings of the run")
    a = parser.parse_args()
    if a.links:
        links()
        return
    from trainer.compose import compose

    rows = ("batch.size=1", "batch.micro=1", "batch.length=64")
    configurations = {s: compose([*RUN, f"strategy={s}", *rows, *a.overrides], name="benchmark") for s in STRATEGIES}
    alone = {s: statistics.median(step(s, 1, a) for _ in range(a.rounds)) for s in STRATEGIES}
    print("| ranks | strategy | computing | exchange, predicted | step, predicted | measured | measured / predicted |")
    print("| ---: | --- | ---: | ---: | ---: | ---: | ---: |")
    for ranks in a.ranks:
        speeds = timed_links(ranks)
        for strategy in STRATEGIES:
            computing = alone[strategy] * max(1.0, ranks / (os.cpu_count() or 1))
            exchanging = predicted(configurations[strategy], ranks, speeds)
            seconds = statistics.median(step(strategy, ranks, a) for _ in range(a.rounds))
            print(
                f"| {ranks} | {strategy} | {computing:.3f} s | {exchanging:.3f} s | "
                f"{computing + exchanging:.3f} s | {seconds:.3f} s | {seconds / (computing + exchanging):.2f} |",
                flush=True,
            )
        print({kind: f"{speed / 1e9:.2f} GB/s, {1e6 * waited:.0f} us" for kind, (speed, waited) in speeds.items()})


def step(strategy: str, ranks: int, a: argparse.Namespace) -> float:
    """Median seconds of a step with one row of 64 tokens a rank."""
    rows = [f"batch.size={ranks}", "batch.micro=1", "batch.length=64"]
    settings = argparse.Namespace(ranks=ranks, steps=a.steps, overrides=[*rows, *a.overrides])
    return measured(strategy, settings, threads=1)["step"]


def predicted(cfg: Any, ranks: int, speeds: dict[str, tuple[float, float]]) -> float:
    """Seconds of a step's exchanges by the formulas, with the speeds and latencies of `timed_links`."""
    from trainer.diagnostics.links import Links
    from trainer.diagnostics.traffic import exchanges

    shape, seconds = cfg.model.architecture(cfg.model.vocab_size), 0.0
    for exchange in exchanges(shape, cfg.layout(shape, ranks, cuda=False), ranks):
        speed, waited = speeds[exchange.kind]
        hops = Links(per_node=ranks, step=1.0).latency(exchange.group, exchange.kind)
        seconds += exchange.seconds(Links(per_node=ranks, within=speed, reached=1.0, step=waited / hops))
    return seconds


def timed_links(ranks: int) -> dict[str, tuple[float, float]]:
    """For each kind of collective: bytes a second that pass through a rank by the formula, seconds without any data."""
    from trainer.diagnostics.links import Exchange, Group

    command = [
        str(Path(sys.executable).parent / "torchrun"), "--standalone", f"--nproc-per-node={ranks}", __file__, "--links",
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    said = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout
    [line] = [line for line in said.splitlines() if line.startswith("{")]
    return {
        kind: (Exchange("data", kind, "a tensor", PIECE, 1, 1, Group(ranks, ranks)).sent / (large - tiny), tiny)
        for kind, (tiny, large) in json.loads(line).items()
    }


def links() -> None:
    """Time every kind of collective on this rank; rank 0 prints medians."""
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo")
    ranks, found = dist.get_world_size(), {}

    def seconds(kind: str, size: int, times: int) -> float:
        whole, part = torch.zeros(size // 4), torch.zeros(size // 4 // ranks)
        exchange = {
            "all_reduce": lambda: dist.all_reduce(whole),
            "all_gather": lambda: dist.all_gather_into_tensor(whole, part),
            "reduce_scatter": lambda: dist.reduce_scatter_tensor(part, whole),
        }[kind]
        taken = []
        for _ in range(times):
            dist.barrier()
            started = time.perf_counter()
            exchange()
            taken.append(time.perf_counter() - started)
        return statistics.median(taken)

    for kind in ("all_reduce", "all_gather", "reduce_scatter"):
        found[kind] = (seconds(kind, 4 * ranks, 50), seconds(kind, PIECE, 9))
    if dist.get_rank() == 0:
        print(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
