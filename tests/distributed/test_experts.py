"""Mixtures of experts on ranks: curve and loads depend on neither their number, nor micro-batches, nor sharding."""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from tests.layouts import LAYOUTS
from tests.mixtures import small
from tests.ranks import on_ranks
from tests.uneven_rows import uneven_rows
from trainer.diagnostics.guard import Guard, GuardSettings
from trainer.loop import train_step
from trainer.models.balance import Balancer, BalanceRates
from trainer.models.initial import initial
from trainer.models.recompute import Recompute
from trainer.models.stage import keep_stage
from trainer.models.transformer import Transformer
from trainer.optim import AdamW, Optimizer
from trainer.parallel import distributed
from trainer.parallel.ddp import DDP
from trainer.parallel.engine import Engine
from trainer.parallel.fsdp import FSDP
from trainer.parallel.precision import Precision
from trainer.parallel.zero import Zero1, Zero2, Zero3
from trainer.pipelines.base import Models
from trainer.pipelines.pretrain import Pretrain
from trainer.tracking.throughput import Stopwatch

STRATEGIES = {
    "ddp": DDP, "fsdp": FSDP, "zero1": Zero1, "zero2": Zero2, "zero3": Zero3, "expert 2": partial(FSDP, expert=2),
    "expert 2 kept": partial(FSDP, expert=2, reshard=False), "expert 4": partial(FSDP, expert=4),
    "pipeline 2": partial(FSDP, pipeline=2), "pipeline 2 x expert 2": partial(FSDP, pipeline=2, expert=2),
    "expert 2 x sequence 2": partial(FSDP, expert=2, sequence=2), "expert 2 x tensor 2": partial(FSDP, expert=2, tensor=2),
}  # fmt: skip
KINDS = {
    "softmax": ({}, BalanceRates(balance_loss=0.1, z_loss=0.01)),
    "sigmoid": ({"router_sigmoid": True, "shared_size": 16}, BalanceRates(bias_rate=0.02)),
    "few": (
        {"router_sigmoid": True, "router_normalised": False, "experts": 2, "experts_per_token": 1, "expert_bias": True},
        BalanceRates(bias_rate=0.02),
    ),
}
ROWS, LENGTH, STEPS = 8, 16, 6
ADAMW = AdamW(lr=3e-3)


batch_of = partial(uneven_rows, length=LENGTH, less=2, first=[9, 8])


def nothing(step: int, engine: Engine) -> None:
    """What is done after a step beside it."""


def begun(kind: str, strategy_name: str, recompute: str, optimizer: Optimizer, seed: int = 0) -> tuple[Engine, Models]:
    """A model of `KINDS` that has learnt nothing yet."""
    features, rates = KINDS[kind]
    # Sixteen experts for the few tokens of a micro-batch: most of them get none there.
    shape = small(**{"experts": 16, "expert_size": 8, **features})
    strategy = STRATEGIES[strategy_name]()
    if isinstance(strategy, Zero3):
        strategy.deepspeed = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
    with strategy.construction():
        model = Transformer(shape, Recompute(recompute))
    keep_stage(model, strategy.stages)
    strategy.place(model, model.model.layers, Precision())
    for name, parameter in model.named_parameters():
        strategy.fill(parameter, initial(name, strategy.shape_of(parameter), seed, 0.1, 2))
    engine = strategy.wrap(model, optimizer, Precision())
    return engine, Models(engine.model, None, balancer=Balancer(engine.module, rates))  # type: ignore[arg-type]


def steps(
    engine: Engine, models: Models, micro: int, first: int, last: int, after: Callable[[int, Engine], Any] = nothing
) -> np.ndarray:
    """Loss, gradient norm and what routers say of every step."""
    device, data = engine.device, distributed.world().data
    guard, watch = Guard(GuardSettings(), device), Stopwatch(device)
    rows = []
    for step in range(first, last):
        mine = data.share(list(range(ROWS)))
        parts = [batch_of(step, mine[n : n + micro]) for n in range(0, len(mine), micro)]
        metrics = train_step(Pretrain(), models, engine, guard, watch, parts)
        names = ("loss", "grad_norm", "router/load_max", "router/entropy", "router/balance_loss", "router/z_loss")
        rows.append([float(metrics[name]) for name in names])
        after(step, engine)
    return np.array(rows)


def curve(
    kind: str,
    strategy_name: str,
    micro: int,
    recompute: str,
    last: int = STEPS,
    optimizer: Optimizer = ADAMW,
    after: Callable[[int, Engine], Any] = nothing,
) -> tuple[np.ndarray, np.ndarray]:
    """`steps` up to the ``last``, and the routers' state after it."""
    engine, models = begun(kind, strategy_name, recompute, optimizer)
    rows = steps(engine, models, micro, 0, last, after)
    loads = [router.load for router in models.balancer.routers]  # type: ignore[union-attr]
    balances = [weight for name, weight in engine.weights() if name.endswith("router.balance")]
    return rows, torch.stack(balances or loads).numpy()


def curves(
    strategy_name: str, cases: list[tuple[str, int, str]], last: int = STEPS
) -> list[tuple[np.ndarray, np.ndarray]]:
    return [curve(kind, strategy_name, micro, recompute, last) for kind, micro, recompute in cases]


@pytest.fixture(scope="module")
def alone():
    """On one rank, all rows of a step in one micro-batch."""
    return {kind: curve(kind, "ddp", ROWS, "none") for kind in ("softmax", "sigmoid")}


def compare(found, expected):
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found[1], expected[1], atol=1e-7)


@pytest.mark.parametrize(("kind", "micro", "recompute"), [("softmax", 1, "selective"), ("sigmoid", 2, "full")])
def test_micro_batches_and_recomputation_do_not_change_a_run(kind, micro, recompute, alone):
    compare(curve(kind, "ddp", micro, recompute), alone[kind])
    assert abs(alone["softmax"][1] - 1 / 16).max() > 0.02  # not even, so it was something to agree on


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: f"{layout[0]}-{layout[1]}")
def test_every_layout_gives_the_same_curve_and_loads(layout, alone):
    ranks, strategy = layout
    cases = [("softmax", 1, "none"), ("softmax", 4, "full"), ("sigmoid", 1, "selective")]
    for of_rank in on_ranks(ranks, curves, strategy, cases):
        for (kind, _, _), found in zip(cases, of_rank, strict=True):
            compare(found, alone[kind])
