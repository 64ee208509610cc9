"""Advantages, by hand and against a plain NumPy reference on ragged batches (docs/algorithms.md#advantages)."""

import numpy as np
import pytest
import torch

from trainer.rl.advantages import (
    AGGREGATES,
    ESTIMATORS,
    AdvantageInputs,
    dr_grpo,
    generalised_advantages,
    grpo,
    rloo,
    whitened,
)
from trainer.rl.losses import KL_ESTIMATORS, KLController


def inputs(scores, lengths, **given) -> AdvantageInputs:
    """Zeros, and ones for weights, where nothing is given."""
    lists = {name: torch.tensor(value) for name, value in given.items() if isinstance(value, list)}
    numbers = {name: value for name, value in given.items() if not isinstance(value, list)}
    tokens, group_size = sum(lengths), given.get("group_size", 1)
    defaults = {
        "penalties": torch.zeros(tokens),
        "values": torch.zeros(tokens),
        "bootstrap_values": torch.zeros(len(lengths)),
        "weights": torch.ones(tokens),
        "units": torch.ones(len(lengths)),
        "rows": torch.arange(len(lengths) // group_size),
        "group_size": group_size,
    }
    return AdvantageInputs(torch.tensor(scores), lengths=torch.tensor(lengths), **{**defaults, **lists, **numbers})


def plain_gae(scores, lengths, penalties, values, bootstrap_values, gamma, lam):
    """Token by token, in float64."""
    at, advantages, returns = 0, [], []
    for score, length, behind in zip(scores, lengths, bootstrap_values, strict=True):
        r = np.array(penalties[at : at + length], dtype=np.float64)
        r[-1] += score
        v = np.append(np.array(values[at : at + length], dtype=np.float64), behind)
        a = np.zeros(length + 1)
        for t in reversed(range(length)):
            a[t] = r[t] + gamma * v[t + 1] - v[t] + gamma * lam * a[t + 1]
        advantages += list(a[:-1])
        returns += list(a[:-1] + v[:-1])
        at += length
    return np.array(advantages), np.array(returns)


def test_advantages_of_two_tokens_are_those_of_the_formula():
    # d_2 = 1 - 0.5 = 0.5; d_1 = -0.1 + 0.9 * 0.5 - 0.2 = 0.15; A_1 = 0.15 + 0.9 * 0.8 * 0.5 = 0.51
    x = inputs([1.0], [2], penalties=[-0.1, 0.0], values=[0.2, 0.5], gamma=0.9, lam=0.8)
    advantages, returns = generalised_advantages(x)
    assert advantages.tolist() == pytest.approx([0.51, 0.5])
    assert returns.tolist() == pytest.approx([0.71, 1.0])


def test_a_completion_that_was_cut_off_goes_on_with_the_value_behind_it():
    advantages, _ = generalised_advantages(inputs([0.0, 0.0], [1, 1], bootstrap_values=[2.0, 0.0], gamma=0.5, lam=1.0))
    assert advantages.tolist() == [1.0, 0.0]


@pytest.mark.parametrize("seed", range(5))
def test_advantages_and_whitening_agree_with_a_plain_reference_on_ragged_batches(seed):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 9, 7).tolist()
    count = sum(lengths)
    scores, bootstrap_values = rng.normal(size=7).tolist(), rng.normal(size=7).tolist()
    penalties, values = rng.normal(size=count).tolist(), rng.normal(size=count).tolist()
    weights = (rng.random(count) < 0.8).astype(float).tolist()
    x = inputs(
        scores,
        lengths,
        penalties=penalties,
        values=values,
        bootstrap_values=bootstrap_values,
        weights=weights,
        gamma=0.97,
        lam=0.9,
    )
    advantages, returns = generalised_advantages(x)
    wanted, wanted_returns = plain_gae(scores, lengths, penalties, values, bootstrap_values, 0.97, 0.9)
    np.testing.assert_allclose(advantages, wanted, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(returns, wanted_returns, rtol=1e-5, atol=1e-5)
    kept = np.array(weights) > 0
    white = (wanted - wanted[kept].mean()) / np.sqrt(wanted[kept].var() + 1e-8)
    np.testing.assert_allclose(whitened(advantages, x.weights), white, rtol=1e-4, atol=1e-5)


def test_whitening_leaves_out_what_is_not_learnt_from():
    x = whitened(torch.tensor([1.0, 3.0, 100.0]), torch.tensor([1.0, 1.0, 0.0]))
    assert x[:2].tolist() == pytest.approx([-1.0, 1.0])
    nothing = torch.tensor([1.0, 2.0])
    assert whitened(nothing, torch.zeros(2)) is nothing


def test_a_score_lands_on_the_last_token_and_a_penalty_on_its_own():
    x = inputs([5.0, 7.0], [2, 1], penalties=[-1.0, -2.0, -3.0])
    assert x.completion_rewards().tolist() == [2.0, 4.0]
    assert x.token_rewards().tolist() == [-1.0, 3.0, 4.0]


GROUPS = inputs([1.0, 0.0, 0.0, 3.0], [1, 2, 1, 1], group_size=2)


def test_group_advantages_are_those_of_the_papers():
    # Groups (1, 0) and (0, 3): means 0.5 and 1.5, deviations (of a sample) sqrt(0.5) and sqrt(4.5).
    a, b = 0.5 / (0.5**0.5 + 1e-4), 1.5 / (4.5**0.5 + 1e-4)
    assert grpo(GROUPS)[0].tolist() == pytest.approx([a, -a, -a, -b, b])
    assert dr_grpo(GROUPS)[0].tolist() == [0.5, -0.5, -0.5, -1.5, 1.5]
    # Less the mean of the others: 1 - 0, 0 - 1; 0 - 3, 3 - 0.
    assert rloo(GROUPS)[0].tolist() == [1.0, -1.0, -1.0, -3.0, 3.0]


def test_equal_scores_teach_nothing():
    for name in ("grpo", "dr_grpo", "rloo"):
        assert ESTIMATORS[name].build()(inputs([2.0, 2.0], [1, 1], group_size=2))[0].tolist() == [0.0, 0.0]


def test_a_missing_score_is_left_out_of_its_group_and_is_no_zero():
    x = inputs([4.0, float("nan"), 2.0], [1, 1, 1], group_size=3)
    assert dr_grpo(x)[0].tolist() == [1.0, 0.0, -1.0]
    assert rloo(x)[0].tolist() == [2.0, 0.0, -2.0]
    assert not torch.isnan(grpo(x)[0]).any()


def test_aggregates_weigh_tokens_as_they_say():
    lengths = torch.tensor([1, 4])
    for name, tokens, units in (
        ("token_mean", [1.0] * 5, [1.0, 4.0]),
        ("sequence_mean", [1.0] + [0.25] * 4, [1.0, 1.0]),
        ("constant", [0.125] * 5, [1.0, 1.0]),
    ):
        x = AGGREGATES[name](lengths, 8)
        assert x[0].tolist() == tokens
        assert x[1].tolist() == units


def test_estimators_of_kl_agree_in_expectation_and_are_never_negative_where_they_should_not_be():
    p, q = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64), torch.tensor([0.4, 0.4, 0.2], dtype=torch.float64)
    exact = float((p * (p / q).log()).sum())
    d = (p / q).log()
    assert float((p * KL_ESTIMATORS["k1"](d)).sum()) == pytest.approx(exact)
    assert float((p * KL_ESTIMATORS["k3"](d)).sum()) == pytest.approx(exact)
    # Half the squared log-ratio is right to second order of a small distance only.
    assert float((p * KL_ESTIMATORS["k2"](d)).sum()) == pytest.approx(exact, rel=0.1)
    assert (KL_ESTIMATORS["k2"](d) >= 0).all()
    assert (KL_ESTIMATORS["k3"](d) >= 0).all()


def test_the_kl_coefficient_follows_its_target_by_two_percent_at_most():
    control = KLController(1.0, target=10.0)
    control.update(11.0)  # a tenth too far: 1 + 0.1 * 0.1
    assert control.coef == pytest.approx(1.01)
    control.update(1000.0)
    assert control.coef == pytest.approx(1.01 * 1.02)
    fixed = KLController(0.5)
    fixed.update(1000.0)
    assert fixed.coef == 0.5
