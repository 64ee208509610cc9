"""Bytes and seconds of exchanges against numbers worked out by hand, and the script that prints them."""

import subprocess
import sys

import pytest

from scripts.benchmarks.scaling import Cluster, Exchange, exchanges, outlook
from tests.command import ROOT, environment
from tests.unit.diagnostics.test_memory import SEVEN, layout
from trainer.models.sizes import parameters_of

CLUSTER = Cluster(
    per_node=4, within=100.0, between=10.0, storage=50.0, node_storage=20.0, reached=0.5, hop=1.0, step=0.1
)


def test_a_ring_sends_what_the_lower_bound_says():
    # 4 ranks, 1000 bytes: 3/4 of them in a reduce-scatter or an all-gather, twice that in an all-reduce, in each of 3 times.
    assert Exchange("all_gather", "", 1000, 3, 1).through(4) == 2250
    assert Exchange("all_reduce", "", 1000, 3, 1).through(4) == 4500


def test_links_between_nodes_limit_a_ring_together():
    assert CLUSTER.speed(4) == 50  # inside a node: 100 x 0.5
    assert CLUSTER.speed(8) == 20  # four cards of 10 together, less than 100; x 0.5
    assert Cluster(per_node=1, within=100.0, between=10.0, reached=0.5).speed(8) == 5


def test_a_ring_waits_for_every_rank_and_a_tree_for_its_height():
    # 16 ranks on 4 nodes: 12 steps of 0.1 and 4 hops of 1; up and down a tree of height 2 with 3 steps inside the node.
    assert CLUSTER.latency(16, "all_gather") == pytest.approx(12 * 0.1 + 4 * 1.0)
    assert CLUSTER.latency(16, "all_reduce") == pytest.approx(2 * (2 * 1.0 + 3 * 0.1))
    assert Exchange("all_gather", "", 1600, 2, 3).seconds(16, CLUSTER) == pytest.approx(2 * 1500 / 20 + 6 * 5.2)


@pytest.mark.parametrize(
    ("stage", "low", "expected"),
    [
        # 10^9 elements, 4 micro-batches, 8 ranks: 7/8 of the bytes, twice for an all-reduce.
        (0, False, 7 / 8 * 2 * 4e9),
        (1, True, 7 / 8 * (2 * 2e9 + 2e9)),
        (2, True, 7 / 8 * (4 * 2 * 2e9 + 2e9)),
        (3, True, 7 / 8 * (4 * 2e9 + 2 * 4 * 2e9)),
        (3, False, 7 / 8 * (4 * 4e9 + 2 * 4 * 4e9)),
    ],
)
def test_gradients_meet_once_a_step_up_to_stage_1_and_once_a_micro_batch_from_stage_2_on(stage, low, expected):
    found = exchanges(1e9, 1e9, 24, layout(stage=stage, low_precision_weights=low, ranks=8), 4)
    assert sum(e.through(8) for e in found) == pytest.approx(expected)


def test_a_small_model_is_gathered_once_a_step_and_frozen_weights_are_gathered_too():
    gathers = [e for e in exchanges(1e6, 5e7, 12, layout(stage=3, ranks=8), 4) if e.kind == "all_gather"]
    assert [(e.bytes, e.times) for e in gathers] == [(1e8, 1)]


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
        (gpus, strategy) for gpus in ("8", "4,096") for strategy in ("ddp", "zero1", "zero2", "zero3")
    ]
    efficiency = {(row[0].strip("| "), row[1]): int(row[7].split("%")[0]) for row in rows}
    assert efficiency["8", "zero3"] > 70 > 40 > efficiency["4,096", "zero3"]
