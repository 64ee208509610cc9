"""Every YAML file composes, alone and as it is shipped; what is wrong is refused quickly and by name."""

import subprocess
import sys
import time
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

from tests.command import ROOT, environment
from trainer.__main__ import config_folder, register
from trainer.config import parse

CONFIGS = ROOT / "configs"
CHOICES = sorted(
    p.relative_to(CONFIGS).with_suffix("").as_posix() for p in CONFIGS.glob("*/*.yaml") if p.parent.name != "recipe"
)
CLOUDS = ("data.train", "model.path", "tokenizer.path", "data.eval", "pipeline.reward.")
"""Settings that a shipped example leaves to the user: paths."""
PPO = ["pipeline=ppo", "data=prompts"]
BESIDE = {
    "pipeline/dpo": ["data=preference"], "pipeline/reward": ["data=preference"], "pipeline/ppo": ["data=prompts"],
    **{f"reward/{kind}": PPO for kind in ("model", "function", "judge")},
}  # fmt: skip
"""What a choice only works with."""


@pytest.fixture(autouse=True)
def schemas():
    register([])
    yield
    GlobalHydra.instance().clear()


@pytest.mark.parametrize("choice", CHOICES)
def test_every_choice_composes(choice, tmp_path):
    group, _, name = choice.rpartition("/")
    prefix = "+" if group == "experiment" else ""
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        chosen = f"{prefix}{group}={name}".replace("+experiment", "experiment")
        if group == "reward":
            chosen = f"reward@pipeline.reward.main={name}"
        cfg = compose("train", overrides=[chosen, *BESIDE.get(choice, []), "name=x"])
    try:
        parse(cfg)
    except ValueError as error:
        problems = error.problems
        assert all(p.startswith(CLOUDS) for p in problems), problems


def refused(*overrides: str, cwd: Path = ROOT) -> str:
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "trainer", *overrides], cwd=cwd, env=environment(), capture_output=True, text=True
    )
    assert done.returncode in (1, 2), done.stdout
    assert not (cwd / "runs").exists() or cwd == ROOT
    assert time.monotonic() - started < 60
    return done.stdout + done.stderr


def test_everything_wrong_on_the_command_line_is_named_at_once(tmp_path):
    said = refused(
        "stepz=5", "pipeline.z_lss=1", "+optimizer.learning_rate=1", "batch.size=1000", "batch.micro=48", "seed=-1",
        "optimizer.clip=much", cwd=tmp_path,
    )  # fmt: skip
    assert "Run has no setting 'stepz'; did you mean 'steps'?" in said
    assert "Pretrain has no setting 'pipeline.z_lss'; did you mean 'pipeline.z_loss'?" in said
    assert "AdamW has no setting 'optimizer.learning_rate'" in said
    assert "batch.size=1000 is not a multiple of 48 (1 rank x batch.micro=48); use 960 or 1008" in said
    assert "seed=-1 must be at least 0" in said
    assert "optimizer.clip='much' is not a number" in said


def test_a_misspelt_key_in_a_yaml_file_is_named(tmp_path):
    (tmp_path / "conf" / "experiment").mkdir(parents=True)
    (tmp_path / "conf" / "experiment" / "mine.yaml").write_text(
        "# @package _global_\npipeline: {z_los: 1}\noptimizer: {weight_decai: 1}\nstep: 3\n"
    )
    said = refused("--config-dir", "conf", "experiment=mine", cwd=tmp_path)
    assert "did you mean 'pipeline.z_loss'?" in said
    assert "did you mean 'optimizer.weight_decay'?" in said
    assert "Run has no setting 'step'; did you mean 'steps'?" in said


def test_a_module_that_cannot_be_imported_is_named(tmp_path):
    assert "imports=nowhere.to_be_found cannot be imported" in refused("imports=[nowhere.to_be_found]", cwd=tmp_path)


OWN = '''
from dataclasses import dataclass
from trainer.config import schema, setting
from trainer.pipelines.pretrain import Pretrain

@schema("pipeline/mine")
@dataclass
class Mine(Pretrain):
    """My own objective."""
    strength: float = setting(2.0, "how strong", least=0)

    def loss(self, models, batch):
        loss, metrics = super().loss(models, batch)
        return loss * self.strength, metrics
'''


def test_a_pipeline_of_ones_own_is_one_file_and_one_yaml(tmp_path):
    from tests.command import TINY, Command, metrics

    (tmp_path / "mine.py").write_text(OWN)
    (tmp_path / "conf" / "pipeline").mkdir(parents=True)
    (tmp_path / "conf" / "pipeline" / "mine.yaml").write_text("defaults: [/schema/pipeline/mine@_here_, _self_]\n")
    arguments = ["--config-dir", "conf", "imports=[mine]", "pipeline=mine", *TINY, "steps=1"]
    Command(tmp_path, *arguments, "run_dir=a").finish()
    Command(tmp_path, *arguments, "run_dir=b", "pipeline.strength=4").finish()
    assert metrics(tmp_path / "b")[0]["loss"] == pytest.approx(2 * metrics(tmp_path / "a")[0]["loss"], rel=1e-6)


def test_help_explains_every_setting_of_the_choice_made(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "trainer", "optimizer=muon", "--help"], cwd=tmp_path, env=environment(), capture_output=True,
        text=True, check=True,
    )  # fmt: skip
    assert "optimizer.momentum=0.95" in done.stdout
    assert "Nesterov momentum of the matrices" in done.stdout
    assert "batch.size=32" in done.stdout
    assert "schedule     constant, cosine, linear, wsd" in done.stdout
