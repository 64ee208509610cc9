"""Pretraining: predict the next token of packed documents."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from torch import Tensor

from trainer.batch import PackedRows
from trainer.config import schema, setting
from trainer.diagnostics.first_step import Expectation, plausible
from trainer.functional import cross_entropy
from trainer.metrics import Metrics
from trainer.models.load import ModelLoader
from trainer.parallel.engine import Engine
from trainer.pipelines.base import Models, Pipeline


@schema("pipeline/pretrain")
@dataclass
class Pretrain(Pipeline):
    """Next-token prediction (docs/algorithms.md#language-modelling)."""

    learning_rate: ClassVar[float] = 3e-4

    z_loss: float = setting(0.0, "weight of the squared log-partition (PaLM, arXiv:2204.02311); 1e-4 is usual", least=0)
    label_smoothing: float = setting(0.0, "probability spread over the whole vocabulary", least=0, below=1)

    def loss(self, models: Models, batch: PackedRows) -> tuple[Tensor, Metrics]:
        read = partial(
            cross_entropy,
            targets=batch.targets,
            mask=batch.mask,
            z_loss=self.z_loss,
            label_smoothing=self.label_smoothing,
        )
        loss, _, z = models.trained(batch.tokens, batch.documents, read)
        metrics = Metrics()
        if self.z_loss:
            metrics.mean("z_loss", self.z_loss * z, batch.weight)
        return loss, metrics

    def expected(
        self, load: ModelLoader, models: Models, engine: Engine, micro_batches: Sequence[Any]
    ) -> Iterator[Expectation]:
        """A new model knows nothing yet: its loss is about ln(vocabulary)."""
        yield from super().expected(load, models, engine, micro_batches)
        if load.files is None:
            yield plausible(load.architecture.vocab_size)

    def evaluate(self, models: Models, batch: PackedRows) -> Metrics:
        """``loss`` in nats per token without regularisers, and ``bits_per_byte``: nll / (ln 2 * bytes)."""
        read = partial(cross_entropy, targets=batch.targets, mask=batch.mask)
        loss, _, _ = models.trained(batch.tokens, batch.documents, read)
        sizes = models.tokenizer.token_bytes().to(batch.targets.device)[batch.targets]
        metrics = Metrics()
        metrics.mean("loss", loss, batch.weight)
        metrics.mean("bits_per_byte", loss / math.log(2), (sizes * batch.mask).sum())
        return metrics
