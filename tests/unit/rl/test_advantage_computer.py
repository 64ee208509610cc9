"""What is learnt from an iteration: scores at their places, unfinished completions, missing scores, and what is reported."""

import dataclasses

import pytest
import torch

from trainer.data.corpus import Prompt
from trainer.generation.completion import Completion
from trainer.rl import advantages
from trainer.rl.experience import AdvantageComputer, Experience
from trainer.rl.rollout_metrics import explained_variance, rollout_metrics, rollout_samples
from trainer.rl.scoring import PromptGroup, RolloutLogprobs, ScoredRollouts
from trainer.rl.settings import PolicyGradientSettings, RolloutSettings, Unfinished


def rewards_as_returns(x):
    """An estimator whose returns are the rewards themselves, and whose advantages show what is behind the end."""
    return x.token_rewards() + x.bootstrap_values.sum(), x.token_rewards()


@pytest.fixture(autouse=True)
def _estimator(monkeypatch):
    monkeypatch.setitem(advantages.ESTIMATORS, "plain", advantages.Estimator(rewards_as_returns, critic=True))


def learn(scores, *, ended=(True, True), **settings) -> tuple[Experience, dict[str, float], list[dict]]:
    """Two prompts with a completion each: two tokens and one; the reference finds the first token a nat likelier."""
    completions = [Completion([5, 6], [-1.0, -2.0], ended[0]), Completion([7], [-3.0], ended[1])]
    columns = [
        ([-1.0, -2.0], [0.5, 0.5], [0.0, -2.0], [0.1, 0.2], [10.0]),
        ([-3.0], [0.8], [-3.0], [0.3], [20.0]),
    ]
    rollouts = ScoredRollouts(
        [PromptGroup(40 + n, n, Prompt([1, 2], f"prompt {n}"), [c]) for n, c in enumerate(completions)],
        [RolloutLogprobs(*map(torch.tensor, values)) for values in columns],
        {"score": list(scores)},
    )
    computer = AdvantageComputer(
        PolicyGradientSettings(
            advantage="plain",
            score_clip=2.0,
            missing_eos_penalty=0.25,
            rollout=RolloutSettings(tokens=4),
            **settings,
        )
    )
    inputs = computer.inputs(rollouts, kl_coef=0.5)
    experience = computer.experience(rollouts, inputs)
    samples = rollout_samples(rollouts, experience, lambda ids: " ".join(map(str, ids)), 1)
    return experience, rollout_metrics(rollouts, inputs, experience), samples


def test_the_kl_penalty_and_the_clipped_score_land_on_their_tokens():
    experience, metrics, _ = learn([1.0, 5.0])
    # k1 of the first token: -1 - 0 = -1, so the reward is -0.5 * -1; scores 1 and min(5, 2) on last tokens.
    assert experience.returns.tolist() == [0.5, 1.0, 2.0]
    assert experience.weights.tolist() == [1.0, 1.0, 1.0]
    assert experience.units.tolist() == [2.0, 1.0]
    assert metrics["objective/score"] == 3.0  # as it was given
    assert metrics["objective/kl"] == -0.5  # -1 and 0 nats
    assert metrics["objective/reward"] == pytest.approx((1.5 + 2.0) / 2)
    assert metrics["objective/entropy"] == pytest.approx(0.6)
    assert metrics["completion/length_mean"] == 1.5
    assert metrics["completion/eos_fraction"] == 1.0


def test_what_reached_the_limit_is_penalised():
    experience, metrics, _ = learn([1.0, 1.0], ended=(True, False))
    assert experience.returns.tolist() == [0.5, 1.0, 0.75]
    assert metrics["completion/eos_fraction"] == 0.5


def test_what_reached_the_limit_is_masked():
    experience, _, _ = learn([1.0, 1.0], ended=(True, False), unfinished=Unfinished.mask)
    assert experience.weights.tolist() == [1.0, 1.0, 0.0]
    assert experience.units.tolist() == [2.0, 0.0]


def test_what_reached_the_limit_goes_on_with_its_value_instead_of_a_score():
    experience, _, _ = learn([1.0, 1.0], ended=(True, False), unfinished=Unfinished.bootstrap)
    assert experience.returns.tolist() == [0.5, 1.0, 0.0]
    assert experience.advantages.tolist() == [20.5, 21.0, 20.0]  # the value behind the second completion alone


def test_a_missing_score_is_not_learnt_from_and_is_counted():
    experience, metrics, _ = learn([None, 1.0])
    assert experience.weights.tolist() == [0.0, 0.0, 1.0]
    assert experience.units.tolist() == [0.0, 1.0]
    assert metrics["objective/missing"] == 0.5
    assert metrics["objective/score"] == 1.0
    assert not torch.isnan(experience.advantages).any()


def test_samples_show_what_became_of_a_completion():
    _, _, [sample] = learn([1.0, 5.0])
    assert sample == {
        "prompt": "prompt 0", "completion": "5 6", "ended": True, "score": 1.0, "kl": -1.0, "advantage": 0.75,
    }  # fmt: skip


def test_a_batch_holds_completions_behind_their_prompts_and_shares_those_that_stand_together():
    experience, _, _ = learn([1.0, 5.0])
    batch = experience.batch([1, 0])
    assert batch.tokens.tolist() == [[1, 2, 7, 1, 2, 5, 6]]
    assert batch.targets.tolist() == [7, 5, 6]
    assert batch.logit_index.tolist() == [1, 4, 5]
    assert batch.returns.tolist() == [2.0, 0.5, 1.0]
    assert batch.rows.tolist() == [41, 40]
    assert float(batch.weight) == 3.0
    first = {"rows": experience.rows[:1], "prompt_lengths": experience.prompt_lengths[:1]}
    pair = dataclasses.replace(experience, **first, prompts=experience.prompts[:2])
    assert pair.batch([0, 1]).tokens.tolist() == [[1, 2, 5, 6, 7]]


def test_explained_variance_is_one_for_values_that_know_and_zero_for_their_mean():
    returns, ones = torch.tensor([1.0, 2.0, 3.0]), torch.ones(3)
    assert explained_variance(returns, returns, ones) == 1
    assert explained_variance(torch.full((3,), 2.0), returns, ones) == pytest.approx(0)
    assert explained_variance(returns, torch.ones(3), ones) == 0
