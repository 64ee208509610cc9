"""Every YAML file composes, alone and as it is shipped; what is wrong is refused quickly and by name."""

import io
import subprocess
import sys
import time
from contextlib import redirect_stderr

import pytest

from tests.command import ROOT, environment
from trainer.cli import main
from trainer.compose import compose
from trainer.config import ConfigError

CONFIGS = ROOT / "configs"
CHOICES = sorted(
    p.relative_to(CONFIGS).with_suffix("").as_posix() for p in CONFIGS.glob("*/*.yaml") if p.parent.name != "recipe"
)
CLOUDS = ("data.train", "model.path", "tokenizer.path", "data.eval", "pipeline.reward.")
"""Settings that a shipped example leaves to the user: paths."""
PPO = ["pipeline=ppo", "data=prompts"]
BESIDE = {
    "pipeline/dpo": ["data=preference"], "pipeline/kto": ["data=labelled"],
    "pipeline/reward": ["data=preference"], "pipeline/ppo": ["data=prompts"],
    **{f"reward/{kind}": PPO for kind in ("model", "function", "judge")},
    "reward/exact_match": [*PPO, "pipeline.critic=policy"],
}  # fmt: skip
"""What a choice only works with."""


@pytest.mark.parametrize("choice", CHOICES)
def test_every_choice_composes(choice):
    group, _, name = choice.rpartition("/")
    chosen = f"reward@pipeline.reward.main={name}" if group == "reward" else f"{group}={name}"
    problems = []
    try:
        compose([chosen, *BESIDE.get(choice, [])], name="x")
    except ConfigError as error:
        problems = error.problems
    assert [p for p in problems if not p.startswith(CLOUDS)] == []


def refused(*arguments: str) -> str:
    """What the program says about a command line, in this process."""
    errors = io.StringIO()
    with redirect_stderr(errors):
        assert main(arguments, default="train") == 2
    return errors.getvalue()


def test_a_refusal_is_quick_and_leaves_nothing_behind(tmp_path):
    started = time.monotonic()
    command = [sys.executable, "-m", "trainer", "stepz=5"]
    done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True)
    assert done.returncode == 2
    assert "did you mean 'steps'?" in done.stderr
    assert list(tmp_path.iterdir()) == []
    assert time.monotonic() - started < 60


def test_everything_wrong_on_the_command_line_is_named_at_once():
    text = refused(
        "stepz=5", "pipeline.z_lss=1", "+optimizer.learning_rate=1", "batch.size=1000", "batch.micro=48", "seed=-1",
        "optimizer.clip=much",
    )  # fmt: skip
    assert "Run has no setting 'stepz'; did you mean 'steps'?" in text
    assert "Pretrain has no setting 'pipeline.z_lss'; did you mean 'pipeline.z_loss'?" in text
    assert "AdamW has no setting 'optimizer.learning_rate'" in text
    assert "batch.size=1000 is not a multiple of 48 (1 rank x batch.micro=48); use 960 or 1008" in text
    assert "seed=-1 must be at least 0" in text
    assert "optimizer.clip='much' is not a number" in text


def test_a_misspelt_key_in_a_yaml_file_is_named(tmp_path):
    (tmp_path / "conf" / "experiment").mkdir(parents=True)
    (tmp_path / "conf" / "experiment" / "mine.yaml").write_text(
        "# @package _global_\npipeline: {z_los: 1}\noptimizer: {weight_decai: 1}\nstep: 3\n"
    )
    text = refused("--config-dir", str(tmp_path / "conf"), "experiment=mine")
    assert "did you mean 'pipeline.z_loss'?" in text
    assert "did you mean 'optimizer.weight_decay'?" in text
    assert "Run has no setting 'step'; did you mean 'steps'?" in text


def test_a_module_that_cannot_be_imported_is_named():
    assert "imports=nowhere.to_be_found cannot be imported" in refused("imports=[nowhere.to_be_found]")


def test_help_explains_every_setting_of_the_choice_made(capsys):
    assert main(["optimizer=muon", "--help"], default="train") == 0
    text = capsys.readouterr().out
    assert "optimizer.momentum=0.95" in text
    assert "Nesterov momentum of the matrices" in text
    assert "batch.size=32" in text
    assert "schedule     constant, cosine, linear, wsd" in text


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["strategy=zero3"], "model.compile=true compiles next to nothing under strategy=zero3"),
        (["adapter=lora", "adapter.dropout=0.1"], "adapter.dropout=0.1 is drawn row by row"),
        (["precision=bf16", "model.activation_checkpointing=selective"], "only where a GPU has a kernel"),
    ],
)
def test_what_would_not_be_compiled_is_refused_and_left_out_where_nobody_asked(arguments, sentence, tmp_path):
    run = [f"run_dir={tmp_path / 'run'}", "optimizer=adamw", *arguments]
    assert sentence in refused(*run, "model.compile=true")
    assert not (tmp_path / "run").exists()
    cfg = compose([*run, "model.compile=null"], name="x")
    load = cfg.loader(cfg.data.default_tokenizer())
    assert load.config.compile is False
