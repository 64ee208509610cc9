"""Six seeded faults of the campaign: three against DDP, three against ZeRO-3."""

import json
import subprocess
import sys

import pytest

from tests.command import ROOT, environment


@pytest.mark.slow
def test_a_run_that_faults_strike_ends_as_if_none_had(tmp_path):
    command = [sys.executable, "-m", "tests.faults.campaign", str(tmp_path), "--faults", "3", "--seed", "7"]
    command += ["--strategies", "ddp", "zero3", "--watchdog", "15"]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=550)
    assert done.returncode == 0, done.stdout + done.stderr
    struck = [json.loads(line) for line in (tmp_path / "faults.jsonl").read_text().splitlines()]
    assert [fault["strategy"] for fault in struck] == ["ddp"] * 3 + ["zero3"] * 3
    assert len({fault["kind"] for fault in struck}) >= 3
