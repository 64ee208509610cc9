"""The table of preference losses: hand-derived numbers, an independent reference in NumPy, finite differences."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from trainer.pipelines.kto import kto_loss
from trainer.pipelines.preference_losses import LOSSES, PairLogps, preference_loss

TOKENS = (4.0, 5.0)


def pair(chosen: float, rejected: float, reference=(0.0, 0.0), tokens=TOKENS) -> PairLogps:
    """One pair, from sums of log-probabilities."""
    columns = ([chosen, rejected], reference, tokens)
    return PairLogps.interleaved(*(torch.tensor(column, dtype=torch.float64) for column in columns))


def loss(name: str, *args, **settings) -> float:
    return float(LOSSES[name].function(pair(*args), **settings))


def test_at_the_reference_dpo_costs_the_logarithm_of_two():
    for name in ("sigmoid", "robust"):
        found = loss(name, -8.0, -10.0, (-8.0, -10.0), beta=0.1, label_smoothing=0.2)
        assert found == pytest.approx(math.log(2), abs=1e-12)
    assert loss("hinge", -8.0, -10.0, (-8.0, -10.0), beta=0.1) == 1
    assert loss("ipo", -8.0, -10.0, (-8.0, -10.0), beta=0.1) == pytest.approx(25)  # (0 - 1/0.2)^2


def test_losses_are_what_was_worked_out_by_hand():
    # Ratios: chosen 2 - 0, rejected -1 - 1 = -2, difference 4; with beta 0.5 the argument is 2.
    case = (2.0, -1.0, (0.0, 1.0))
    assert loss("sigmoid", *case, beta=0.5) == pytest.approx(math.log(1 + math.exp(-2)))
    expected = 0.9 * math.log(1 + math.exp(-2)) + 0.1 * math.log(1 + math.exp(2))
    assert loss("sigmoid", *case, beta=0.5, label_smoothing=0.1) == pytest.approx(expected)
    expected = (0.9 * math.log(1 + math.exp(-2)) - 0.1 * math.log(1 + math.exp(2))) / 0.8
    assert loss("robust", *case, beta=0.5, label_smoothing=0.1) == pytest.approx(expected)
    assert loss("hinge", *case, beta=0.1) == pytest.approx(0.6)
    # Means: 2 / 4 and -2 / 5, difference 0.9; 1 / (2 beta) = 1.
    assert loss("ipo", *case, beta=0.5) == pytest.approx(0.01)
    assert loss("ipo", *case, beta=0.5, average=False) == pytest.approx(9)


def test_losses_without_a_reference_are_what_was_worked_out_by_hand():
    # Means -1 and -2: beta (1) - gamma = 2 - 0.5.
    assert loss("simpo", -4.0, -10.0, beta=2, gamma=0.5) == pytest.approx(math.log(1 + math.exp(-1.5)))
    odds = math.log(math.exp(-1) / (1 - math.exp(-1))) - math.log(math.exp(-2) / (1 - math.exp(-2)))
    expected = 1 + 0.1 * math.log(1 + math.exp(-odds))
    assert loss("orpo", -4.0, -10.0, beta=0.1, gamma=0.1) == pytest.approx(expected)


def in_numpy(name: str, c, r, mean_c, mean_r, ratio_c, ratio_r, mean_ratio_c, mean_ratio_r, beta, smoothing, gamma):
    """The table of docs/algorithms.md#preferences once more, naively."""

    def sigma(x):
        return 1 / (1 + np.exp(-x))

    d = ratio_c - ratio_r
    right, wrong = np.log(sigma(beta * d)), np.log(sigma(-beta * d))
    odds = [np.log(np.exp(m) / (1 - np.exp(m))) for m in (mean_c, mean_r)]
    return {
        "sigmoid": -(1 - smoothing) * right - smoothing * wrong,
        "robust": (-(1 - smoothing) * right + smoothing * wrong) / (1 - 2 * smoothing),
        "hinge": np.maximum(0, 1 - beta * d),
        "ipo": (mean_ratio_c - mean_ratio_r - 1 / (2 * beta)) ** 2,
        "simpo": -np.log(sigma(beta * (mean_c - mean_r) - gamma)),
        "orpo": -mean_c - gamma * np.log(sigma(odds[0] - odds[1])),
    }[name]


def drawn(size: int = 200) -> list[Tensor]:
    """``(2 B,)`` of policy, reference and tokens, chosen and rejected by turns."""
    draw = np.random.default_rng(0)
    policy, reference = -draw.uniform(1, 60, (2, 2 * size))
    tokens = draw.integers(1, 30, 2 * size).astype(float)
    return [torch.from_numpy(column) for column in (policy, reference, tokens)]


def settings_of(name: str) -> dict[str, float]:
    settings = {"beta": 0.3, "label_smoothing": 0.15, "gamma": 0.7}
    return {key: value for key, value in settings.items() if key in LOSSES[name].defaults}


@pytest.mark.parametrize("name", LOSSES)
def test_losses_equal_an_independent_reference(name):
    policy, reference, tokens = (column.numpy().reshape(-1, 2).T for column in drawn())
    ratio = policy - reference
    columns = [*policy, *(policy / tokens), *ratio, *(ratio / tokens)]
    found = LOSSES[name].function(PairLogps.interleaved(*drawn()), **settings_of(name))
    expected = in_numpy(name, *columns, 0.3, 0.15, 0.7)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_equal_finite_differences(name):
    policy, reference, tokens = drawn(20)

    def of(policy: Tensor) -> Tensor:
        return LOSSES[name].function(PairLogps.interleaved(policy, reference, tokens), **settings_of(name))

    assert torch.autograd.gradcheck(of, policy.requires_grad_())


def test_a_loss_names_its_hyper_parameters_with_their_defaults():
    assert LOSSES["simpo"].defaults == {"beta": 2.0, "gamma": 1.0}
    with pytest.raises(TypeError, match="nameless needs a parameter beta, and a default for each"):

        @preference_loss()
        def nameless(pairs, *, tau=1.0):
            return pairs.difference

    assert "nameless" not in LOSSES


def test_kto_is_what_was_worked_out_by_hand():
    # Desirable: sigma(0.5 (3 - 1)) = sigma(1); undesirable: sigma(0.5 (1 - 3)) = sigma(-1), weighted 2.
    labels = torch.tensor([1.0, -1.0])
    found = kto_loss(torch.tensor([3.0, 3.0]), labels, torch.tensor(1.0), 0.5, undesirable_weight=2.0)
    sigma = 1 / (1 + math.exp(-1))
    assert found.tolist() == pytest.approx([1 - sigma, 2 * sigma])
    # At the reference every completion costs half its weight.
    assert kto_loss(torch.zeros(2), labels, torch.tensor(0.0), 0.1).tolist() == [0.5, 0.5]


def test_kto_equals_an_independent_reference_and_finite_differences():
    draw = np.random.default_rng(1)
    ratio, label, kl = draw.normal(0, 8, 200), draw.choice([-1.0, 1.0], 200), 1.7
    z = np.where(label > 0, ratio - kl, kl - ratio)
    expected = np.where(label > 0, 1.3, 0.8) * (1 - 1 / (1 + np.exp(-0.3 * z)))

    def of(ratio: Tensor) -> Tensor:
        return kto_loss(ratio, torch.from_numpy(label[: len(ratio)]), torch.tensor(kl), 0.3, 1.3, 0.8)

    np.testing.assert_allclose(of(torch.from_numpy(ratio)).numpy(), expected, rtol=1e-6)
    assert torch.autograd.gradcheck(of, torch.from_numpy(ratio[:20].copy()).requires_grad_())
