"""Advantages, by hand and against a plain NumPy reference on ragged batches (docs/algorithms.md#advantages)."""

import numpy as np
import pytest
import torch

from trainer.rl.advantages import AGGREGATES, ESTIMATORS, KL, Discount, Rewards, dr_grpo, gae, grpo, rloo, whitened


def rewards(scores, lengths, *, penalties=None, values=None, beyond=None, samples=1, weights=None) -> Rewards:
    count = sum(lengths)
    return Rewards(
        torch.tensor(scores), torch.tensor(penalties or [0.0] * count), torch.tensor(values or [0.0] * count),
        torch.tensor(beyond or [0.0] * len(lengths)), torch.tensor(weights or [1.0] * count), torch.tensor(lengths), samples,
    )  # fmt: skip


def plain_gae(scores, lengths, penalties, values, beyond, gamma, lam):
    """Token by token, in float64."""
    at, advantages, returns = 0, [], []
    for score, length, behind in zip(scores, lengths, beyond, strict=True):
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
    found = rewards([1.0], [2], penalties=[-0.1, 0.0], values=[0.2, 0.5])
    advantages, returns = gae(found, Discount(0.9, 0.8))
    assert advantages.tolist() == pytest.approx([0.51, 0.5])
    assert returns.tolist() == pytest.approx([0.71, 1.0])


def test_a_completion_that_was_cut_off_goes_on_with_the_value_behind_it():
    advantages, _ = gae(rewards([0.0, 0.0], [1, 1], beyond=[2.0, 0.0]), Discount(0.5, 1.0))
    assert advantages.tolist() == [1.0, 0.0]


@pytest.mark.parametrize("seed", range(5))
def test_advantages_and_whitening_agree_with_a_plain_reference_on_ragged_batches(seed):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 9, 7).tolist()
    count = sum(lengths)
    scores, beyond = rng.normal(size=7).tolist(), rng.normal(size=7).tolist()
    penalties, values = rng.normal(size=count).tolist(), rng.normal(size=count).tolist()
    weights = (rng.random(count) < 0.8).astype(float).tolist()
    r = rewards(scores, lengths, penalties=penalties, values=values, beyond=beyond, weights=weights)
    advantages, returns = gae(r, Discount(0.97, 0.9))
    wanted, wanted_returns = plain_gae(scores, lengths, penalties, values, beyond, 0.97, 0.9)
    np.testing.assert_allclose(advantages, wanted, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(returns, wanted_returns, rtol=1e-5, atol=1e-5)
    kept = np.array(weights) > 0
    white = (wanted - wanted[kept].mean()) / np.sqrt(wanted[kept].var() + 1e-8)
    np.testing.assert_allclose(whitened(advantages, r.weights), white, rtol=1e-4, atol=1e-5)


def test_whitening_leaves_out_what_is_not_learnt_from():
    found = whitened(torch.tensor([1.0, 3.0, 100.0]), torch.tensor([1.0, 1.0, 0.0]))
    assert found[:2].tolist() == pytest.approx([-1.0, 1.0])
    nothing = torch.tensor([1.0, 2.0])
    assert whitened(nothing, torch.zeros(2)) is nothing


def test_a_score_lands_on_the_last_token_and_a_penalty_on_its_own():
    r = rewards([5.0, 7.0], [2, 1], penalties=[-1.0, -2.0, -3.0])
    assert r.tokens.tolist() == [-1.0, 3.0, 4.0]


GROUPS = rewards([1.0, 0.0, 0.0, 3.0], [1, 2, 1, 1], samples=2)


def test_group_advantages_are_those_of_the_papers():
    # Groups (1, 0) and (0, 3): means 0.5 and 1.5, deviations (of a sample) sqrt(0.5) and sqrt(4.5).
    a, b = 0.5 / (0.5**0.5 + 1e-4), 1.5 / (4.5**0.5 + 1e-4)
    assert grpo(GROUPS, Discount())[0].tolist() == pytest.approx([a, -a, -a, -b, b])
    assert dr_grpo(GROUPS, Discount())[0].tolist() == [0.5, -0.5, -0.5, -1.5, 1.5]
    # Less the mean of the others: 1 - 0, 0 - 1; 0 - 3, 3 - 0.
    assert rloo(GROUPS, Discount())[0].tolist() == [1.0, -1.0, -1.0, -3.0, 3.0]


def test_equal_scores_teach_nothing():
    for name in ("grpo", "dr_grpo", "rloo"):
        assert ESTIMATORS[name].of(rewards([2.0, 2.0], [1, 1], samples=2), Discount())[0].tolist() == [0.0, 0.0]


def test_a_missing_score_is_left_out_of_its_group_and_is_no_zero():
    found = rewards([4.0, float("nan"), 2.0], [1, 1, 1], samples=3)
    assert dr_grpo(found, Discount())[0].tolist() == [1.0, 0.0, -1.0]
    assert rloo(found, Discount())[0].tolist() == [2.0, 0.0, -2.0]
    assert not torch.isnan(grpo(found, Discount())[0]).any()


def test_aggregates_weigh_tokens_as_they_say():
    lengths = torch.tensor([1, 4])
    for name, tokens, units in (
        ("token_mean", [1.0] * 5, [1.0, 4.0]),
        ("sequence_mean", [1.0] + [0.25] * 4, [1.0, 1.0]),
        ("constant", [0.125] * 5, [1.0, 1.0]),
    ):
        found = AGGREGATES[name](lengths, 8)
        assert found[0].tolist() == tokens
        assert found[1].tolist() == units


def test_estimators_of_kl_agree_in_expectation_and_are_never_negative_where_they_should_not_be():
    p, q = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64), torch.tensor([0.4, 0.4, 0.2], dtype=torch.float64)
    exact = float((p * (p / q).log()).sum())
    d = (p / q).log()
    assert float((p * KL["k1"](d)).sum()) == pytest.approx(exact)
    assert float((p * KL["k3"](d)).sum()) == pytest.approx(exact)
    # Half the squared log-ratio is right to second order of a small distance only.
    assert float((p * KL["k2"](d)).sum()) == pytest.approx(exact, rel=0.1)
    assert (KL["k2"](d) >= 0).all()
    assert (KL["k3"](d) >= 0).all()
