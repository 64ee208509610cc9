"""Held-out data: every unit counts once on any number of ranks, and the worst ones are shown."""

from dataclasses import dataclass

import pytest
import torch
from torch import nn

from tests.ranks import on_ranks
from trainer.batch import Batch
from trainer.evaluate import Evaluation
from trainer.metrics import Metrics
from trainer.optim import AdamW
from trainer.parallel.ddp import DDP
from trainer.parallel.precision import Compute, Precision
from trainer.pipelines.base import Models, Pipeline


@dataclass
class Numbers(Batch):
    values: torch.Tensor

    @property
    def weight(self) -> torch.Tensor:
        return (self.rows >= 0).sum(dtype=torch.float64)


class Store:
    """Held-out numbers by number, as prepared data is."""

    def __init__(self, *values: float) -> None:
        self.values = values

    def __len__(self) -> int:
        return len(self.values)

    def collate(self, numbers) -> Numbers:
        return Numbers(torch.tensor(numbers), torch.tensor([self.values[n] if n >= 0 else 1e9 for n in numbers]))

    def preview(self, number: int, tokenizer) -> dict[str, str]:
        return {"prompt": f"number {self.values[number]:g}"}


@dataclass
class Identity(Pipeline):
    """The loss of a number is the number; the metric ``margin`` is known of every unit."""

    def loss(self, models, batch):
        assert not models.trained.training
        metrics = Metrics()
        metrics.per_example("margin", batch.values, batch.rows)
        return (batch.values * (batch.rows >= 0)).sum(), metrics


def measure(heldout: dict[str, Store], micro: int = 2, **settings):
    engine = DDP().wrap(nn.Linear(1, 1), AdamW(lr=0.1), Precision(Compute.fp32))
    measured = Evaluation(**settings).measure(Identity(), Models(engine.model, None), engine, heldout, micro)
    return {name: float(value) for name, value in measured.values.items()}, measured.units, measured.errors


def test_the_loss_is_the_mean_of_all_units_and_rows_that_fill_up_do_not_count():
    values, units, _ = measure({"one": Store(1.0, 2.0, 6.0)})
    assert values == {"eval/loss": 3.0}
    assert units == {"eval/margin": [1.0, 2.0, 6.0]}


def test_several_sources_have_values_of_their_own_and_units_weigh_alike():
    values, _, _ = measure({"one": Store(1.0, 2.0, 6.0), "other": Store(11.0)})
    assert values == {"eval/one/loss": 3.0, "eval/other/loss": 11.0, "eval/loss": 5.0}


def test_a_mean_of_nothing_is_left_out():
    class Sided(Identity):
        def loss(self, models, batch):
            loss, metrics = super().loss(models, batch)
            for name, side in (("large", batch.values > 5), ("huge", batch.values > 1e10)):
                counts = side & (batch.rows >= 0)
                metrics.mean(name, (batch.values * counts).sum(), counts.sum())
            return loss, metrics

    engine = DDP().wrap(nn.Linear(1, 1), AdamW(lr=0.1), Precision(Compute.fp32))
    stores = {"one": Store(1.0, 2.0, 6.0)}
    values = Evaluation().measure(Sided(), Models(engine.model, None), engine, stores, 2).values
    assert {name: float(value) for name, value in values.items()} == {"eval/loss": 3.0, "eval/large": 6.0}


def test_rows_limits_the_units_of_each_source():
    assert measure({"one": Store(1.0, 2.0, 6.0)}, rows=2)[0] == {"eval/loss": 1.5}


def test_the_units_with_the_lowest_values_are_shown_as_errors():
    _, _, errors = measure({"one": Store(4.0, 2.0, 3.0)}, errors=2)
    assert errors == [
        {"source": "one", "row": 1, "margin": 2.0, "prompt": "number 2"},
        {"source": "one", "row": 2, "margin": 3.0, "prompt": "number 3"},
    ]


def on_two() -> tuple:
    values, units, errors = measure({"one": Store(1.0, 2.0, 6.0, 7.0, 9.0)}, errors=1)
    return values, sorted(units["eval/margin"]), errors


def test_two_ranks_measure_what_one_does():
    assert on_ranks(2, on_two) == [on_two()] * 2
    assert on_two()[0] == {"eval/loss": 5.0}


@pytest.mark.parametrize(("every", "steps"), [(0, [10]), (4, [4, 8, 10])])
def test_an_evaluation_is_due_every_so_many_steps_and_after_the_last(every, steps):
    assert [step for step in range(1, 11) if Evaluation(every=every).due(step, 10)] == steps
