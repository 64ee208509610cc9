"""The bytes that a step exchanges, as the profiler sees them, are those of the formulas."""

import dataclasses
from collections import Counter

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.ranks import on_ranks, session_of
from tests.shapes import architecture
from tests.small_run import Net, Nothing
from tests.unit.diagnostics.test_memory import layout
from trainer.data.rows import Segment, collate
from trainer.diagnostics.guard import Guard, GuardSettings
from trainer.diagnostics.layout import Layout, Portion
from trainer.diagnostics.traffic import exchanges, groups, weight_exchanges
from trainer.loop import train_step
from trainer.metrics import Metrics
from trainer.models.initial import initial
from trainer.models.recompute import Recompute
from trainer.models.stage import keep_stage
from trainer.models.transformer import Transformer
from trainer.optim import AdamW
from trainer.parallel.ddp import DDP
from trainer.parallel.fsdp import FSDP
from trainer.parallel.mesh import Mesh
from trainer.parallel.precision import Compute, Precision
from trainer.parallel.zero import Zero1, Zero2, Zero3
from trainer.pipelines.base import Models
from trainer.pipelines.pretrain import Pretrain
from trainer.tracking.throughput import Stopwatch

LEARNT = 5 * 64 + 64 * 64 + 64
FROZEN = 3 * 64
MICRO_BATCHES = 2
LENGTH = 64
BOOKS = 4000
"""Bytes below which an exchange keeps books: norms, counts, three numbers of a token for each part of a vocabulary."""
DENSE = architecture(
    vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, tie_word_embeddings=False,
)  # fmt: skip
MIXTURE = architecture(
    vocab_size=128, family="qwen3_moe", hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, experts=8, experts_per_token=2, expert_size=32, tie_word_embeddings=False,
)  # fmt: skip
TIED = dataclasses.replace(DENSE, tie_word_embeddings=True)
SHAPES = {"expert": MIXTURE, "pipeline": TIED, "sequence": DENSE, "tensor": DENSE}


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
    counts, summed_everywhere = {"all_reduce": 0, "reduce_scatter": 0, "all_gather": 0}, 0
    for event in profile.events():
        shapes = event.input_shapes
        if event.name == "c10d::_reduce_scatter_base_":
            counts["reduce_scatter"] += 4 * shapes[1][0]
            summed_everywhere += 4 * shapes[1][0]
        elif event.name == "c10d::alltoall_base_":  # FSDP's own for gloo
            counts["reduce_scatter"] += 4 * shapes[1][0]
        elif event.name == "c10d::_allgather_base_":
            counts["all_gather"] += 4 * shapes[0][0]
        elif event.name == "gloo:all_reduce" and shapes[0]:
            counts["all_reduce"] += 4 * shapes[0][0]
    # gloo makes a reduce-scatter out of an all-reduce.
    counts["all_reduce"] -= summed_everywhere
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


COLLECTIVES = {
    "allreduce_": ("all_reduce", lambda args: sum(t.nbytes for t in args[0])),
    "_allgather_base_": ("all_gather", lambda args: args[0].nbytes),
    "_reduce_scatter_base_": ("reduce_scatter", lambda args: args[1].nbytes),
    "alltoall_base_": ("all_to_all", lambda args: args[1].nbytes),
    "send": ("send", lambda args: args[0][0].nbytes),
}
"""Kinds of `Exchange` by PyTorch's names, and the bytes that each counts."""


class Moved(TorchDispatchMode):
    """Adds up bytes of collectives by kind, as `Exchange` counts them; what keeps books is smaller than `BOOKS`."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d" and (name := func._opname) in COLLECTIVES:
            kind, size_of = COLLECTIVES[name]
            if (size := size_of(args)) >= BOOKS:
                self.bytes[kind] += size
        return func(*args, **(kwargs or {}))


def moved(axis: str, recompute: Recompute) -> Counter[str]:
    """Bytes that a step of two micro-batches of two rows moves on this rank of two that an axis divides."""
    strategy = FSDP(**{axis: 2})
    with strategy.construction():
        model = Transformer(SHAPES[axis], recompute)
        keep_stage(model, Mesh.of(strategy.mesh).pipeline)
    strategy.place(model, model.model.layers, Precision())
    for name, parameter in model.named_parameters():
        strategy.fill(parameter, initial(name, strategy.shape_of(parameter), 0, 0.1, 2))
    engine = strategy.wrap(model, AdamW(lr=0.01), Precision())
    models = Models(engine.model, None)  # type: ignore[arg-type]
    rows = [[Segment(np.arange(LENGTH + 1) % 97)] for _ in range(2)]
    batch = collate(rows, [0, 1], LENGTH, 0)
    guard, watch = Guard(GuardSettings(), engine.device), Stopwatch(engine.device)
    train_step(Pretrain(), models, engine, guard, watch, [batch, batch])
    with Moved() as counting:
        train_step(Pretrain(), models, engine, guard, watch, [batch, batch])
    return counting.bytes


def of_axes(*axes: str) -> list[Counter[str]]:
    counts = []
    for axis in axes:
        with session_of(FSDP(**{axis: 2}).mesh.replica):
            counts += [moved(axis, recompute) for recompute in (Recompute.none, Recompute.full)]
    return counts


@pytest.mark.slow
def test_each_axis_moves_the_bytes_of_its_formulas():
    every = on_ranks(2, of_axes, *SHAPES, joined=False, timeout=240)
    cases = [(axis, recompute) for axis in SHAPES for recompute in (Recompute.none, Recompute.full)]
    for number, (axis, recompute) in enumerate(cases):
        spread = layout(
            stage=3, float_rows=True, low_precision_weights=False, compute=4, ranks=2, micro=2, length=LENGTH,
            micro_batches=2, recompute=recompute, cuda=False, **{axis: 2},
        )  # fmt: skip
        expected: Counter[str] = Counter()
        for exchange in exchanges(SHAPES[axis], spread, 2):
            # gloo's FSDP has every rank send its parts, where weights are not on several axes.
            gradients = exchange.kind == "reduce_scatter" and exchange.axis == "data" and axis != "expert"
            expected["all_to_all" if gradients else exchange.kind] += 2 * exchange.bytes * exchange.times
        # The norm behind the blocks is counted as theirs, and gathered once a micro-batch instead of twice.
        expected["all_gather"] -= 2 * 2 * 4 * SHAPES[axis].hidden_size * (expected["all_gather"] > 0)
        # Of both ranks together: more tokens may go to the experts of one than to the other's.
        assert every[0][number] + every[1][number] == expected, (axis, recompute)
