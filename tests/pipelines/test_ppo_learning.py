"""Policy gradients solve tasks whose best policy is known: within 2% of the optimum, sampled as in training."""

import pytest

from tests.small_world import overrides, write_world
from trainer.__main__ import composed
from trainer.run import run

STEPS = {"bandit": 100, "chain": 400}
SEEDS = [(0, "bandit"), *((seed, "chain") for seed in range(3)), (1, "bandit"), (2, "bandit")]


@pytest.mark.parametrize("advantage", ["gae", "grpo", "rloo"])
@pytest.mark.parametrize(
    ("seed", "task"), [pytest.param(*case, marks=() if case == SEEDS[0] else pytest.mark.slow) for case in SEEDS]
)
def test_a_task_with_a_known_optimum_is_solved(advantage, seed, task, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = write_world(tmp_path / "world")
    settings = [
        f"seed={seed}", f"pipeline.advantage={advantage}", f"steps={STEPS[task]}", "batch.size=64", "batch.micro=64",
        "pipeline.rollout.size=128", "optimizer.lr=0.003", "pipeline.critic_lr=0.003", "schedule=linear",
        "pipeline.entropy=0.02", "evaluation.answers=64", "evaluation.samples=0",
    ]  # fmt: skip
    found = run(composed([*overrides(folder, task), *settings, "run_dir=run"], "run"))
    assert found["eval/score"] >= 0.98
