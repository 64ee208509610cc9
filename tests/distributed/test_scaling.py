"""The bytes that a step exchanges, as the profiler sees them, are those of the formulas."""

import pytest
import torch

from scripts.benchmarks.scaling import exchanges
from tests.ranks import on_ranks
from tests.small_run import Net, Nothing
from tests.unit.diagnostics.test_memory import layout
from trainer.metrics import Metrics
from trainer.optim import AdamW
from trainer.parallel.ddp import DDP
from trainer.parallel.precision import Compute, Precision
from trainer.parallel.zero import Zero1, Zero2, Zero3

LEARNT = 5 * 64 + 64 * 64 + 64
FROZEN = 3 * 64
MICRO_BATCHES = 2


def counted() -> dict[str, dict[str, int]]:
    """Bytes of whole tensors by kind of collective, in one step of each strategy; scalars aside."""
    return {strategy.name: _step(strategy) for strategy in (DDP(), Zero1(), Zero2(), Zero3())}


def _step(strategy) -> dict[str, int]:
    with strategy.construction():
        net = Net(64)
    engine = strategy.wrap(net, AdamW(lr=0.01), Precision(Compute.fp32))

    def loss_of(_):
        return engine.model(torch.tensor([0, 1, 2, 3])), Metrics()

    def step():
        engine.accumulate(loss_of, [Nothing()] * MICRO_BATCHES, torch.tensor(4.0))
        engine.step()

    for _ in range(3):
        step()
    with torch.profiler.profile(record_shapes=True) as profile:
        step()
    found = {"all_reduce": 0, "reduce_scatter": 0, "all_gather": 0}
    for event in profile.events():
        shapes = event.input_shapes
        if event.name == "c10d::_reduce_scatter_base_":
            found["reduce_scatter"] += 4 * shapes[1][0]
        elif event.name == "c10d::_allgather_base_":
            found["all_gather"] += 4 * shapes[0][0]
        elif event.name == "gloo:all_reduce" and shapes[0]:
            found["all_reduce"] += 4 * shapes[0][0]
    # gloo makes a reduce-scatter out of an all-reduce.
    found["all_reduce"] -= found["reduce_scatter"]
    return found


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_a_step_exchanges_the_bytes_of_the_formulas(ranks):
    for found in on_ranks(ranks, counted):
        for stage, name in enumerate(("ddp", "zero1", "zero2", "zero3")):
            expected = {"all_reduce": 0.0, "reduce_scatter": 0.0, "all_gather": 0.0}
            spread = layout(stage=stage, low_precision_weights=False, ranks=ranks)
            for exchange in exchanges(LEARNT, LEARNT + FROZEN, 1, spread, MICRO_BATCHES):
                expected[exchange.kind] += exchange.bytes * exchange.times
            assert found[name] == expected, name
