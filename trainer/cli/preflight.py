"""Look at the nodes of a job before it: what would stop it, what would slow it down, and which node is at fault.

    torchrun --nproc-per-node 8 -m trainer preflight --folder runs
    srun python -m trainer preflight --folder runs             (with the job's own options)
    onecurve preflight --folder runs                           (this machine alone)

On all ranks: equal software, source and devices, a matrix product's speed, clocks, sums over all ranks and their bandwidth,
whether --folder is shared, its free room and its speed with fsync. Exit code 0: fine, or only slow; 1: something cannot work.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from trainer.cli.parsing import parser_of
from trainer.diagnostics import preflight
from trainer.parallel import distributed
from trainer.parallel.watchdog import Watchdog, WatchdogSettings


def main(arguments: Sequence[str]) -> int:
    """Measure, and report on rank 0."""
    parser = parser_of("preflight", __doc__)
    parser.add_argument("--folder", type=Path, default=Path("runs"), help="what the job will write to")
    parser.add_argument("--megabytes", type=int, default=64, help="what is written and summed to measure speed")
    parser.add_argument("--timeout", type=float, default=120, help="seconds until a rank that is silent is an error")
    a = parser.parse_args(arguments)
    limit = WatchdogSettings(seconds=a.timeout)
    with Watchdog(limit) as watchdog, distributed.session(a.timeout) as world, watchdog.phase("preflight"):
        every = distributed.gather(preflight.facts(a.folder) | preflight.speeds(a.folder, a.megabytes))
    problems = list(preflight.problems(every))
    if world.is_main:
        print(f"{len(every)} rank(s) on {len({each['host'] for each in every})} node(s), {every[0]['device']}")
        for name, unit in preflight.MEASURED.items():
            values = [each[name] for each in every]
            print(f"{min(values):12,.2f} .. {max(values):,.2f} {unit}")
        for warning in preflight.warnings(every):
            print(f"warning: {warning}")
        for problem in problems:
            print(f"PROBLEM: {problem}")
    return 1 if problems else 0
