"""A run that is told to stop saves after the step under way on all ranks, says so, and goes on as if nothing had happened."""

import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest

from tests.command import TINY, Command, metrics
from tests.ranks import free_port, on_ranks
from trainer.parallel import environment

RUN = [*TINY, "steps=40", "checkpoint.every=0", "optimizer.lr=0.003", "evaluation.every=10"]


def stop_in_the_middle(folder: Path, ports: list[int]) -> dict:
    """On every rank: a whole run; one that only the last rank is told to stop; and that one continued."""
    from trainer import stopping
    from trainer.compose import compose
    from trainer.run import run

    os.chdir(folder)
    stopping.listen()
    last = environment.place().rank == environment.place().size - 1

    def one(name: str, port: int) -> None:
        os.environ["MASTER_PORT"] = str(
            port
        )  # a store of its own: an attempt must not meet the addresses of the one before
        run(compose([*RUN, f"run_dir={name}"], name=name))

    def tell() -> None:
        file = Path("stopped/metrics.jsonl")
        while not file.exists() or len(file.read_text().splitlines()) < 12:
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGUSR2)

    one("whole", ports[0])
    if last:
        threading.Thread(target=tell, daemon=True).start()
    with pytest.raises(stopping.Stopped) as stopped:
        one("stopped", ports[1])
    marker = json.loads(Path("stopped/stopped.json").read_text())
    stopping._asked = 0
    one("stopped", ports[2])
    return {"step": stopped.value.step, "reason": stopped.value.reason, "marker": marker}


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_signal_to_one_rank_stops_all_after_the_same_step_and_the_run_goes_on_bitwise(ranks, tmp_path):
    found = on_ranks(ranks, stop_in_the_middle, tmp_path, [free_port() for _ in range(3)], joined=False)
    step = found[0]["step"]
    assert 10 < step < 40
    assert [(f["step"], f["reason"]) for f in found] == [(step, "SIGUSR2")] * ranks
    assert found[0]["marker"] == {"step": step, "last": 40, "reason": "SIGUSR2"}
    assert not (tmp_path / "stopped" / "stopped.json").exists()
    weights = [(tmp_path / name / "export" / "model.safetensors").read_bytes() for name in ("whole", "stopped")]
    assert weights[0] == weights[1]
    names = ("step", "loss", "eval/loss", "grad_norm")
    lines = [[[line.get(n) for n in names] for line in metrics(tmp_path / run)] for run in ("whole", "stopped")]
    assert lines[0] == lines[1]
    assert all("stopping" not in line for line in metrics(tmp_path / "stopped"))


@pytest.mark.slow
def test_a_run_of_two_processes_that_is_told_to_stop_leaves_a_marker_and_goes_on_bitwise(tmp_path):
    run = [*TINY, "steps=60", "optimizer.lr=0.003", "strategy=zero3"]
    Command(tmp_path, *run, "run_dir=whole", ranks=2).finish()
    command = Command(tmp_path, *run, "run_dir=stopped", ranks=2, fresh=True)
    wait_for_lines(tmp_path / "stopped" / "metrics.jsonl", 12)
    command.processes[1].send_signal(signal.SIGTERM)
    code, said = command.fail()
    step = json.loads((tmp_path / "stopped" / "stopped.json").read_text())["step"]
    assert code == 75
    assert f"onecurve: stopped after step {step} of 60 (SIGTERM) and saved; the same command continues" in said
    assert command.processes[1].returncode == 75
    Command(tmp_path, *run, "run_dir=stopped", ranks=2).finish()
    weights = [(tmp_path / name / "export" / "model.safetensors").read_bytes() for name in ("whole", "stopped")]
    assert weights[0] == weights[1]


@pytest.mark.slow
def test_a_run_near_its_time_limit_saves_and_stops(tmp_path, monkeypatch):
    monkeypatch.setenv("ONECURVE_DEADLINE", str(time.time() + 300))
    code, said = Command(tmp_path, *TINY, "steps=100000", "checkpoint.before_deadline=299", "run_dir=a").fail(
        timeout=300
    )
    assert code == 75
    assert "(the time limit is near) and saved; the same command continues" in said
    step = json.loads((tmp_path / "a" / "stopped.json").read_text())["step"]
    assert (tmp_path / "a" / "checkpoints" / "latest").read_text() == f"step-{step:08d}\n"


def wait_for_lines(file: Path, count: int) -> None:
    end = time.monotonic() + 300
    while not file.exists() or len(file.read_text().splitlines()) < count:
        assert time.monotonic() < end, f"{file} has no {count} lines"
        time.sleep(0.005)
