"""Both launchers run the same two ranks to the same losses, and say what is wrong before anything starts."""

import os
import signal
import socket
import subprocess
import time

import psutil
import pytest

from tests.command import ROOT, TINY, environment, metrics
from tests.ranks import free_port

RUN = [*TINY, "steps=6", "optimizer.lr=0.003"]


def launched(folder, *command: str) -> subprocess.CompletedProcess:
    env = {**environment(), "PATH": f"{ROOT / '.venv' / 'bin'}:{environment()['PATH']}"}
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=240)


@pytest.mark.parametrize("strategy", ["ddp", pytest.param("zero2", marks=pytest.mark.slow)])
def test_torchrun_and_deepspeed_give_the_same_losses(strategy, tmp_path):
    torchrun = launched(
        tmp_path, ROOT / "launch" / "local.sh", "-n", "2", "--", "run_dir=a", *RUN, f"strategy={strategy}"
    )
    assert torchrun.returncode == 0, torchrun.stdout + torchrun.stderr
    deepspeed = launched(
        tmp_path, ROOT / "launch" / "deepspeed.sh", "--num_gpus", "2", "--master_port", str(free_port()), "--",
        "run_dir=b", *RUN, f"strategy={strategy}",
    )  # fmt: skip
    assert deepspeed.returncode == 0, deepspeed.stdout + deepspeed.stderr
    losses = [[line["loss"] for line in metrics(tmp_path / name) if "loss" in line] for name in "ab"]
    assert len(losses[0]) == 6
    assert losses[0] == losses[1]


def test_a_port_in_use_is_named(tmp_path):
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = launched(tmp_path, ROOT / "launch" / "local.sh", "-n", "2", "--master", f"127.0.0.1:{port}", "--", *RUN)
    assert done.returncode == 2
    assert f"port {port} of --master 127.0.0.1:{port} is in use" in done.stderr


def test_a_launcher_s_mistake_is_named(tmp_path):
    done = launched(tmp_path, ROOT / "launch" / "local.sh", "--ranks", "2", "--", *RUN)
    assert done.returncode == 2
    assert "unknown argument --ranks" in done.stderr
    done = launched(tmp_path, ROOT / "launch" / "local.sh", "-n", "2", "--nodes", "2", "--master", "node0", "--", *RUN)
    assert done.returncode == 2
    assert "names no port" in done.stderr


@pytest.mark.parametrize(
    "strategy", ["ddp", *(pytest.param(s, marks=pytest.mark.slow) for s in ("zero1", "zero2", "zero3"))]
)
def test_a_run_whose_rank_is_killed_recovers_by_itself_and_ends_with_the_same_weights(strategy, tmp_path):
    run = [*TINY, "steps=40", "checkpoint.every=5", "optimizer.lr=0.003", f"strategy={strategy}"]
    script = [str(ROOT / "launch" / "local.sh"), "-n", "2", "--restarts", "1", "--"]
    whole = launched(tmp_path, *script, "run_dir=whole", *run)
    assert whole.returncode == 0, whole.stdout + whole.stderr
    env = {**environment(), "PATH": f"{ROOT / '.venv' / 'bin'}:{environment()['PATH']}"}
    with (tmp_path / "output").open("w") as output:
        killed = subprocess.Popen(
            [*script, "run_dir=killed", *run], cwd=tmp_path, env=env, stdout=output, stderr=output
        )
        wait_for_line(tmp_path / "killed" / "metrics.jsonl", 12)
        os.kill(psutil.Process(killed.pid).children()[-1].pid, signal.SIGKILL)
        code = killed.wait(timeout=200)
    said = (tmp_path / "output").read_text()
    assert code == 0, said
    assert "continuing after step" in said
    tensors = [(tmp_path / name / "export" / "model.safetensors").read_bytes() for name in ("whole", "killed")]
    assert tensors[0] == tensors[1]
    assert [line["loss"] for line in metrics(tmp_path / "whole") if "loss" in line] == [
        line["loss"] for line in metrics(tmp_path / "killed") if "loss" in line
    ]


def wait_for_line(file, count: int) -> None:
    end = time.monotonic() + 120
    while not file.exists() or len(file.read_text().splitlines()) < count:
        assert time.monotonic() < end, f"{file} has no {count} lines"
        time.sleep(0.01)
