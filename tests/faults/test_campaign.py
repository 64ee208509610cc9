"""Seeded faults of the campaign: against DDP, ZeRO-3, stages of a pipeline, and FSDP with blocks of matrices."""

import json
import subprocess
import sys

import pytest

from tests.command import ROOT, environment


def struck(folder, count, *arguments):
    """The faults of a campaign that all checks have passed; ``count``: against each strategy."""
    command = [sys.executable, "-m", "tests.faults.campaign", str(folder), "--faults", str(count), "--watchdog", "15"]
    done = subprocess.run(
        [*command, *arguments], cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=550
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return [json.loads(line) for line in (folder / "faults.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_a_run_that_faults_strike_ends_as_if_none_had(tmp_path):
    faults = struck(tmp_path, 2, "--seed", "7", "--strategies", "ddp", "zero3")
    assert [fault["strategy"] for fault in faults] == ["ddp"] * 2 + ["zero3"] * 2
    assert len({fault["kind"] for fault in faults}) >= 3


@pytest.mark.slow
def test_a_stage_that_stands_still_ends_the_others_in_time_and_the_run_goes_on(tmp_path):
    [fault] = struck(tmp_path, 1, "--seed", "3", "--strategies", "fsdp-pipeline", "--kinds", "stop")
    assert (fault["kind"], fault["moment"], fault["rank"], fault["ended"]) == ("stop", "step", 1, True)


@pytest.mark.slow
def test_a_rank_of_a_replica_killed_or_stopped_and_a_block_damaged_cost_nothing(tmp_path):
    kinds = ["kill", "stop", "damaged checkpoint"]
    faults = struck(tmp_path, 3, "--seed", "45", "--strategies", "fsdp-tensor", "--kinds", *kinds)
    assert sorted(fault["kind"] for fault in faults) == sorted(kinds)
