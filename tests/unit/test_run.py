"""Whole runs in this process: resumed, evaluated, exported, stopped; and what is refused before anything is built."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from safetensors.torch import load_file as load_torch
from safetensors.torch import save_file as save_torch

from tests.command import TINY, metrics
from trainer import stopping
from trainer.compose import compose, compose_raw
from trainer.config import ConfigError, InputError
from trainer.export.lineage import model_digest
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


SOFTMAX = ["model.family=mixtral", "model.experts=4", "model.intermediate_size=32", "model.router_z_loss=0.001"]
SIGMOID = [
    "model.family=glm4_moe", "model.experts=4", "model.expert_size=32", "model.shared_size=32", "model.dense_layers=1",
]  # fmt: skip


ROUNDED = ["qat.bits=4", "qat.start=2"]


@pytest.mark.parametrize("model", [[], SOFTMAX, SIGMOID, ROUNDED], ids=["dense", "softmax", "sigmoid", "rounded"])
def test_a_run_that_was_continued_is_the_run_that_was_not(model, tmp_path):
    constant = ["schedule=constant", "evaluation.every=2", *model]
    latest = go("run_dir=whole", "steps=4", *constant)
    go("run_dir=parts", "steps=2", *constant)
    go("run_dir=parts", "steps=4", *constant)
    assert ("router/load_max" in latest) is ("model.experts=4" in model)
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


@pytest.mark.parametrize("adapter", ["none", "lora"])
def test_what_is_exported_is_what_it_says_whatever_is_asked_for_next(adapter, tmp_path, caplog):
    folder = tmp_path / "r"
    go("run_dir=r", "steps=2", f"adapter={adapter}")
    before = snapshot(folder)
    with pytest.raises(InputError, match=r"steps=1 is fewer than the 2 steps that r has taken.*use steps=2 or more"):
        go("run_dir=r", "steps=1", f"adapter={adapter}")
    assert snapshot(folder) == before
    # More steps, in another format: what was there is kept under the name of its step.
    (folder / "export-step-00000002").mkdir()  # a name that is taken is no dead end
    go("run_dir=r", "steps=3", f"adapter={adapter}", "export.dtype=bf16")
    assert steps_of(folder) == {"export": (3, "bf16"), "export-step-00000002-2": (2, "fp32")} | (
        {"adapter": (3, "bf16"), "adapter-step-00000002": (2, "fp32")} if adapter == "lora" else {}
    )
    go("run_dir=r", "steps=3", f"adapter={adapter}", "export.dtype=fp16")
    exports = steps_of(folder)
    assert (exports["export"], exports["export-step-00000003"]) == ((3, "fp16"), (3, "bf16"))
    assert next(iter(load_torch(folder / "export" / "model.safetensors").values())).dtype is torch.float16


def test_further_formats_are_written_once_and_measured_on_held_out_rows(tmp_path, capsys):
    folder, command = tmp_path / "r", ("run_dir=r", "steps=2", "precision=fp32", "evaluation.rows=null")
    latest = go(*command)
    before = snapshot(folder)
    go(*command, "export.formats=[bf16]", "tracking.report=true")
    assert snapshot(folder).items() >= {k: v for k, v in before.items() if "/export/" in k}.items()
    record = json.loads((folder / "export-bf16" / "onecurve.json").read_text())
    assert (record["step"], record["format"], record["cost"]["tokens"]) == (2, "bf16", 1806)
    # What the run's own evaluation says of the same rows, in float32 sums of another order.
    assert record["cost"]["original_perplexity"] == pytest.approx(np.exp(latest["eval/loss"]), rel=1e-5)
    assert "KL, nats a token" in (folder / "report.html").read_text()
    written = {file: file.stat().st_mtime_ns for file in (folder / "export-bf16").iterdir()}
    capsys.readouterr()
    go(*command, "export.formats=[bf16]")
    assert {file: file.stat().st_mtime_ns for file in (folder / "export-bf16").iterdir()} == written
    assert "original" in capsys.readouterr().out


def test_formats_that_cannot_be_written_are_refused_before_anything_is_built(tmp_path):
    for overrides, sentence in (
        (["export.formats=[bf61]"], r"export.formats: bf61 is no format; did you mean bf16"),
        (["export.formats=[bf16]", "adapter=lora", "adapter.merge=false"], r"adapter.merge=false leaves out; use"),
    ):
        with pytest.raises(ConfigError, match=sentence):
            go("run_dir=r", "steps=1", *overrides)
    assert not (tmp_path / "r").exists()


def snapshot(folder: Path) -> dict[str, bytes]:
    """What a run has made, and how it was made."""
    files = [folder / "config.yaml", *sorted((folder / "export").iterdir()), *sorted(folder.glob("checkpoints/*/*"))]
    return {str(file): file.read_bytes() for file in files}


def steps_of(folder: Path) -> dict[str, tuple[int, str]]:
    """What every exported folder says about itself."""
    records = {file.parent.name: json.loads(file.read_text()) for file in folder.glob("*/onecurve.json")}
    return {name: (record["step"], record["config"]["export"]["dtype"]) for name, record in records.items()}


def test_a_frozen_model_that_changed_under_a_run_is_refused(tmp_path):
    go("run_dir=m", "steps=1", "checkpoint.every=0")
    folder = tmp_path / "m" / "export"
    shape = [setting for setting in SMALL if not setting.startswith("model.")]
    command = [*shape, "model.path=m/export", "adapter=lora", "run_dir=r"]
    run(compose([*command, "steps=1"]))
    before = model_digest(folder)
    (folder / "README.md").write_text("mine")
    assert model_digest(folder) == before
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    assert model_digest(folder) != before
    (folder / "chat_template.jinja").unlink()
    tensors = load_torch(folder / "model.safetensors")
    tensors["model.norm.weight"][3] += 0.5  # one of 30,000 weights
    save_torch(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"the model in model.path changed since r was begun; restore it, or start"):
        run(compose([*command, "steps=2"]))


def test_what_the_command_line_says_of_a_run_s_length_wins_over_a_file(tmp_path, capsys):
    sft = ["experiment=sft", "data.train=[x]", "tokenizer.path=x"]
    for overrides, length in (
        ([*sft, "steps=4"], (4, None)), (sft, (None, 3)), ([*TINY, "epochs=2"], (None, 2)), ([*sft, "epochs=1"], (None, 1)),
        ([*sft, "steps=4", "epochs=2"], (4, 2)), ([*sft, "steps=null"], (None, 3)),
    ):  # fmt: skip
        cfg = compose_raw(overrides)
        assert (cfg.steps, cfg.epochs) == length, overrides
    go("run_dir=r", "steps=2", "schedule.warmup=5")
    said = "schedule.warmup=5 steps do not fit into steps=2; it is taken as 0.03 of the run, 1"
    assert said in capsys.readouterr().out
    assert metrics(tmp_path / "r")[0]["lr"] == 0.003


def test_no_file_of_a_run_holds_a_password(tmp_path, monkeypatch, caplog):
    url = "data.cache=http://me:hunter2@host/x"
    monkeypatch.setattr("sys.argv", ["onecurve", "train", url])
    watched = [word for word in SMALL if not word.startswith("tracking.")]
    run(
        compose(
            [*watched, url, f"run_dir={tmp_path}/r", "steps=1", "evaluation.samples=1", "tracking.wandb.mode=offline"]
        )
    )
    files = [file for file in (tmp_path / "r").rglob("*") if file.is_file()]
    assert {"config.yaml", "report.html", "onecurve.json", "manifest.json"} <= {file.name for file in files}
    assert any(file.suffix == ".wandb" for file in files)
    assert [file for file in files if b"hunter2" in file.read_bytes()] == []
    assert "***@host/x" in (tmp_path / "r" / "config.yaml").read_text()
    assert "hunter2" not in caplog.text


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
        (["steps=2", "schedule.warmup=1.5"], "schedule.warmup=1.5 is neither a number of steps nor a part of the run"),
        (["steps=2", "batch.size=9"], "batch.size=9 is not a multiple of 4 (1 rank x batch.micro=4); use 8 or 12"),
        (["steps=2", "pipeline=dpo"], "the pipeline learns from preference pairs and the data holds packed rows"),
        (["steps=2", "qat.bits=3"], "qat.bits=3 is the grid of no export; use 4, 8 or null"),
        (["steps=2", "qat.start=1"], "qat.start=1 has no effect without qat.bits; leave it out, or set qat.bits=4"),
        (
            ["steps=2", "qat.bits=4", "qat.start=3"],
            "qat.start=3 is behind the last step (steps=2), so nothing is rounded",
        ),
        (
            ["steps=2", "qat.bits=4", "export.formats=[int4]"],
            "int4 moves weights away from where qat.bits=4 trained them",
        ),
        (["steps=2", "qat.bits=4", "export.dtype=fp16"], "export.dtype=fp16 rounds the weights before int4-rtn does"),
        (
            ["steps=2", "qat.bits=4", "adapter=lora", "adapter.dropout=0.1"],
            "adapter.dropout=0.1 drops inputs of the adapter",
        ),
    ],
)
def test_what_cannot_work_is_refused(overrides, problem):
    with pytest.raises(ConfigError) as refused:
        compose([*SMALL, *overrides])
    assert problem in str(refused.value)


def test_rows_longer_than_the_model_are_refused():
    with pytest.raises(ConfigError, match=r"batch.length=64 is more than the model's 32 positions; use at most 32"):
        go("run_dir=r", "steps=1", "model.max_position_embeddings=32")
