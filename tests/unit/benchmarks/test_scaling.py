"""What a checkpoint and a start take, and the script that prints it beside what a step exchanges."""

import subprocess
import sys

from scripts.benchmarks.scaling import Cluster, outlook
from tests.command import ROOT, environment
from tests.unit.diagnostics.test_memory import SEVEN, layout
from trainer.models.sizes import parameters_of


def test_an_outlook_never_leaves_a_rank_without_rows():
    found = outlook(SEVEN, layout(stage=3, ranks=64, micro=2), 32, 1e15, 0.4, Cluster(), 291)
    assert found.size == 128
    assert found.saved == 12 * parameters_of(SEVEN)
    # 64 ranks hold a piece of each of 291 tensors in three states.
    assert found.manifest == 110 * (3 * 291 * 64 + 3 * 64)
    low, high = found.efficiency
    assert low < high <= 1


def test_the_script_plans_all_strategies_and_says_where_efficiency_ends():
    command = [sys.executable, ROOT / "scripts" / "benchmarks" / "plan.py", "experiment=7b", "--gpus", "8", "4096"]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=True)
    rows = [line.split(" | ") for line in done.stdout.splitlines() if line.startswith("| ") and "GB" in line]
    assert [(row[0].strip("| "), row[1]) for row in rows] == [
        (gpus, strategy) for gpus in ("8", "4,096") for strategy in ("ddp", "zero1", "zero2", "zero3", "fsdp")
    ]
    efficiency = {(row[0].strip("| "), row[1]): int(row[7].split("%")[0]) for row in rows}
    assert efficiency["8", "zero3"] > 70 > 40 > efficiency["4,096", "zero3"]
