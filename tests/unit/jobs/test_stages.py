"""Stages: the command of each, and how far a run is, from its files alone."""

import json

import pytest

from trainer.jobs.recipe import ROOT, Stage
from trainer.jobs.stages import progress

PLACES = {"out": "runs/x", "sft": "runs/sft/export"}


@pytest.mark.parametrize(
    ("stage", "command"),
    [
        (
            Stage("ppo", ["model.path={sft}"], None),
            ["-m", "trainer", "train", "model.path=runs/sft/export", "run_dir=runs/x", "name=ppo"],
        ),
        (Stage("words", None, ["tokenize", "{out}"]), ["-m", "trainer", "tokenize", "runs/x"]),
        (Stage("data", None, ["mine.tasks", "{out}"]), ["-m", "mine.tasks", "runs/x"]),
        (Stage("split", None, ["scripts/split.py", "{out}"]), [str(ROOT / "scripts/split.py"), "runs/x"]),
    ],
)
def test_a_stage_is_a_run_a_verb_a_module_or_a_file(stage, command):
    assert stage.command(PLACES) == command


def test_progress_is_read_from_the_files_of_a_run(tmp_path):
    assert progress(tmp_path) == ""
    rows = [{"step": 0, "eval/loss": 3.0}, {"step": 1, "loss": 2.5}, {"step": 2, "loss": 2.25}]
    (tmp_path / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows) + '{"step": 3, "lo')
    assert progress(tmp_path) == "step 2  loss 2.25  eval/loss 3"
    (tmp_path / "progress.json").write_text('{"done": 0, "last": 60}')
    assert progress(tmp_path) == "step 2 of 60  loss 2.25  eval/loss 3"


def test_progress_of_a_long_run_needs_the_end_of_its_file_alone(tmp_path):
    row = json.dumps({"step": 7, "loss": 1.0, "filler": "x" * 1000})
    (tmp_path / "metrics.jsonl").write_text(f"{row}\n" * 200)
    assert progress(tmp_path) == "step 7  loss 1"
