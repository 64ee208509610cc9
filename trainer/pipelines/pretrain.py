"""Pretraining: predict the next token of packed documents."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from torch import Tensor

from trainer.batch import PackedRows
from trainer.config import schema, setting
from trainer.diagnostics.first_step import FirstStep
from trainer.functional import cross_entropy
from trainer.metrics import Metrics
from trainer.pipelines.base import Models, Pipeline

log = logging.getLogger(__name__)


@schema("pipeline/pretrain")
@dataclass
class Pretrain(Pipeline):
    """Next-token prediction (docs/algorithms.md#language-modelling)."""

    learning_rate: ClassVar[float] = 3e-4
    one_forward: ClassVar[bool] = True
    next_command: ClassVar[str] = "onecurve generate {export} --template raw --prompt 'Once upon a time'"

    z_loss: float = setting(0.0, "weight of the squared log-partition (PaLM, arXiv:2204.02311); 1e-4 is usual", least=0)
    label_smoothing: float = setting(0.0, "probability spread over the whole vocabulary", least=0, below=1)

    def loss(self, models: Models, batch: PackedRows) -> tuple[Tensor, Metrics]:
        read = partial(
            cross_entropy,
            targets=batch.targets,
            mask=batch.mask,
            places=batch.places,
            z_loss=self.z_loss,
            label_smoothing=self.label_smoothing,
        )
        loss, _, z = models.trained(batch.tokens, batch.documents, read)
        metrics = Metrics()
        if self.z_loss:
            metrics.mean("z_loss", self.z_loss * z, batch.weight)
        return loss, metrics

    def first_step_problems(self, first: FirstStep) -> list[str]:
        """Also, the loss of a new model is about ln(vocabulary), plus half the variance of its logits: else a warning."""
        chance, loss = math.log(first.load.architecture.vocab_size), first.values["loss"]
        if first.load.files is None and not 0.8 * chance <= loss <= 1.5 * chance + 1:
            log.warning(
                "the first step's loss is %.6g, and chance is ln(vocabulary) = %.2f: far below it, targets are visible to "
                "the model; far above it, model.initializer_range is too large", loss, chance,
            )  # fmt: skip
        return super().first_step_problems(first)

    def evaluate(self, models: Models, batch: PackedRows) -> Metrics:
        """``loss`` in nats per token without regularisers, and ``bits_per_byte``: nll / (ln 2 * bytes)."""
        read = partial(cross_entropy, targets=batch.targets, mask=batch.mask, places=batch.places)
        loss, _, _ = models.trained(batch.tokens, batch.documents, read)
        sizes = models.tokenizer.token_bytes().to(batch.targets.device)[batch.targets]
        metrics = Metrics()
        metrics.mean("loss", loss, batch.weight)
        metrics.mean("bits_per_byte", loss / math.log(2), (sizes * batch.mask).sum())
        return metrics
