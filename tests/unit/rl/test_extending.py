"""What a user's own module adds in one file: advantage estimators and rewards. docs/extending.md shows the same."""

import importlib
from functools import partial

import pytest

from tests.small_world import overrides, write_world
from tests.unit.rl.test_rollouts import A, B, always, learn
from trainer.cli.help import help_text
from trainer.compose import compose
from trainer.config import ConfigError
from trainer.generation.completion import Completion
from trainer.rl.experience import AdvantageComputer
from trainer.rl.settings import PolicyGradientSettings

MODULE = '''
"""Two advantage estimators and a reward."""

import torch
from torch import Tensor

from trainer.rl.advantages import AdvantageInputs, advantage_estimator


@advantage_estimator("median", samples_per_prompt=4)
def median(x: AdvantageInputs) -> tuple[Tensor, Tensor]:
    """A reward less the median of its group's, at every token of the completion."""
    rewards = x.completion_rewards().view(-1, x.group_size)
    advantages = rewards - rewards.median(1, keepdim=True).values
    return x.per_token(advantages.flatten()), torch.zeros_like(x.values)


@advantage_estimator("running_mean", samples_per_prompt=1)
class RunningMean:
    """A reward less the mean of earlier iterations'."""

    def __init__(self) -> None:
        self.mean = 0.0

    def __call__(self, x: AdvantageInputs) -> tuple[Tensor, Tensor]:
        rewards = x.completion_rewards()
        advantages = x.per_token(rewards - self.mean)
        self.mean += 0.5 * (float(rewards.mean()) - self.mean)
        return advantages, torch.zeros_like(x.values)

    def state_dict(self) -> dict[str, float]:
        return {"mean": self.mean}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.mean = state["mean"]


def brevity(prompts, completions, rows, *, unit=1.0):
    return [-len(text) / unit for text in completions]
'''


@pytest.fixture
def mine(clean_registries, tmp_path, monkeypatch):
    """The module, which can be imported."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "my_estimators.py").write_text(MODULE)
    importlib.invalidate_caches()
    return "imports=[my_estimators]"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_world(tmp_path_factory.mktemp("world"))


def test_an_advantage_estimator_is_one_function_in_one_file(mine, world):
    def sampler(prompts, keys):
        return [Completion([A if key[3] else B], [-1.0], True) for key in keys]

    values, texts = learn(world, sampler, mine, "pipeline.advantage=median", steps=1)
    # Of four completions one is b, worth 0.6; a, worth 0.1, is the median.
    assert [text["advantage"] for text in texts[:4]] == pytest.approx([0.5, 0.0, 0.0, 0.0])
    assert values[0]["objective/score"] == pytest.approx((0.6 + 3 * 0.1) / 4)


def test_an_estimator_may_remember_and_a_resumed_run_knows_it(mine, world):
    _, texts = learn(
        world, partial(always, [A]), mine, "pipeline.advantage=running_mean", "pipeline.samples_per_prompt=2"
    )
    # A score of 0.1 each time: less 0, then less half of it, then less three quarters.
    means = [text["advantage"] for text in texts[::4]]
    assert means == pytest.approx([0.1, 0.05, 0.025])
    before, after = (AdvantageComputer(PolicyGradientSettings(advantage="running_mean")) for _ in range(2))
    before.estimator.mean = 0.75
    after.load_state_dict(before.state_dict())
    assert after.estimator.mean == 0.75


def test_it_is_listed_with_the_others_and_its_groups_are_checked(mine, world):
    settings = [*overrides(world, "bandit"), mine]
    with pytest.raises(
        ConfigError, match=r"advantage=medium is not one of gae, .*median, running_mean; did you mean median"
    ):
        compose([*settings, "pipeline.advantage=medium"])
    with pytest.raises(ConfigError, match=r"pipeline.samples_per_prompt=1 has no groups"):
        compose([*settings, "pipeline.advantage=median", "pipeline.samples_per_prompt=1"])
    assert compose([*settings, "pipeline.advantage=median"]).pipeline.group_size == 4
    assert "rloo, median, running_mean" in " ".join(help_text(settings, []).split())


def test_a_reward_is_one_function_in_one_file(mine, world):
    brevity = ["pipeline.reward.main.function=my_estimators.brevity", "+pipeline.reward.main.arguments={unit: 4}"]
    values, _ = learn(world, partial(always, [A]), mine, *brevity, steps=1)
    assert values[0]["objective/score"] == -0.25
