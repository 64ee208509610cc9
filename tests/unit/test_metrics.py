"""Numbers combine over micro-batches and ranks as if there had been one batch on one rank."""

import torch

from trainer.metrics import Metrics


def reported(values: list[float], weights: list[float]) -> Metrics:
    v, w = torch.tensor(values), torch.tensor(weights)
    metrics = Metrics()
    metrics.mean("mean", (v * w).sum(), w.sum())
    metrics.total("total", v.sum())
    metrics.std("std", v)
    metrics.minimum("min", v.min())
    metrics.maximum("max", v.max())
    return metrics


def test_values_of_two_micro_batches_on_two_ranks_equal_those_of_the_whole():
    first, second, third = reported([1, 2], [1, 0]), reported([3], [2]), reported([6, 8], [1, 1])
    first.merge(second)
    values = first.reduced(lambda mine: torch.stack([mine, third.packed()]))
    # By hand: (1*1 + 3*2 + 6 + 8) / (1 + 2 + 2) = 21 / 5; values 1 2 3 6 8: mean 4, variance (9+4+1+4+16)/5 = 6.8.
    assert values["mean"].item() == 21 / 5
    assert values["total"].item() == 20
    assert abs(values["std"].item() - 6.8**0.5) < 1e-12
    assert (values["min"].item(), values["max"].item()) == (1, 8)


def test_a_mean_over_nothing_is_zero_and_not_nan():
    metrics = reported([0.0], [0.0])
    assert metrics.reduced(lambda mine: mine[None])["mean"].item() == 0


def test_metrics_hold_no_graph():
    metrics = Metrics()
    metrics.mean("x", torch.ones((), requires_grad=True) * 2, 1.0)
    assert not metrics.packed().requires_grad


def test_a_deviation_leaves_out_what_is_masked():
    metrics = Metrics()
    metrics.std("std", torch.tensor([1.0, 3.0, 99.0]), torch.tensor([1.0, 1.0, 0.0]))
    assert metrics.reduced(lambda mine: mine[None])["std"].item() == 1
