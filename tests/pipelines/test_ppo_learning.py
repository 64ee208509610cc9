"""Policy gradients solve tasks whose best policy is known: within 2% of the optimum, sampled as in training."""

import pytest

from tests.small_world import overrides, write_world
from trainer.__main__ import composed
from trainer.run import run

SETTINGS = {
    "bandit": ["steps=100", "pipeline.rollout.size=128", "optimizer.lr=0.003", "pipeline.entropy=0.02"],
    "chain": ["steps=400", "pipeline.rollout.size=256", "optimizer.lr=0.002", "pipeline.entropy=0.05",
              "pipeline.update_epochs=2"],
}  # fmt: skip
CASES = [("bandit", name, seed) for name in ("gae", "grpo", "rloo") for seed in range(3)]
CASES += [("chain", "gae", seed) for seed in range(3)]


@pytest.mark.parametrize(
    ("task", "advantage", "seed"),
    [pytest.param(*case, marks=() if case[0] == "bandit" and case[2] == 0 else pytest.mark.slow) for case in CASES],
)
def test_a_task_with_a_known_optimum_is_solved(task, advantage, seed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = write_world(tmp_path / "world")
    settings = [
        f"seed={seed}", f"pipeline.advantage={advantage}", "batch.size=64", "batch.micro=64", "pipeline.critic_lr=0.003",
        "schedule=linear", "evaluation.answers=64", "evaluation.samples=0", *SETTINGS[task],
    ]  # fmt: skip
    found = run(composed([*overrides(folder, task), *settings, "run_dir=run"], "run"))
    assert found["eval/score"] >= 0.98
