"""What is learnt from an iteration: scores at their places, unfinished completions, missing scores, and what is reported."""

import dataclasses

import pytest
import torch

from trainer.data.corpus import Prompt
from trainer.generation.completion import Completion
from trainer.rl.actor import Group, Reading
from trainer.rl.advantages import AGGREGATES, ESTIMATORS, KL, Discount
from trainer.rl.learning import Learning, explained_variance
from trainer.rl.rollouts import Judged

PLAIN = Learning(
    estimator=dataclasses.replace(ESTIMATORS["gae"], of=lambda r, d: (r.tokens + r.beyond.sum(), r.tokens)),
    discount=Discount(), kl=0.5, kl_of=KL["k1"], aggregate=AGGREGATES["token_mean"], score_clip=2.0, penalty=0.25,
    masks=False, bootstraps=False, longest=4, shown=1, decode=lambda ids: " ".join(map(str, ids)),
)  # fmt: skip
"""An estimator whose returns are the rewards themselves, and whose advantages show what lies behind the end."""


def judged(scores, *, ended=(True, True)) -> Judged:
    """Two prompts with a completion each: two tokens and one; the reference finds the first token a nat likelier."""
    completions = [Completion([5, 6], [-1.0, -2.0], ended[0]), Completion([7], [-3.0], ended[1])]
    readings = [
        Reading(torch.tensor([-1.0, -2.0]), torch.tensor([0.5, 0.5]), torch.tensor([0.0, -2.0]), torch.tensor([0.1, 0.2]),
                torch.tensor([10.0])),
        Reading(torch.tensor([-3.0]), torch.tensor([0.8]), torch.tensor([-3.0]), torch.tensor([0.3]), torch.tensor([20.0])),
    ]  # fmt: skip
    groups = [Group(40 + n, n, Prompt([1, 2], f"prompt {n}"), [c]) for n, c in enumerate(completions)]
    return Judged(groups, readings, {"score": list(scores)})


def test_the_price_of_a_nat_and_the_clipped_score_land_on_their_tokens():
    found = PLAIN.of(judged([1.0, 5.0]))
    # k1 of the first token: -1 - 0 = -1, so the reward is -0.5 * -1; scores 1 and min(5, 2) on last tokens.
    assert found.experience.returns.tolist() == [0.5, 1.0, 2.0]
    assert found.experience.weights.tolist() == [1.0, 1.0, 1.0]
    assert found.experience.units.tolist() == [2.0, 1.0]
    assert found.made["objective/score"] == 3.0  # as it was given
    assert found.made["objective/kl"] == -0.5  # -1 and 0 nats
    assert found.made["objective/reward"] == pytest.approx((1.5 + 2.0) / 2)
    assert found.made["objective/entropy"] == pytest.approx(0.6)
    assert found.made["completion/length_mean"] == 1.5
    assert found.made["completion/eos_fraction"] == 1.0


def test_what_reached_the_limit_is_penalised():
    found = PLAIN.of(judged([1.0, 1.0], ended=(True, False)))
    assert found.experience.returns.tolist() == [0.5, 1.0, 0.75]
    assert found.made["completion/eos_fraction"] == 0.5


def test_what_reached_the_limit_is_masked():
    found = dataclasses.replace(PLAIN, masks=True).of(judged([1.0, 1.0], ended=(True, False)))
    assert found.experience.weights.tolist() == [1.0, 1.0, 0.0]
    assert found.experience.units.tolist() == [2.0, 0.0]


def test_what_reached_the_limit_goes_on_with_its_value_instead_of_a_score():
    found = dataclasses.replace(PLAIN, bootstraps=True).of(judged([1.0, 1.0], ended=(True, False)))
    assert found.experience.returns.tolist() == [0.5, 1.0, 0.0]
    assert found.experience.advantages.tolist() == [20.5, 21.0, 20.0]  # the value behind the second completion alone


def test_a_missing_score_is_not_learnt_from_and_is_counted():
    found = PLAIN.of(judged([None, 1.0]))
    assert found.experience.weights.tolist() == [0.0, 0.0, 1.0]
    assert found.experience.units.tolist() == [0.0, 1.0]
    assert found.made["objective/missing"] == 0.5
    assert found.made["objective/score"] == 1.0
    assert not torch.isnan(found.experience.advantages).any()


def test_samples_show_what_became_of_a_completion():
    [shown] = PLAIN.of(judged([1.0, 5.0])).samples
    assert shown == {
        "prompt": "prompt 0", "completion": "5 6", "ended": True, "score": 1.0, "kl": -1.0, "advantage": 0.75,
    }  # fmt: skip


def test_a_batch_holds_completions_behind_their_prompts_and_shares_those_that_stand_together():
    experience = PLAIN.of(judged([1.0, 5.0])).experience
    batch = experience.batch([1, 0])
    assert batch.tokens.tolist() == [[1, 2, 7, 1, 2, 5, 6]]
    assert batch.targets.tolist() == [7, 5, 6]
    assert batch.places.tolist() == [1, 4, 5]
    assert batch.returns.tolist() == [2.0, 0.5, 1.0]
    assert batch.rows.tolist() == [41, 40]
    assert float(batch.weight) == 3.0
    pair = dataclasses.replace(experience, rows=experience.rows[:1], prompt_lengths=experience.prompt_lengths[:1])
    assert pair.batch([0, 1]).tokens.tolist() == [[1, 2, 5, 6, 7]]


def test_explained_variance_is_one_for_values_that_know_and_zero_for_their_mean():
    returns, ones = torch.tensor([1.0, 2.0, 3.0]), torch.ones(3)
    assert explained_variance(returns, returns, ones) == 1
    assert explained_variance(torch.full((3,), 2.0), returns, ones) == pytest.approx(0)
    assert explained_variance(returns, torch.ones(3), ones) == 0
