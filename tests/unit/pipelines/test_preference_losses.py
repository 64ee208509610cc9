"""The table of preference losses: hand-derived numbers, an independent reference in NumPy, finite differences."""

import math

import numpy as np
import pytest
import torch

from trainer.pipelines.answers import LabelledAnswers, PairAnswers
from trainer.pipelines.preference_losses import OBJECTIVES, Strength

COUNTS = (4.0, 5.0)
PAIRED = [name for name, objective in OBJECTIVES.items() if objective.reads is PairAnswers]


def answers(chosen: float, rejected: float, reference=(0.0, 0.0), counts=COUNTS) -> PairAnswers:
    """One pair, from sums of log-probabilities."""
    c, r = (torch.tensor([v], dtype=torch.float64) for v in (chosen, rejected))
    ratio = [c - reference[0], r - reference[1]]
    means = [c / counts[0], r / counts[1]]
    return PairAnswers(c, r, *means, *ratio, ratio[0] / counts[0], ratio[1] / counts[1])


def loss(name: str, *args, **settings) -> float:
    return float(OBJECTIVES[name].loss(answers(*args), Strength(**settings)))


def test_at_the_reference_dpo_costs_the_logarithm_of_two():
    for name in ("sigmoid", "robust"):
        assert loss(name, -8.0, -10.0, (-8.0, -10.0), beta=0.1, smoothing=0.2) == pytest.approx(math.log(2), abs=1e-12)
    assert loss("hinge", -8.0, -10.0, (-8.0, -10.0), beta=0.1) == 1
    assert loss("ipo", -8.0, -10.0, (-8.0, -10.0), beta=0.1) == pytest.approx(25)  # (0 - 1/0.2)^2


def test_losses_are_what_was_worked_out_by_hand():
    # Ratios: chosen 2 - 0, rejected -1 - 1 = -2, difference 4; with beta 0.5 the argument is 2.
    pair = (2.0, -1.0, (0.0, 1.0))
    assert loss("sigmoid", *pair, beta=0.5) == pytest.approx(math.log(1 + math.exp(-2)))
    expected = 0.9 * math.log(1 + math.exp(-2)) + 0.1 * math.log(1 + math.exp(2))
    assert loss("sigmoid", *pair, beta=0.5, smoothing=0.1) == pytest.approx(expected)
    expected = (0.9 * math.log(1 + math.exp(-2)) - 0.1 * math.log(1 + math.exp(2))) / 0.8
    assert loss("robust", *pair, beta=0.5, smoothing=0.1) == pytest.approx(expected)
    assert loss("hinge", *pair, beta=0.1) == pytest.approx(0.6)
    # Means: 2 / 4 and -2 / 5, difference 0.9; 1 / (2 beta) = 1.
    assert loss("ipo", *pair, beta=0.5) == pytest.approx(0.01)
    assert loss("ipo", *pair, beta=0.5, average=False) == pytest.approx(9)


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


def drawn() -> list[np.ndarray]:
    draw = np.random.default_rng(0)
    c, r, known_c, known_r = -draw.uniform(1, 60, (4, 200))
    n, m = draw.integers(1, 30, (2, 200))
    return [c, r, c / n, r / m, c - known_c, r - known_r, (c - known_c) / n, (r - known_r) / m]


@pytest.mark.parametrize("name", PAIRED)
def test_losses_equal_an_independent_reference(name):
    columns = drawn()
    found = OBJECTIVES[name].loss(PairAnswers(*map(torch.from_numpy, columns)), Strength(0.3, 0.15, 0.7))
    expected = in_numpy(name, *columns, 0.3, 0.15, 0.7)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", PAIRED)
def test_gradients_equal_finite_differences(name):
    columns = [torch.from_numpy(c[:20].copy()).requires_grad_() for c in drawn()]
    strength = Strength(0.3, 0.15, 0.7)
    assert torch.autograd.gradcheck(lambda *t: OBJECTIVES[name].loss(PairAnswers(*t), strength), columns)


def labelled(ratios, labels, moved) -> LabelledAnswers:
    ratio, label = (torch.tensor(v, dtype=torch.float64) for v in (ratios, labels))
    return LabelledAnswers(ratio - 3, (ratio - 3) / 4, ratio, label, torch.tensor(moved, dtype=torch.float64))


def test_kto_is_what_was_worked_out_by_hand():
    # Desirable: sigma(0.5 (3 - 1)) = sigma(1); undesirable: sigma(0.5 (1 - 3)) = sigma(-1), weighted 2.
    found = OBJECTIVES["kto"].loss(labelled([3.0, 3.0], [1, -1], 1.0), Strength(0.5, undesirable=2.0))
    sigma = 1 / (1 + math.exp(-1))
    assert found.tolist() == pytest.approx([1 - sigma, 2 * sigma])
    # At the reference every completion costs half its weight.
    assert OBJECTIVES["kto"].loss(labelled([0.0, 0.0], [1, -1], 0.0), Strength(0.1)).tolist() == [0.5, 0.5]


def test_kto_equals_an_independent_reference_and_finite_differences():
    draw = np.random.default_rng(1)
    ratio, label, moved = draw.normal(0, 8, 200), draw.choice([-1.0, 1.0], 200), 1.7
    z = np.where(label > 0, ratio - moved, moved - ratio)
    expected = np.where(label > 0, 1.3, 0.8) * (1 - 1 / (1 + np.exp(-0.3 * z)))
    strength = Strength(0.3, desirable=1.3, undesirable=0.8)
    np.testing.assert_allclose(
        OBJECTIVES["kto"].loss(labelled(ratio, label, moved), strength).numpy(), expected, rtol=1e-6
    )
    free = torch.from_numpy(ratio[:20].copy()).requires_grad_()

    def of(r):
        return OBJECTIVES["kto"].loss(
            LabelledAnswers(r, r, r, torch.from_numpy(label[:20]), torch.tensor(moved)), strength
        )

    assert torch.autograd.gradcheck(of, free)


def test_margins_of_labelled_answers_are_positive_on_their_own_side():
    answers = labelled([3.0, 3.0, 0.0], [1, -1, -1], 1.0)
    assert answers.margins(0.5, referenced=True).tolist() == [1.0, -1.0, 0.5]
    figures = answers.figures(0.5, referenced=True)
    assert figures["rewards/accuracy"].values.tolist() == [1, 0, 1]
    assert [float((f.values * f.weights).sum()) for f in (figures["rewards/chosen"], figures["rewards/rejected"])] == [
        1.5,
        1.5,
    ]
