"""Sweeps: a point is a run in processes of its own; one that fails is reported and ends nothing."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import hydra
import pytest
from hydra import initialize_config_dir
from omegaconf import OmegaConf

from tests.command import TINY, environment
from trainer.compose import config_folder
from trainer.jobs import sweep

RUN = [*TINY, "steps=4", "optimizer.lr=0.003"]


def multirun(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    env = {**environment(), "PYTHONPATH": f"{environment()['PYTHONPATH']}:{folder}"}
    command = [sys.executable, "-m", "trainer", "--multirun", *arguments]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=300)


def test_settings_that_look_like_markup_are_shown_as_they_are(tmp_path, capsys):
    (tmp_path / "points").mkdir()
    for n, name in enumerate("ab"):
        point = sweep.Point(
            n, [f"data.train=[/data/{name}.txt]", "seed=[/b]"], "done", 1.0, "loss", "minimize", f"run-{n}"
        )
        (tmp_path / "points" / f"{name}.json").write_text(json.dumps(vars(point)))
    assert sweep.summary(tmp_path, ["-m"]) == 2
    assert "data.train=[/data/a.txt]" in capsys.readouterr().out


def test_a_plugin_whose_package_is_not_there_is_named(monkeypatch):
    monkeypatch.setitem(sweep.PLUGINS, "hydra/sweeper=mine", "no_such_package.plugin")
    [problem] = sweep.problems(["hydra/sweeper=mine"])
    assert problem == "hydra/sweeper=mine needs packages that are not installed; pip install 'onecurve[sweep]'"


def test_a_sweep_of_two_points_compares_what_is_done_and_skips_it_the_next_time(tmp_path):
    command = [*RUN, "batch.size=8,7", "hydra.sweep.dir=sweep", "sweep.metric=loss"]
    done = multirun(tmp_path, *command)
    assert done.returncode == 0, done.stdout + done.stderr
    facts = json.loads((tmp_path / "sweep" / "sweep.json").read_text())
    good, bad = facts["points"]
    assert (facts["metric"], facts["direction"]) == ("loss", "minimize")
    assert (good["status"], bad["status"], bad["value"]) == ("done", "refused", None)
    lines = (tmp_path / good["run_dir"] / "metrics.jsonl").read_text().splitlines()
    assert good["value"] == [values["loss"] for values in map(json.loads, lines) if "loss" in values][-1]
    assert good["run_dir"] == f"sweep/{sweep.digest(good['overrides'])}"
    assert "group: sweep" in (tmp_path / good["run_dir"] / "config.yaml").read_text()
    log = tmp_path / "sweep" / "logs" / Path(bad["run_dir"]).name / "rank0.log"
    assert "batch.size=7 is not a multiple of 4" in log.read_text()
    assert "batch.size=8" in done.stdout.split("overrides")[-1]
    assert not (tmp_path / bad["run_dir"]).exists()


@pytest.mark.slow
def test_points_of_two_ranks_have_a_group_and_a_port_of_their_own_and_are_not_run_twice(tmp_path):
    command = [*RUN, "sweep.ranks=2", "strategy=zero2", "seed=1,2", "hydra.sweep.dir=sweep"]
    first = multirun(tmp_path, *command)
    assert first.returncode == 0, first.stdout + first.stderr
    points = json.loads((tmp_path / "sweep" / "sweep.json").read_text())["points"]
    assert [p["status"] for p in points] == ["done", "done"]
    assert all("ranks: 2" in (tmp_path / p["run_dir"] / "config.yaml").read_text() for p in points)
    again = multirun(tmp_path, *command)
    assert again.returncode == 0
    assert json.loads((tmp_path / "sweep" / "sweep.json").read_text())["points"] == points
    assert all(len((tmp_path / p["run_dir"] / "metrics.jsonl").read_text().splitlines()) == 5 for p in points)


@pytest.mark.slow
def test_a_search_goes_on_after_trials_that_die_or_have_no_number(tmp_path):
    if importlib.util.find_spec("hydra_plugins.hydra_optuna_sweeper") is None:
        pytest.skip("needs pip install 'onecurve[sweep]'")
    (tmp_path / "odd.py").write_text(ODD)
    (tmp_path / "conf" / "pipeline").mkdir(parents=True)
    (tmp_path / "conf" / "pipeline" / "odd.yaml").write_text("defaults: [/schema/pipeline/odd@_here_, _self_]\n")
    done = multirun(
        tmp_path, "--config-dir", "conf", "imports=[odd]", "pipeline=odd", *TINY, "steps=2", "sweep.metric=height",
        "sweep.direction=maximize", "hydra/sweeper=search", "hydra.sweeper.n_trials=6", "hydra.sweep.dir=sweep",
        "hydra.sweeper.sampler.seed=7",  # two trials of each kind; the default seed draws no NaN
        "pipeline.odd=choice(0,1,2)", "pipeline.height=interval(1.0,2.0)",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    points = json.loads((tmp_path / "sweep" / "sweep.json").read_text())["points"]
    assert len(points) == 6
    assert {p["status"] for p in points} == {"done", "failed (SIGKILL)", "not finite"}
    heights = [p["value"] for p in points if p["status"] == "done"]
    assert heights == sorted(heights, reverse=True)
    assert all(1 <= height <= 2 for height in heights)
    assert f"Best value: {heights[0]}" in done.stdout


@pytest.mark.parametrize(("choice", "setting", "value"), [
    ("hydra/launcher=slurm", "hydra.launcher.max_num_timeout", 1000),
    ("hydra/launcher=jobs", "hydra.launcher.tasks_per_node", 1),
    ("hydra/sweeper=search", "hydra.sweeper.direction", "maximize"),
])  # fmt: skip
def test_every_shipped_launcher_and_sweeper_composes(choice, setting, value):
    if importlib.util.find_spec(sweep.PLUGINS[choice]) is None:
        pytest.skip("needs pip install 'onecurve[sweep]'")
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        cfg = hydra.compose("train", overrides=[choice, "sweep.direction=maximize"], return_hydra_config=True)
    assert OmegaConf.select(cfg, setting) == value


@pytest.mark.parametrize("argument", ["run_dir=x", "resume=never", "+run_dir=x"])
def test_a_folder_that_all_points_would_share_is_refused(argument):
    [problem] = sweep.problems([argument, "--multirun"])
    assert problem.startswith(f"{argument}: every point of a sweep has a run_dir of its own")


def test_a_sweep_that_every_rank_would_run_is_refused(monkeypatch):
    for name, value in environment(rank=0, size=2, port=1).items():
        monkeypatch.setenv(name, value)
    [problem] = sweep.problems(["--multirun", "seed=1,2"])
    assert problem.startswith("--multirun on 2 ranks would run every point on each")


def test_a_sweep_is_the_same_whatever_carries_it_out():
    local = sweep.folder_of(["--multirun", "seed=1,2", "steps=3"])
    assert local == sweep.folder_of(["-m", "steps=3", "seed=1,2", "hydra/launcher=slurm", "hydra.launcher.nodes=2"])
    assert local != sweep.folder_of(["--multirun", "seed=1,2,3", "steps=3"])


ODD = '''
import os
from dataclasses import dataclass
import torch
from trainer.config import schema, setting
from trainer.pipelines.pretrain import Pretrain

@schema("pipeline/odd")
@dataclass
class Odd(Pretrain):
    """Reports its height, nothing, or dies."""
    odd: int = setting(0, "1: dies; 2: its height is not a number")
    height: float = setting(1.0, "what it reports")

    def loss(self, models, batch):
        loss, metrics = super().loss(models, batch)
        if self.odd == 1:
            os.kill(os.getpid(), 9)
        height = torch.tensor(float("nan") if self.odd == 2 else self.height)
        metrics.mean("height", height, 1.0)
        return loss, metrics
'''


def test_a_password_that_the_points_would_record_is_refused():
    [problem] = sweep.problems(["--multirun", "seed=1,2", "data.cache=http://me:hunter2@host/x"])
    assert problem.startswith("data.cache=http://***@host/x holds a user or password, which the record of every point")
