"""Runs on a mesh as users start them: killed and continued, and stopped by a signal to any of their ranks."""

import signal
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.command import TINY, Command, metrics
from trainer.checkpoint.folder import steps_in

RUN = [*TINY, "steps=12", "checkpoint.every=4", "optimizer.lr=0.003"]


def weights(run: Path) -> dict[str, np.ndarray]:
    return load_file(run / "export" / "model.safetensors")


def wait_for(command: Command, happened) -> None:
    """Until something has happened, or a rank has ended."""
    end = time.monotonic() + 120
    while not happened() and all(process.poll() is None for process in command.processes):
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "axes"),
    [
        (2, []),
        (4, ["strategy.tensor=2"]),
        (2, ["strategy.sequence=2"]),
    ],
    ids=["fsdp", "fsdp-tensor", "sequence"],
)
def test_a_killed_run_continues_with_the_same_bits(ranks, axes, tmp_path):
    run = [*RUN, "strategy=fsdp", *axes]
    Command(tmp_path, "run_dir=whole", *run, ranks=ranks).finish()
    cut = Command(tmp_path, "run_dir=cut", *run, ranks=ranks)
    wait_for(cut, (tmp_path / "cut" / "checkpoints" / "latest").exists)
    assert all(process.poll() is None for process in cut.processes)
    cut.kill()
    assert "continuing after step" in Command(tmp_path, "run_dir=cut", *run, ranks=ranks).finish()
    whole, continued = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert all(np.array_equal(whole[name], continued[name]) for name in whole)


@pytest.mark.parametrize("axis", ["tensor", "sequence", pytest.param("pipeline", marks=pytest.mark.slow)])
def test_a_signal_to_any_rank_of_a_replica_stops_all_after_the_same_step(axis, tmp_path):
    run = tmp_path / "run"
    endless = [
        *TINY, "batch.micro=2", "steps=100000", "checkpoint.every=100000", "evaluation.every=0", "strategy=fsdp",
        f"strategy.{axis}=2",
    ]  # fmt: skip
    command = Command(tmp_path, "run_dir=run", *endless, ranks=2)
    wait_for(command, (run / "metrics.jsonl").exists)
    command.processes[1].send_signal(signal.SIGTERM)  # it does not lead its replica
    outputs = command.outputs(60)
    assert [process.returncode for process in command.processes] == [75, 75], outputs
    [saved] = steps_in(run / "checkpoints")
    assert metrics(run)[-1]["step"] == saved, outputs
