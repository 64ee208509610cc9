"""Whole runs in this process: resumed, evaluated, exported, stopped; and what is refused before anything is built."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.command import TINY, metrics
from trainer import stopping
from trainer.compose import compose
from trainer.config import ConfigError
from trainer.models.load import Model
from trainer.run import run
from trainer.stopping import Stopped

SMALL = [*TINY, "optimizer.lr=0.003", "evaluation.rows=4", "tracking.report=false"]
VOLATILE = ("tokens_per_second", "mfu", "memory_gb", "time/")


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def go(*overrides: str) -> dict[str, float]:
    return run(compose([*SMALL, *overrides]))


def steady(folder) -> list[dict]:
    return [{k: v for k, v in line.items() if not k.startswith(VOLATILE)} for line in metrics(folder)]


def test_a_run_leaves_metrics_a_checkpoint_and_an_exported_model(tmp_path):
    latest = go("run_dir=r", "steps=3", "evaluation.every=2", "evaluation.first=true")
    lines = metrics(tmp_path / "r")
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3]
    assert [line["step"] for line in lines if "eval/loss" in line] == [0, 2, 3]
    assert latest["loss"] == lines[-2]["loss"]
    assert 3 * 8 * 32 < lines[-2]["tokens"] <= 3 * 8 * 64  # rows of 64 with some padding
    assert (tmp_path / "r" / "checkpoints" / "step-00000003" / "manifest.json").is_file()
    record = json.loads((tmp_path / "r" / "export" / "onecurve.json").read_text())
    assert record["step"] == 3
    assert record["config"]["batch"]["size"] == 8
    assert Model(path=str(tmp_path / "r" / "export")).architecture(512).hidden_size == 32


def test_a_run_that_was_continued_is_the_run_that_was_not(tmp_path):
    go("run_dir=whole", "steps=4", "schedule=constant", "evaluation.every=2")
    go("run_dir=parts", "steps=2", "schedule=constant", "evaluation.every=2")
    go("run_dir=parts", "steps=4", "schedule=constant", "evaluation.every=2")
    assert steady(tmp_path / "parts") == steady(tmp_path / "whole")
    one, other = (load_file(tmp_path / d / "export" / "model.safetensors") for d in ("whole", "parts"))
    assert all(np.array_equal(one[name], other[name]) for name in one)


def test_the_same_seed_gives_the_same_run_and_another_one_does_not(tmp_path):
    for folder, seed in (("a", 1), ("b", 1), ("c", 2)):
        go(f"run_dir={folder}", f"seed={seed}", "steps=1")
    assert steady(tmp_path / "a") == steady(tmp_path / "b") != steady(tmp_path / "c")


def test_a_run_that_has_begun_refuses_other_settings_and_other_data():
    go("run_dir=r", "steps=1")
    with pytest.raises(ConfigError, match=r"optimizer.lr was 0.003 when r was begun and is 0.1 now"):
        go("run_dir=r", "steps=2", "optimizer.lr=0.1")
    text = [setting for setting in SMALL if not setting.startswith("data.")]
    text += ["data=text", "data.train=[a.jsonl]", "tokenizer.path=r/export", "data.cache=cache", "run_dir=other"]
    Path("a.jsonl").write_text('{"text": "Ada paints red drums."}\n')
    run(compose([*text, "steps=1"]))
    Path("a.jsonl").write_text('{"text": "Ada paints blue drums."}\n')
    with pytest.raises(ConfigError, match=r"the data changed since other was begun; restore it, or start afresh"):
        run(compose([*text, "steps=2"]))


def test_a_stop_request_saves_and_the_same_command_continues(tmp_path, monkeypatch):
    monkeypatch.setattr(stopping, "_asked", 15)
    with pytest.raises(Stopped, match=r"stopped after step 1 of 3 \(SIGTERM"):
        go("run_dir=r", "steps=3")
    assert json.loads((tmp_path / "r" / "stopped.json").read_text()) == {"step": 1, "last": 3, "reason": "SIGTERM"}
    monkeypatch.setattr(stopping, "_asked", 0)
    go("run_dir=r", "steps=3")
    assert [line["step"] for line in metrics(tmp_path / "r") if "loss" in line] == [1, 2, 3]
    assert not (tmp_path / "r" / "stopped.json").exists()


def test_a_first_step_that_contradicts_the_algorithm_ends_the_run(tmp_path, monkeypatch):
    from trainer.diagnostics.guard import TrainingError
    from trainer.pipelines.pretrain import Pretrain

    monkeypatch.setattr(Pretrain, "first_step_problems", lambda self, first: first.near("loss", 0, "it is 0", "look"))
    with pytest.raises(TrainingError, match=r"the first step's loss is .*, and it is 0: look"):
        go("run_dir=r", "steps=2")
    go("run_dir=r", "steps=2", "guard.first_step=warn", "resume=new")
    go("run_dir=r", "steps=2", "guard.first_step=off", "resume=new")
    assert len(metrics(tmp_path / "r-3")) == 3


def test_an_estimate_builds_nothing(tmp_path, capsys):
    assert go("run_dir=r", "steps=2", "estimate=true")["memory_gb"] > 0
    assert "strategy=ddp, 1 rank(s)" in capsys.readouterr().out
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (["steps=2", "epochs=1"], "steps=2 and epochs=1.0: give exactly one of them"),
        (["steps=2", "schedule.warmup=3"], "schedule.warmup=3 is more than steps=2; use at most 2"),
        (["steps=2", "batch.size=9"], "batch.size=9 is not a multiple of 4 (1 rank x batch.micro=4); use 8 or 12"),
        (["steps=2", "pipeline=dpo"], "the pipeline learns from preference pairs and the data holds packed rows"),
    ],
)
def test_what_cannot_work_is_refused(overrides, problem):
    with pytest.raises(ConfigError) as refused:
        compose([*SMALL, *overrides])
    assert problem in str(refused.value)


def test_rows_longer_than_the_model_are_refused():
    with pytest.raises(ConfigError, match=r"batch.length=64 is more than the model's 32 positions; use at most 32"):
        go("run_dir=r", "steps=1", "model.max_position_embeddings=32")
