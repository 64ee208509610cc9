"""The bytes that a step exchanges, as the profiler sees them, are those of the formulas."""

import pytest
import torch

from tests.ranks import on_ranks
from tests.small_run import Net, Nothing
from tests.unit.diagnostics.test_memory import layout
from trainer.diagnostics.layout import Layout, Portion
from trainer.diagnostics.traffic import groups, weight_exchanges
from trainer.metrics import Metrics
from trainer.optim import AdamW
from trainer.parallel.ddp import DDP
from trainer.parallel.fsdp import FSDP
from trainer.parallel.precision import Compute, Precision
from trainer.parallel.zero import Zero1, Zero2, Zero3

LEARNT = 5 * 64 + 64 * 64 + 64
FROZEN = 3 * 64
MICRO_BATCHES = 2


def counted() -> dict[str, dict[str, int]]:
    """Bytes of whole tensors by kind of collective, in one step of each strategy; scalars aside."""
    return {strategy.name: _step(strategy) for strategy in (DDP(), Zero1(), Zero2(), Zero3(), FSDP())}


def _step(strategy) -> dict[str, int]:
    with strategy.construction():
        net = Net(64)
    strategy.place(net, (), Precision(Compute.fp32))
    for parameter in net.parameters():
        strategy.fill(parameter, torch.zeros(strategy.shape_of(parameter)))
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
    counts = {"all_reduce": 0, "reduce_scatter": 0, "all_gather": 0}
    for event in profile.events():
        shapes = event.input_shapes
        if event.name == "c10d::_reduce_scatter_base_":
            counts["reduce_scatter"] += 4 * shapes[1][0]
        elif event.name == "c10d::_allgather_base_":
            counts["all_gather"] += 4 * shapes[0][0]
        elif event.name == "gloo:all_reduce" and shapes[0]:
            counts["all_reduce"] += 4 * shapes[0][0]
    # gloo makes a reduce-scatter out of an all-reduce.
    counts["all_reduce"] -= counts["reduce_scatter"]
    return counts


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_a_step_exchanges_the_bytes_of_the_formulas(ranks):
    for counts in on_ranks(ranks, counted):
        for stage, name in enumerate(("ddp", "zero1", "zero2", "zero3")):
            spread = layout(stage=stage, low_precision_weights=False, ranks=ranks, micro_batches=MICRO_BATCHES)
            assert counts[name] == expected(LEARNT, FROZEN, spread), name
        # FSDP fills the rows of a matrix up to a multiple of the ranks; all of this model is around its blocks.
        spread = layout(stage=3, float_rows=True, low_precision_weights=False, ranks=ranks, micro_batches=MICRO_BATCHES)
        filled = {rows: -(-rows // ranks) * ranks for rows in (3, 5)}
        learnt, frozen = LEARNT + (filled[5] - 5) * 64, FROZEN + (filled[3] - 3) * 64
        assert counts["fsdp"] == expected(learnt, frozen, spread)


def expected(learnt: int, frozen: int, spread: Layout) -> dict[str, float]:
    """Bytes of whole tensors by kind of collective, by the formulas."""
    total = {"all_reduce": 0.0, "reduce_scatter": 0.0, "all_gather": 0.0}
    for exchange in weight_exchanges(Portion(0, 0, learnt + frozen, 1), learnt, spread, groups(spread, spread.ranks)):
        total[exchange.kind] += exchange.bytes * exchange.times
    return total
