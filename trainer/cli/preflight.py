"""Look at the nodes of a job before it: what would stop it, what would slow it down, and which node is at fault.

    torchrun --nproc-per-node 8 -m trainer preflight --folder runs -- experiment=7b strategy=zero3
    srun python -m trainer preflight --folder runs             (with the job's own options)
    onecurve preflight --folder runs                           (this machine alone)

On all ranks: equal software and source, equal devices and their speed on a matrix product, clocks, sums over all ranks, the
all-reduce's bandwidth and that of single links, whether --folder is shared, its free room and its speed with fsync; with the
overrides of a run also what a rank is estimated to take. Exit code 0: fine, or only slow; 1: something cannot work;
2: the overrides cannot.
"""

from __future__ import annotations

import argparse
import uuid
from collections.abc import Sequence
from pathlib import Path

import torch

from trainer.cli.parsing import parser_of
from trainer.compose import compose
from trainer.diagnostics import preflight
from trainer.diagnostics.memory import STATE, memory, parameters_of
from trainer.diagnostics.preflight import Findings
from trainer.parallel import distributed
from trainer.parallel import links as exchanges
from trainer.parallel.environment import place
from trainer.parallel.watchdog import Watchdog, WatchdogSettings
from trainer.tracking.throughput import measured_flops


def main(arguments: Sequence[str]) -> int:
    """Measure, and report on rank 0."""
    parser = parser_of("preflight", __doc__)
    parser.add_argument("--folder", type=Path, default=Path("runs"), help="what the job will write to")
    parser.add_argument("--megabytes", type=int, default=64, help="what is sent, written and summed to measure speed")
    parser.add_argument(
        "--timeout", type=float, default=120, help="seconds until a node that does not answer is an error"
    )
    parser.add_argument("overrides", nargs="*", help="of the job, after --: for its estimate of memory")
    a = parser.parse_args(arguments)
    needed, saved = estimated(a.overrides)
    with Watchdog(WatchdogSettings(seconds=a.timeout)) as watchdog, distributed.session(a.timeout) as world:
        findings, lines = look(a, watchdog, needed, saved)
    if world.is_main:
        lines += [f"warning: {w}" for w in findings.warnings] + [f"PROBLEM: {p}" for p in findings.problems]
        print("\n".join(lines))
    return 1 if findings.problems else 0


def look(a: argparse.Namespace, watchdog: Watchdog, needed: float, saved: float) -> tuple[Findings, list[str]]:
    """What is wrong, and what was measured, a line each; every phase has its own limit of time. Collective."""
    world = distributed.world()
    with watchdog.phase("facts"):
        every = distributed.gather(preflight.facts(a.folder, a.overrides))
    hosts = [each["host"] for each in every]
    nodes = list(dict.fromkeys(hosts))
    found = preflight.compare(every, needed, saved)
    with watchdog.phase("sums over all ranks"):
        found.problems += preflight.wrong(hosts, exchanges.wrong_sums())
        offsets = exchanges.clock_offsets()
    found.warnings += preflight.skewed(hosts, offsets)
    with watchdog.phase("devices"):
        speeds = distributed.gather(device_speed(world.device))
    ranks = [f"rank {rank} ({host})" for rank, host in enumerate(hosts)]
    found.warnings += preflight.slower("the device", "TFLOP/s", ranks, speeds, "look at its clock and its temperature")
    with watchdog.phase("folder"):
        found.problems += unshared(a.folder, hosts)
        # One rank a node: they share its way to the disk.
        rank = place().rank
        mine = preflight.write_speed(a.folder, a.megabytes) if rank == hosts.index(hosts[rank]) else 0.0
        every_speed = distributed.gather(mine)
    written = [every_speed[hosts.index(node)] for node in nodes]
    found.warnings += preflight.slower("writing", "MB/s", nodes, written, "look at its mount")
    free = min(each["memory"] for each in every) / 1e9
    lines = [
        f"{world.devices} rank(s) on {len(nodes)} node(s), {every[0]['device']}, {every[0]['devices'] or 'no'} GPU(s) a node",
        f"  matrix product   {spread(speeds)} TFLOP/s",
        f"  clocks           within {max(offsets) - min(offsets):.3f} s",
        f"  write and fsync  {spread(written)} MB/s a node, {every[0]['disk'] / 1e9:,.0f} GB free",
        f"  memory           {free:,.1f} GB free"
        + (f", a rank is estimated to take {needed / 1e9:,.1f}" if needed else ""),
    ]
    if world.devices > 1:
        with watchdog.phase("links"):
            bandwidth = exchanges.all_reduce_speed(a.megabytes)
            links = exchanges.links(a.megabytes / 4)
        of_links = preflight.slow_links(hosts, links)
        found.warnings += of_links.warnings
        found.problems += of_links.problems
        lines.append(f"  all-reduce       {bandwidth:,.2f} GB/s through every rank ({a.megabytes} MB)")
        lines.append(f"  links            {spread([m.speed for m in links])} GB/s, {len(links)} of them, all at once")
    return found, lines


def spread(values: list[float]) -> str:
    """The smallest and the largest."""
    return f"{min(values):,.2f} .. {max(values):,.2f}"


def device_speed(device: torch.device) -> float:
    """TFLOP/s of a matrix product on this rank's device."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return measured_flops(device, dtype, size=8192 if device.type == "cuda" else 512, seconds=0.5) / 1e12


def unshared(folder: Path, hosts: list[str]) -> list[str]:
    """A sentence if not all ranks see what rank 0 writes to ``folder``."""

    def leave() -> str:
        folder.mkdir(parents=True, exist_ok=True)
        token = folder.resolve() / f".shared-{uuid.uuid4().hex}"
        token.touch()
        return str(token)

    token = Path(distributed.run_on_main(leave))
    seen = distributed.gather(token.is_file())
    distributed.run_on_main(token.unlink)
    blind = list(dict.fromkeys(host for host, sees in zip(hosts, seen, strict=True) if not sees))
    return [f"{', '.join(blind)} do not see {folder} of {hosts[0]}; use a folder that all nodes share"] if blind else []


def estimated(overrides: Sequence[str]) -> tuple[float, float]:
    """Bytes that a rank of the run would take, and of its checkpoint; 0 where no run is described."""
    if not overrides:
        return 0.0, 0.0
    cfg = compose(overrides, name="preflight")
    _, architecture = cfg.open_tokenizer_and_shape()
    layout = cfg.layout(architecture, distributed.ranks(), cuda=torch.cuda.is_available())
    return memory(architecture, layout).total, STATE * (layout.adapters or parameters_of(architecture))
