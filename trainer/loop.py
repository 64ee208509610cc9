"""The one loop. The caller's ``for`` body logs, evaluates and saves."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from trainer import stopping
from trainer.batch import Batch
from trainer.diagnostics.guard import Guard
from trainer.metrics import Metrics
from trainer.models.dropout import draw_for
from trainer.parallel import distributed
from trainer.parallel.engine import Engine
from trainer.pipelines.base import Models, Pipeline, Source
from trainer.tracking.throughput import Stopwatch


@dataclass(frozen=True)
class Step:
    """An optimizer step that was taken, or skipped.

    ``metrics``: global values by name, scalars on the device. ``micro_batches``: what this rank learnt from.
    """

    number: int
    metrics: dict[str, Tensor]
    micro_batches: Sequence[Batch]

    @property
    def texts(self) -> list[dict[str, Any]]:
        """Texts that came with what it learnt from, as rows of ``samples.jsonl``."""
        return [text for batch in self.micro_batches for text in batch.texts]


def train(
    pipeline: Pipeline,
    models: Models,
    engine: Engine,
    batches: Source,
    schedule: Callable[[int], float],
    guard: Guard,
    watch: Stopwatch,
    *,
    seed: int,
    first: int,
    last: int,
    accumulate: int,
) -> Iterator[Step]:
    """Take optimizer steps ``first`` .. ``last``, yielding after each."""
    for number in range(first, last + 1):
        engine.set_lr(schedule(number))
        if models.fake_quantizer is not None:
            models.fake_quantizer.begin(number)
        with watch.lap("data"):
            micro_batches = list(islice(batches, accumulate))
        metrics = train_step(pipeline, models, engine, guard, watch, micro_batches, (seed, number))
        batches.observe(metrics)
        yield Step(number, metrics, micro_batches)


def train_step(
    pipeline: Pipeline,
    models: Models,
    engine: Engine,
    guard: Guard,
    watch: Stopwatch,
    micro_batches: Sequence[Batch],
    key: tuple[int, ...] = (),
) -> dict[str, Tensor]:
    """Follow the gradient of sum(loss) / sum(weight) over all micro-batches of all ranks (docs/algorithms.md#weighting)."""
    with watch.lap("forward_backward"):
        prepared = list(pipeline.prepare_step(models, engine, micro_batches))
        weight = distributed.sum_over_data(torch.stack([batch.weight for batch in prepared]).sum())
        if models.balancer is not None:
            tokens = torch.stack([batch.seen for batch in prepared]).sum()
            models.balancer.begin(engine.factor(distributed.sum_over_data(tokens)))
        reports = engine.accumulate(partial(loss_of, pipeline, models, key), prepared, weight)
        metrics = Metrics.merged(reports)
    with watch.lap("optimizer"):
        outcome = engine.step(guard.limit)
        routed = {}
        if models.balancer is not None:
            routed = models.balancer.finish(outcome.applied)
    guard.observe(outcome.grad_norm, outcome.applied)
    metrics.maximum("stopping", torch.full_like(weight, stopping.stop_request()))
    reduced = metrics.reduced(distributed.stack, replica=distributed.world().replica)
    return {**reduced, "grad_norm": outcome.grad_norm, **routed, **guard.metrics()}


def loss_of(pipeline: Pipeline, models: Models, key: tuple[int, ...], batch: Any) -> tuple[Tensor, Metrics]:
    """The pipeline's loss of a micro-batch, and its metrics with those that every step has.

    ``key``: what is drawn in a forward (dropout) depends on it and on the row, so neither on the rank nor on resuming.
    """
    draw_for(key, batch.rows.tolist(), batch.tokens_by_row)
    if models.balancer is not None:
        models.balancer.open()
    loss, metrics = pipeline.loss(models, batch)
    metrics.mean("loss", loss, batch.weight)
    metrics.total("tokens", batch.seen)
    return loss, metrics
