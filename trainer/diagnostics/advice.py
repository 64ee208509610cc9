"""What to change of a run that does not fit."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from trainer.diagnostics.layout import Layout
from trainer.diagnostics.memory import memory
from trainer.models.architecture import Architecture
from trainer.models.recompute import Recompute


def advice(a: Architecture, layout: Layout, limit: float, sharded: Sequence[Layout] = ()) -> str:
    """The nearest configuration that fits ``limit`` bytes a rank: fewer rows a forward, recomputation, then more sharding.

    Args:
        a: the model's shape.
        layout: as it is configured.
        limit: bytes of a device.
        sharded: the same run under strategies that shard more, the least first: each holds weights in a way of its own.
    """
    if memory(a, layout).total <= limit:
        return "it fits"
    for recompute in (layout.recompute, Recompute.selective, Recompute.full):
        micro = layout.micro
        while micro >= 1:
            fitting = dataclasses.replace(layout, micro=micro, recompute=recompute)
            if memory(a, fitting).total <= limit:
                return _say(fitting)
            micro //= 2
    smallest = [dataclasses.replace(more, micro=1, recompute=Recompute.full) for more in sharded]
    most = max([layout, *smallest], key=lambda candidate: candidate.stage)
    more_ranks = [dataclasses.replace(most, ranks=2**n, micro=1, recompute=Recompute.full) for n in range(1, 17)]
    candidates = [s for s in smallest if layout.ranks > 1] + [
        m for m in more_ranks if m.stage and m.ranks > layout.ranks
    ]
    for fitting in candidates:
        if memory(a, fitting).total <= limit:
            return _say(fitting)
    return "no number of ranks fits it; use a device with more memory, or strategy=zero3 strategy.offload=parameters"


def _say(layout: Layout) -> str:
    strategy = "ddp" if layout.stage == 0 else "fsdp" if layout.float_rows else f"zero{layout.stage}"
    return (
        f"use strategy={strategy} batch.micro={layout.micro} model.activation_checkpointing={layout.recompute.value} "
        f"on {layout.ranks} rank{'s' if layout.ranks > 1 else ''}"
    )
