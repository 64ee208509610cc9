"""What ranks find out about each other: before a run, at its start, and while it goes."""

import os
from pathlib import Path

import pytest

from tests.command import ROOT, TINY, Command, Forked, environment, metrics
from tests.ranks import free_port, on_ranks
from trainer.diagnostics import preflight
from trainer.parallel.watchdog import EXIT_CODE

RUN = [*TINY, "optimizer.lr=0.003", "run_dir=run"]


def measure(folder: Path) -> dict:
    return preflight.facts(folder) | preflight.speeds(folder, 1)


def test_ranks_of_one_machine_have_right_sums_one_clock_and_one_folder(tmp_path):
    every = on_ranks(3, measure, tmp_path / "runs")
    assert [(each["exact"], each["shared"], each["disk"] > 0) for each in every] == [(True, True, True)] * 3
    assert max(each["clock"] for each in every) - min(each["clock"] for each in every) < 1
    assert all(each[name] > 0 for each in every for name in ("compute", "all_reduce", "write", "memory"))
    assert list(preflight.problems(every)) == []
    assert list((tmp_path / "runs").iterdir()) == []


def start(folder, ranks: int, command: list[str], more: list[list[str]]) -> list[Forked]:
    port = free_port()
    return [Forked(folder, [*command, *more[rank]], environment(rank, ranks, port)) for rank in range(ranks)]


def test_a_node_that_was_started_with_other_settings_is_named_before_anything_is_built(tmp_path):
    both = start(tmp_path, 2, [*RUN, "steps=3"], [[], ["seed=1"]])
    said = [process.communicate(timeout=200)[0] for process in both]
    assert [process.returncode for process in both] == [1, 1]
    assert all("configuration is" in text and "start all ranks with the same overrides" in text for text in said)
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.slow
def test_the_preflight_of_a_job_looks_at_all_ranks_and_says_what_it_found(tmp_path):
    both = start(tmp_path, 2, ["preflight", "--megabytes", "1"], [[], []])
    said, other = (process.communicate(timeout=200)[0] for process in both)
    assert [process.returncode for process in both] == [0, 0], said + other
    assert said.startswith("2 rank(s) on 1 node(s)")
    assert all(f" {unit}\n" in said for unit in preflight.MEASURED.values())
    assert "PROBLEM" not in said
    assert list((tmp_path / "runs").iterdir()) == []


@pytest.mark.slow
def test_a_rank_that_waits_for_one_which_never_comes_ends_too(tmp_path):
    alone = Forked(tmp_path, [*RUN, "steps=3", "watchdog.seconds=4"], environment(0, 2, free_port()))
    said = alone.communicate(timeout=200)[0]
    assert alone.returncode == EXIT_CODE
    assert "rank 0, after step 0, phase start: no progress in 4 s" in said


STUCK = '''
"""Pretraining that waits for ever between two laps of a step."""
import time
from dataclasses import dataclass
from trainer.config import schema
from trainer.pipelines.pretrain import Pretrain

@schema("pipeline/stuck")
@dataclass
class Stuck(Pretrain):
    def batches(self, *arguments):
        source = super().batches(*arguments)
        source.observe = lambda metrics: time.sleep(3600)
        return source
'''


def own_pipeline(folder, name: str, text: str, monkeypatch) -> list[str]:
    (folder / f"{name}_pipeline.py").write_text(text)
    (folder / "conf" / "pipeline").mkdir(parents=True)
    (folder / "conf" / "pipeline" / f"{name}.yaml").write_text(f"defaults: [/schema/pipeline/{name}@_here_, _self_]\n")
    monkeypatch.setattr("tests.command.ROOT", f"{ROOT}{os.pathsep}{folder}")
    return ["--config-dir", "conf", f"imports=[{name}_pipeline]", f"pipeline={name}"]


@pytest.mark.slow
def test_a_rank_that_hangs_between_the_laps_of_a_step_ends_too(tmp_path, monkeypatch):
    overrides = own_pipeline(tmp_path, "stuck", STUCK, monkeypatch)
    code, said = Command(tmp_path, *overrides, *RUN, "steps=3", "watchdog.seconds=4").fail()
    assert code == EXIT_CODE
    assert "phase step: no progress in 4 s" in said


SLOW = '''
"""Pretraining whose rank 1 works longer inside of every forward."""
import os, time
from dataclasses import dataclass
from trainer.config import schema
from trainer.pipelines.pretrain import Pretrain

def work(*_):
    end = time.thread_time() + 0.2
    while time.thread_time() < end:
        pass

@schema("pipeline/slow")
@dataclass
class Slow(Pretrain):
    def models(self, *arguments):
        models = super().models(*arguments)
        if os.environ["RANK"] == "1":
            models.trained.model.norm.register_forward_pre_hook(work)
        return models
'''


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "zero2", "zero3"])
def test_the_rank_that_others_wait_for_is_named(strategy, tmp_path, monkeypatch):
    overrides = own_pipeline(tmp_path, "slow", SLOW, monkeypatch)
    overrides += [*RUN, f"strategy={strategy}", "steps=24"]
    said = Command(tmp_path, *overrides, ranks=2).finish()
    assert "the others wait for rank 1 on " in said
    [found] = [line for line in metrics(tmp_path / "run") if "straggler/rank" in line]
    assert (found["step"], found["straggler/rank"]) == (20, 1.0)
    # Rank 1 works 0.2 s more in the one micro-batch of its step.
    assert found["straggler/waiting"] > 0.1
