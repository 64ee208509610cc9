"""On a real Slurm of two nodes: whatever happens to a job, the run ends with the weights of one that nothing happened to."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.command import TINY, environment
from tests.launch.cluster import NODES, Cluster, needs_slurm
from tests.launch.test_stopping import wait_for_lines

pytestmark = [
    pytest.mark.slow, pytest.mark.timeout(1500),
    pytest.mark.skipif("ONECURVE_SLURM" not in os.environ, reason="minutes on a real Slurm; ONECURVE_SLURM=1 runs them"),
]  # fmt: skip
RUN = [*TINY, "steps=300", "checkpoint.every=25", "optimizer.lr=0.003"]


@pytest.fixture(scope="module")
def cluster():
    needs_slurm()
    with Cluster(environment()) as up:
        yield up


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cluster")


def importing(cluster: Cluster, work: Path) -> dict[str, str]:
    """The cluster's environment, in which ``imports=`` finds what a test writes into ``work``."""
    return {**cluster.env, "PYTHONPATH": f"{cluster.env['PYTHONPATH']}:{work}"}


def submit(cluster: Cluster, work: Path, name: str, *arguments: str, also: tuple[str, ...] = ()) -> str:
    """Submit a run of two ranks; gives the job's number, the last line of what is printed."""
    place = arguments if any(a.startswith("nodes=") for a in arguments) else ("nodes=2", "tasks_per_node=1", *arguments)
    done = subprocess.run(
        [sys.executable, "-m", "trainer", "submit", *place, "--", *RUN, f"run_dir={name}", *also],
        cwd=work, env=importing(cluster, work), capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


def log(work: Path, name: str) -> str:
    return "".join(file.read_text() for file in sorted((work / name / "logs").glob("*.log")))


def weights(work: Path, name: str) -> bytes:
    file = work / name / "export" / "model.safetensors"
    assert file.exists(), log(work, name)
    return file.read_bytes()


@pytest.fixture(scope="module")
def whole(cluster, work) -> bytes:
    """The weights of a run that nothing happened to."""
    job = submit(cluster, work, "whole")
    assert cluster.over(job) == "COMPLETED", log(work, "whole")
    attempt = work / "whole" / "logs" / f"{job}-0"
    assert sorted(file.name for file in attempt.iterdir()) == ["rank0.log", "rank1.log"]
    assert "step 300/300" in (attempt / "rank0.log").read_text()
    return weights(work, "whole")


def test_a_job_that_comes_near_its_limit_again_and_again_goes_on_each_time_under_torchrun_as_well(cluster, work, whole):
    # Slurm's limits are whole minutes: the signal comes some ten seconds after the start, so steps are made to last.
    (work / "lasting.py").write_text(LASTING)
    (work / "lasting").touch()
    job = submit(
        cluster, work, "limit", "time=1", "signal=48", "launcher=torchrun",
        also=("checkpoint.before_deadline=0", "checkpoint.every=0", "imports=[lasting]"),
    )  # fmt: skip
    cluster.until(lambda: log(work, "limit").count('"reason": "SIGUSR2"}; requeued') == 3, 600)
    cluster.run("scontrol", "update", f"jobid={job}", "timelimit=30")
    (work / "lasting").unlink()
    assert cluster.over(job) == "COMPLETED", log(work, "limit")
    attempts = [work / "limit" / "logs" / f"{job}-{number}" for number in range(4)]
    assert all({"rank0.log", "rank1.log"} < {file.name for file in attempt.iterdir()} for attempt in attempts)
    assert weights(work, "limit") == whole


def test_a_job_whose_rank_is_killed_is_requeued_and_goes_on(cluster, work, whole):
    job = submit(cluster, work, "killed")
    wait_for_lines(work / "killed" / "metrics.jsonl", 60)
    os.kill(cluster.processes("run_dir=killed")[-1], signal.SIGKILL)
    assert cluster.over(job) == "COMPLETED", log(work, "killed")
    assert f"{job}-0: failed with exit code" in log(work, "killed")
    assert weights(work, "killed") == whole


def test_a_job_that_is_preempted_goes_on_when_its_turn_comes_again(cluster, work, whole):
    job = submit(cluster, work, "preempted")
    wait_for_lines(work / "preempted" / "metrics.jsonl", 60)
    asked = ("-p", "urgent", "-N2", "--exclusive", "-o", "/dev/null", "--wrap", "true")
    urgent = cluster.run("sbatch", "--parsable", *asked).strip()
    assert cluster.over(urgent) == "COMPLETED"
    assert cluster.over(job) == "COMPLETED", log(work, "preempted")
    assert f"{job}-0: stopped early" in log(work, "preempted")
    assert weights(work, "preempted") == whole


def test_a_job_that_is_cancelled_is_not_requeued_and_one_node_goes_on_with_what_two_began(cluster, work, whole):
    job = submit(cluster, work, "cancelled")
    wait_for_lines(work / "cancelled" / "metrics.jsonl", 60)
    cluster.run("scancel", job)
    assert cluster.over(job) == "CANCELLED", log(work, "cancelled")
    assert json.loads((work / "cancelled" / "stopped.json").read_text())["reason"] == "SIGTERM"
    again = submit(cluster, work, "cancelled", "nodes=1", "tasks_per_node=2")
    assert cluster.over(again) == "COMPLETED", log(work, "cancelled")
    said = (work / "cancelled" / "logs" / f"{again}-0" / "rank0.log").read_text()
    assert "continuing after step" in said
    assert weights(work, "cancelled") == whole


@pytest.mark.skipif(os.environ.get("ONECURVE_SLURM") != "all", reason="a minute; ONECURVE_SLURM=all runs it too")
def test_a_job_whose_node_is_lost_is_requeued_and_goes_on_with_the_node_that_comes_back(cluster, work, whole):
    job = submit(cluster, work, "lost")
    wait_for_lines(work / "lost" / "metrics.jsonl", 60)
    os.kill(int((cluster.folder / f"slurmd-{NODES[1]}.pid").read_text()), signal.SIGKILL)
    # The ranks know nothing of a daemon: on its own the run would be done before the node is given up.
    there = set(cluster.processes(f"SLURMD_NODENAME={NODES[1]}", "environ")) & set(cluster.processes("run_dir=lost"))
    for number in there:
        os.kill(number, signal.SIGSTOP)
    assert there
    try:
        cluster.until(lambda: cluster.state(job) != "RUNNING", 300)
    finally:
        cluster.start_node(NODES[1])
    assert cluster.over(job) == "COMPLETED", log(work, "lost")
    assert weights(work, "lost") == whole


def test_a_sweep_of_jobs_of_two_ranks_outlives_a_point_that_crashes(cluster, work):
    (work / "crash.py").write_text(CRASH)
    (work / "conf" / "pipeline").mkdir(parents=True)
    (work / "conf" / "pipeline" / "crash.yaml").write_text("defaults: [/schema/pipeline/crash@_here_, _self_]\n")
    done = subprocess.run(
        [
            sys.executable, "-m", "trainer", "--multirun", "--config-dir", "conf", "imports=[crash]", "pipeline=crash",
            "hydra/launcher=slurm", "hydra.launcher.nodes=2", "hydra.sweep.dir=sweep", *TINY, "steps=10",
            "optimizer.lr=0.001,0.01", "pipeline.fail=false,true",
        ],
        cwd=work, env=importing(cluster, work), capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    points = json.loads((work / "sweep" / "sweep.json").read_text())["points"]
    assert [p["status"] for p in points] == ["done", "done", "failed (1)", "failed (1)"]
    assert points[0]["value"] < points[1]["value"]
    for point in points[:2]:
        record = (work / point["run_dir"] / "config.yaml").read_text()
        assert "ranks: 2" in record
        assert "group: sweep" in record


LASTING = """
import time
from pathlib import Path
from trainer.pipelines.pretrain import Pretrain

computed = Pretrain.loss

def loss(self, models, batch):
    if Path("lasting").exists():
        time.sleep(0.4)
    return computed(self, models, batch)

Pretrain.loss = loss
"""


CRASH = '''
import os
from dataclasses import dataclass
from trainer.config import schema, setting
from trainer.pipelines.pretrain import Pretrain

@schema("pipeline/crash")
@dataclass
class Crash(Pretrain):
    """Its second rank dies on request."""
    fail: bool = setting(False, "at the first step")

    def loss(self, models, batch):
        if self.fail and os.environ.get("RANK") == "1":
            os.kill(os.getpid(), 9)
        return super().loss(models, batch)
'''
