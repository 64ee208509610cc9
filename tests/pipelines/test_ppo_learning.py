"""Policy gradients solve tasks whose best policy is known: within 2% of the optimum, sampled as in training."""

import pytest

from tests.small_world import overrides, write_world
from trainer.compose import compose
from trainer.run import run

BANDIT = ["steps=100", "pipeline.rollout.size=128", "optimizer.lr=0.003", "pipeline.entropy_coef=0.02"]
CHAIN = ["steps=400", "pipeline.rollout.size=256", "optimizer.lr=0.002"]
SETTINGS = {
    **dict.fromkeys([("bandit", "gae"), ("bandit", "grpo"), ("bandit", "rloo")], BANDIT),
    ("chain", "gae"): [*CHAIN, "pipeline.entropy_coef=0.05", "pipeline.ppo_epochs=2"],
    # Advantages over a group's deviation are larger than those less its mean: so is the entropy that holds against them.
    ("chain", "grpo"): [*CHAIN, "pipeline.entropy_coef=0.08", "pipeline.samples_per_prompt=16"],
    ("chain", "rloo"): [*CHAIN, "pipeline.entropy_coef=0.03", "pipeline.samples_per_prompt=16"],
}
# Three seeds each were solved by hand; a seed each is enough to see a loss that has gone wrong.
CASES = [(*task, 0) for task in SETTINGS]


@pytest.mark.parametrize(
    ("task", "advantage", "seed"),
    [pytest.param(*case, marks=() if case[0] == "bandit" else pytest.mark.slow) for case in CASES],
)
def test_a_task_with_a_known_optimum_is_solved(task, advantage, seed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = write_world(tmp_path / "world")
    settings = [
        f"seed={seed}", f"pipeline.advantage={advantage}", "batch.size=64", "batch.micro=64", "pipeline.critic_lr=0.003",
        "schedule=linear", "evaluation.answers=64", "evaluation.samples=0", *SETTINGS[task, advantage],
    ]  # fmt: skip
    found = run(compose([*overrides(folder, task), *settings, "run_dir=run"], name="run"))
    assert found["eval/score"] >= 0.98
