"""The losses of policy and critic, by hand and by finite differences."""

import math

import pytest
import torch

from trainer.rl.losses import KL_ESTIMATORS, approx_kl, policy_loss, ratios, value_loss


def test_the_surrogate_is_clipped_only_where_that_makes_it_worse():
    ratio = torch.tensor([1.5, 0.5, 1.5, 0.5, 1.0])
    advantages = torch.tensor([1.0, -1.0, -1.0, 1.0, 2.0])
    found = policy_loss(ratio, advantages, 0.2, 0.3)
    # max(-A rho, -A clip(rho, 0.8, 1.3)): -1.3, 0.8, 1.5, -0.5, -2.
    assert found.loss.tolist() == pytest.approx([-1.3, 0.8, 1.5, -0.5, -2.0])
    assert found.clipped.tolist() == [1.0, 1.0, 0.0, 0.0, 0.0]


def test_a_clipped_token_gives_no_gradient():
    logprobs = torch.tensor([0.5, 0.05], requires_grad=True)
    policy_loss(ratios(logprobs, torch.zeros(2)), torch.ones(2), 0.2, 0.2).loss.sum().backward()
    assert logprobs.grad[0] == 0
    assert float(logprobs.grad[1]) == pytest.approx(-math.exp(0.05))


def test_the_value_loss_takes_the_larger_error():
    values, old, returns = torch.tensor([1.0, 0.1]), torch.tensor([0.0, 0.0]), torch.tensor([1.0, 1.0])
    found = value_loss(values, old, returns, 0.2)
    # (1 - 1)^2 = 0 against (0.2 - 1)^2 = 0.64; (0.1 - 1)^2 = 0.81 either way. Halves.
    assert found.loss.tolist() == pytest.approx([0.32, 0.405])
    assert found.clipped.tolist() == [1.0, 0.0]


def test_ratios_do_not_overflow():
    assert ratios(torch.tensor([1000.0]), torch.tensor([0.0])).tolist() == pytest.approx([math.exp(20)])


def test_the_approximate_kl_is_zero_where_nothing_moved_and_positive_elsewhere():
    assert approx_kl(torch.ones(1)).tolist() == [0.0]
    assert float(approx_kl(torch.tensor(2.0))) == pytest.approx(1 - math.log(2))
    assert float(approx_kl(torch.tensor(0.5))) == pytest.approx(math.log(2) - 0.5)


def test_k3_of_far_away_tokens_is_finite_and_pulls_them_back():
    d = torch.tensor([-100.0, -21.0, -20.0, 0.0, 100.0], requires_grad=True)
    k3 = KL_ESTIMATORS["k3"](d)
    k3.sum().backward()
    e20 = math.exp(20)
    expected = [e20 * 81 - 101, e20 * 2 - 22, e20 - 21, 0.0, 99.0]
    torch.testing.assert_close(k3, torch.tensor(expected))
    torch.testing.assert_close(d.grad, torch.tensor([1 - e20, 1 - e20, 1 - e20, 0.0, 1.0]))


def test_gradients_agree_with_finite_differences():
    torch.manual_seed(0)
    old, advantages = torch.randn(6, dtype=torch.float64) / 10, torch.randn(6, dtype=torch.float64)
    new = (old + torch.randn(6, dtype=torch.float64) / 20).requires_grad_()
    returns = torch.randn(6, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: policy_loss(ratios(x, old), advantages, 0.2, 0.2).loss.sum(), (new,))
    assert torch.autograd.gradcheck(lambda x: value_loss(x, old, returns, 0.2).loss.sum(), (new,))
