"""The loop on a model of one weight: what a step follows, in which order, and how often."""

from dataclasses import dataclass

import pytest
import torch
from torch import nn

from trainer.batch import Batch
from trainer.diagnostics.guard import Guard, GuardSettings
from trainer.loop import train, train_step
from trainer.metrics import Metrics
from trainer.optim import AdamW
from trainer.parallel.ddp import DDP
from trainer.parallel.precision import Compute, Precision
from trainer.pipelines.base import Models, Pipeline
from trainer.tracking.throughput import Stopwatch

CPU = torch.device("cpu")


@dataclass
class Numbers(Batch):
    """Some numbers, each of which has a weight."""

    values: torch.Tensor
    weights: torch.Tensor

    @property
    def weight(self) -> torch.Tensor:
        return self.weights.sum(dtype=torch.float64)

    @property
    def seen(self) -> torch.Tensor:
        return torch.tensor(float(len(self.values)), dtype=torch.float64)


def numbers(*values: float, weights: list[float] | None = None) -> Numbers:
    return Numbers(torch.arange(len(values)), torch.tensor(values), torch.tensor(weights or [1.0] * len(values)))


class OneWeight(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([[1.0]]))

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return self.w[0, 0] * values


@dataclass
class Linear(Pipeline):
    """The loss of a number x is w x, so its gradient is x."""

    def loss(self, models, batch):
        return (models.trained(batch.values) * batch.weights).sum(), Metrics()


class Batches:
    """Micro-batches of one number each, 1, 2, 3, ..., that count what was consumed."""

    def __init__(self) -> None:
        self.consumed, self.observed = 0, []

    def __iter__(self):
        return self

    def __next__(self) -> Numbers:
        self.consumed += 1
        return numbers(float(self.consumed))

    def observe(self, metrics) -> None:
        self.observed.append(float(metrics["loss"]))


@pytest.fixture
def parts():
    """Models, an engine without clipping or decay, a guard and a stopwatch."""
    engine = DDP().wrap(OneWeight(), AdamW(lr=0.1, weight_decay=0.0, clip=0.0), Precision(Compute.fp32))
    return Models(engine.model, None), engine, Guard(GuardSettings(), CPU), Stopwatch(CPU)


def gradient_of(parts, *batches: Numbers) -> tuple[float, dict[str, float]]:
    """The gradient that a step follows, as its norm, and its metrics."""
    models, engine, guard, watch = parts
    values = train_step(Linear(), models, engine, guard, watch, batches)
    return float(values["grad_norm"]), {name: float(value) for name, value in values.items()}


def test_a_step_follows_the_weighted_mean_over_all_micro_batches(parts):
    # (1 * 1 + 3 * 1 + 10 * 2) / (1 + 1 + 2): no mean of means, which would be (2 + 10) / 2.
    gradient, values = gradient_of(parts, numbers(1.0, 3.0), numbers(10.0, weights=[2.0]))
    assert gradient == pytest.approx(6.0)
    assert (values["loss"], values["tokens"]) == (pytest.approx(6.0), 3.0)
    assert values["skipped"] == 0


def test_the_split_into_micro_batches_changes_nothing(parts):
    split = gradient_of(parts, numbers(1.0), numbers(3.0), numbers(5.0))[0]
    assert split == gradient_of(parts, numbers(1.0, 3.0, 5.0))[0] == 3.0


def test_a_step_without_weight_is_skipped(parts):
    before = parts[1].model.w.item()
    values = gradient_of(parts, numbers(4.0, weights=[0.0]))[1]
    assert (values["skipped"], values["loss"]) == (1, 0)
    assert parts[1].model.w.item() == before


def test_a_gradient_that_is_not_finite_is_skipped_and_training_goes_on(parts):
    assert gradient_of(parts, numbers(float("nan")))[1]["skipped_in_a_row"] == 1
    values = gradient_of(parts, numbers(2.0))[1]
    assert (values["skipped"], values["skipped_in_a_row"]) == (1, 0)


def test_training_takes_the_steps_it_is_asked_for_with_their_learning_rates(parts):
    models, engine, guard, watch = parts
    batches, rates = Batches(), []
    steps = train(
        Linear(), models, engine, batches, lambda step: step / 10, guard, watch, seed=0, first=3, last=5, accumulate=2
    )
    for step in steps:
        rates.append(engine.optimizers[0].param_groups[0]["lr"])
        assert batches.consumed == 2 * (step.number - 2)  # nothing is read ahead of the step that learns from it
    assert rates == pytest.approx([0.03, 0.04, 0.05])
    assert len(batches.observed) == 3
    assert [float(v) for batch in step.micro_batches for v in batch.values] == [5.0, 6.0]


def test_a_pipeline_may_replace_the_micro_batches_of_a_step(parts):
    class Doubled(Linear):
        def prepare_step(self, models, engine, micro_batches):
            return [numbers(*(2 * batch.values).tolist()) for batch in micro_batches]

    models, engine, guard, watch = parts
    values = train_step(Doubled(), models, engine, guard, watch, [numbers(1.0), numbers(3.0)])
    assert float(values["grad_norm"]) == 4.0


def test_a_stop_request_is_a_metric_of_the_step(parts, monkeypatch):
    from trainer import stopping

    monkeypatch.setattr(stopping, "_asked", 15)
    assert gradient_of(parts, numbers(1.0))[1]["stopping"] == 15
