"""A recipe, carried out: stages in their order, what is done stays done, what changed is refused, where models come from."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from tests.command import ROOT, TINY, Forked, environment, metrics, onecurve
from trainer.jobs.recipe import Recipe

JUDGE = """
import json, pathlib, sys
out, *models = sys.argv[1:]
pathlib.Path(out).mkdir()
pathlib.Path(out, "metrics.json").write_text(json.dumps({"sft": {"score": 0.4}}))
pathlib.Path(out, "answers.jsonl").write_text(json.dumps({"prompt": "Who?", "answers": {"sft": "Ada."}}) + "\\n")
"""


def recipe(folder: Path) -> Path:
    """Two runs and two scripts of seconds each."""
    (folder / "judge.py").write_text(JUDGE)
    sizes = ["--sft", "40", "8", "--preference", "8", "8", "--prompts", "8", "8"]
    stages = {
        "data": {"script": ["trainer.tinyworld", "{out}", *sizes]},
        "pretrain": {"run": [*TINY, "steps=60", "checkpoint.every=2", "checkpoint.keep=2"]},
        "sft": {
            "run": [
                "experiment=sft_tinyworld", "model.path={pretrain}", "data.train=[{data}/sft_train.jsonl]",
                "data.eval=[{data}/sft_held.jsonl]", "epochs=null", "steps=2", "batch.size=2", "batch.micro=1",
                "schedule.warmup=0", "evaluation.answers=2", "evaluation.first=false", *TINY[-3:],
            ]
        },
        "off": {"enabled": False, "run": ["model.path={sft}"]},
        "judged": {"script": [str(folder / "judge.py"), "{out}", "sft={sft}", "off={off}"]},
    }  # fmt: skip
    results = [
        {"metric": "pretrain:eval/loss", "name": "loss", "optimum": "floor", "within": 0.03},
        {"metric": "judged:sft/score", "of": "sft", "name": "gold", "optimum": 1.0, "at_most": 0.7},
        {"metric": "judged:off/score", "name": "gold", "optimum": 1.0, "halfway_from": "judged:sft/score"},
    ]
    held = {"name": "small", "folder": str(folder / "life"), "stages": stages, "results": results}
    file = folder / "small.yaml"
    file.write_text(yaml.safe_dump(held, sort_keys=False))
    return file


def lifecycle(folder: Path, *arguments: str) -> Forked:
    return Forked(folder, ["recipe", f"{folder}/small.yaml", *arguments], environment())


def here(folder: Path, *arguments: str) -> tuple[int, str]:
    """`lifecycle` in this process."""
    code, out, errors = onecurve(folder, "recipe", f"{folder}/small.yaml", *arguments)
    return code, out + errors


def held(folder: Path) -> dict:
    return json.loads((folder / "life" / "lifecycle.json").read_text())


def wait_for(condition, seconds: float = 240) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A lifecycle that was killed in the middle of its first run, started again, and is done; with what it said."""
    folder = tmp_path_factory.mktemp("lifecycle")
    recipe(folder)
    first = lifecycle(folder)
    latest = folder / "life" / "pretrain" / "checkpoints" / "latest"
    wait_for(lambda: latest.exists() or first.poll() is not None)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    assert not (folder / "life" / "pretrain" / "export").exists()
    assert held(folder)["stages"]["pretrain"]["status"] == "running"
    second = lifecycle(folder)
    said = second.communicate(timeout=400)[0]
    # The loss is nowhere near the floor after 60 steps, and the exit code says so.
    assert second.returncode == 1, said
    return folder, said


def test_stages_follow_one_another_and_a_killed_one_goes_on_where_it_was(finished):
    folder, said = finished
    lines = said.splitlines()
    assert [line.split(":")[0] for line in lines if ": done" in line] == ["data", "pretrain", "sft", "judged"]
    assert "data: done before" in said
    assert "continuing after step" in (folder / "life" / "logs" / "pretrain.log").read_text()
    steps = [row["step"] for row in metrics(folder / "life" / "pretrain") if "loss" in row]
    assert steps == list(range(1, 61))
    stages = held(folder)["stages"]
    assert {name: entry["status"] for name, entry in stages.items()} == {
        "data": "done", "pretrain": "done", "sft": "done", "off": "off", "judged": "done",
    }  # fmt: skip
    assert (stages["sft"]["parents"], stages["judged"]["parents"]) == (["pretrain", "data"], ["sft"])
    assert all(entry["seconds"] > 0 for name, entry in stages.items() if name != "off")


def test_results_stand_beside_their_targets_and_optima(finished):
    folder, said = finished
    results = {row["name"]: row for row in held(folder)["results"]}
    assert results.keys() == {"pretrain: loss", "sft: gold"}
    loss = results["pretrain: loss"]
    floor = yaml.safe_load((folder / "life/pretrain/config.yaml").read_text())["facts"]["floors"]["eval/loss"]
    assert loss["value"] == metrics(folder / "life" / "pretrain")[-1]["eval/loss"]
    assert (loss["optimum"], loss["target"], loss["met"]) == (floor, pytest.approx(1.03 * floor), False)
    assert results["sft: gold"] == {
        "name": "sft: gold", "of": "sft", "value": 0.4, "optimum": 1.0, "target": 0.7, "better": "lower", "met": True,
    }  # fmt: skip
    assert held(folder)["samples"] == [{"prompt": "Who?", "answers": {"sft": "Ada."}}]
    assert "gold 0.4 (target: at most 0.7), best possible 1" in said


def test_an_export_records_the_models_it_comes_from(finished):
    folder, _ = finished
    record = json.loads((folder / "life" / "sft" / "export" / "onecurve.json").read_text())
    assert record["config"]["optimizer"]["lr"] == 0.005
    [(setting, digest)] = record["parents"].items()
    assert setting == "model.path"
    [(known, parent)] = record["ancestors"].items()
    assert known == digest
    own = json.loads((folder / "life" / "pretrain" / "export" / "onecurve.json").read_text())
    assert (own["parents"], own["ancestors"]) == ({}, {})
    assert parent == {**{k: v for k, v in own.items() if k != "ancestors"}, "folder": f"{folder}/life/pretrain/export"}
    for made in (record, parent):
        assert {"config", "data", "tokenizer", "git", "versions", "step"} <= made.keys()


def test_what_is_done_is_not_done_again_and_what_changed_only_on_request(finished):
    folder, _ = finished
    before = held(folder)
    code, said = here(folder, "all.evaluation.every=50", "sft.strategy=zero1")
    assert code == 1  # as before: these settings make no other model
    assert said.count("done before") == 4
    assert held(folder)["stages"] == before["stages"]

    code, said = here(folder, "sft.optimizer.lr=0.004")
    assert code == 2
    assert "sft: optimizer.lr was 0.005 and is 0.004" in said
    assert "judged: its parent sft changed" in said
    assert "pretrain" not in said
    assert held(folder) == before

    kept = (folder / "life" / "sft" / "export" / "onecurve.json").read_text()
    code, said = here(folder, "sft.optimizer.lr=0.004", "redo=true")
    assert said.count("done before") == 2
    stages = held(folder)["stages"]
    assert [Path(stages[name]["run_dir"]).name for name in ("pretrain", "sft", "judged")] == [
        "pretrain",
        "sft-2",
        "judged-2",
    ]
    record = json.loads((folder / "life" / "sft-2" / "export" / "onecurve.json").read_text())
    assert record["config"]["optimizer"]["lr"] == 0.004
    assert (folder / "life" / "sft" / "export" / "onecurve.json").read_text() == kept


def test_a_recipe_that_cannot_work_is_refused_with_all_its_problems_before_anything_starts(tmp_path):
    file = recipe(tmp_path)
    broken = yaml.safe_load(file.read_text())
    broken["stages"]["judged"]["scripts"] = []
    broken["stages"]["sft"]["run"].append("tokenizer.path={later}")
    broken["results"][0]["metric"] = "nowhere:loss"
    file.write_text(yaml.safe_dump(broken, sort_keys=False))
    code, said = here(tmp_path)
    assert code == 2
    assert "stages.judged has no 'scripts'; did you mean 'script'?" in said
    assert "stages.sft names {later}, which is no stage before it" in said
    assert "results[0].metric=nowhere:loss names no stage" in said

    recipe(tmp_path)
    code, said = here(tmp_path, "pretrain.optimizer.learn=1", "stf.steps=1", "sft.steps=3", "rank=2")
    assert (code, "has no argument 'rank=2'" in said) == (2, True)
    code, said = here(tmp_path, "stf.steps=1")
    assert (code, "stf.steps=1 is not a valid override" in said) == (2, True)
    code, said = here(tmp_path, "pretrain.optimizer.learn=1", "pretrain.batch.micro=3")
    assert code == 2
    assert "pretrain: AdamW has no setting 'optimizer.learn'" in said
    assert "pretrain: batch.size=8 is not a multiple of 3" in said
    assert not list(tmp_path.glob("life/*/config.yaml"))


SBATCH = """#!/bin/sh
echo "$@" >> {folder}/asked
wc -l < {folder}/asked
"""


@pytest.mark.slow
def test_on_slurm_every_stage_is_a_job_that_waits_for_those_it_starts_from(tmp_path, monkeypatch):
    recipe(tmp_path)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "sbatch").write_text(SBATCH.format(folder=tmp_path))
    (tmp_path / "bin" / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    code, said = here(
        tmp_path, "launcher=slurm", "slurm.tasks_per_node=2", "slurm.partition=night", "sft.batch.micro=1"
    )
    assert code == 0, said
    jobs = {name: entry.get("job") for name, entry in held(tmp_path)["stages"].items()}
    assert jobs == {"data": "1", "pretrain": "2", "sft": "3", "off": None, "judged": "4"}
    asked = (tmp_path / "asked").read_text().splitlines()
    assert "--partition=night" in asked[0]
    assert "--dependency=afterok:3 --wrap" in asked[3]
    # The model of the stage before is not there yet, and is not looked for.
    script = next(tmp_path.glob("life/sft/submissions/*/job.sbatch")).read_text()
    assert "#SBATCH --dependency=afterok:2:1" in script
    assert f"model.path={tmp_path}/life/pretrain/export" in script


def test_two_lifecycles_do_not_share_a_folder(finished):
    folder, _ = finished
    from filelock import FileLock

    with FileLock(folder / "life" / ".lock"):
        other = lifecycle(folder)
        said = other.communicate(timeout=240)[0]
    assert (other.returncode, "is in use by another recipe" in said) == (2, True)


def vowels(prompts: list[str], completions: list[str], rows: list[dict]) -> list[float]:
    return [float(sum(letter in "aeiou" for letter in text)) for text in completions]


def test_the_same_prompts_are_answered_by_several_models_and_scored(finished, tmp_path):
    folder, _ = finished
    prompts, out = f"{folder}/life/data/prompts_held.jsonl", tmp_path / "compared"
    models = [f"base={folder}/life/pretrain/export", f"sft={folder}/life/sft/export"]
    scored = f"--function={vowels.__module__}.vowels"
    command = ["compare", str(out), prompts, *models, scored, "--template=plain", "--tokens=6", "--rows=5"]
    assert onecurve(tmp_path, *command)[0] == 0
    rows = [json.loads(line) for line in (out / "answers.jsonl").read_text().splitlines()]
    asked = [json.loads(line)["prompt"] for line in Path(prompts).read_text().splitlines()]
    assert [row["prompt"] for row in rows] == asked[:5]
    figures = json.loads((out / "metrics.json").read_text())
    for name in ("base", "sft"):
        scores = [sum(letter in "aeiou" for letter in row["answers"][name]) for row in rows]
        assert [row["scores"][name] for row in rows] == scores
        assert figures[name]["score"] == pytest.approx(sum(scores) / 5)
        assert figures[name]["positive"] == sum(score > 0 for score in scores) / 5
    assert onecurve(tmp_path, *command)[2].startswith(f"error: {out} exists already")


@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "configs" / "recipe").glob("*.yaml")))
def test_every_recipe_can_be_read(name):
    found = Recipe.read(name)
    assert [stage.name for stage in found.stages if stage.enabled]
    assert os.fspath(found.folder)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_model_gets_from_nothing_to_the_stated_distance_from_every_optimum_of_tiny_world(tmp_path):
    quiet = ["all.tracking.wandb.mode=disabled", "all.tracking.tensorboard=false"]
    done = subprocess.run(
        [sys.executable, "-m", "trainer", "recipe", "tinyworld", f"folder={tmp_path}/life", *quiet],
        env=environment(), capture_output=True, text=True, timeout=1700,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    value = {row["name"]: row["value"] for row in held(tmp_path)["results"]}
    floor = next(row["optimum"] for row in held(tmp_path)["results"] if row["name"] == "pretrain: held-out loss")
    assert floor < value["pretrain: held-out loss"] < 1.03 * floor
    assert value["sft: exact match"] >= 0.9
    assert value["reward: accuracy"] >= 0.97
    assert value["sft: gold"] <= 0.7
    for policy in ("ppo", "dpo"):
        assert value[f"{policy}: gold"] >= (value["sft: gold"] + 1) / 2
