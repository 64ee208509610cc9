"""Supervised fine-tuning: predict what the assistant wrote, given what came before."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from trainer.batch import PackedRows
from trainer.config import schema
from trainer.diagnostics.first_step import Expectation, ends_learnt
from trainer.functional import correct, cross_entropy
from trainer.metrics import Metrics
from trainer.models.load import ModelLoader
from trainer.parallel.engine import Engine
from trainer.pipelines.base import Models
from trainer.pipelines.pretrain import Pretrain


@schema("pipeline/sft")
@dataclass
class SFT(Pretrain):
    """Next-token prediction on the tokens that the data's mask names (docs/algorithms.md#language-modelling)."""

    learning_rate: ClassVar[float] = 2e-5

    def expected(
        self, load: ModelLoader, models: Models, engine: Engine, micro_batches: Sequence[Any]
    ) -> Iterator[Expectation]:
        """Also that the end of an answer is learnt."""
        yield from super().expected(load, models, engine, micro_batches)
        yield ends_learnt(micro_batches, models.tokenizer.stops)

    def evaluate(self, models: Models, batch: PackedRows) -> Metrics:
        """``loss`` in nats per learnt token, and ``token_accuracy``: the part of them that is the likeliest one."""

        def read(hidden: Tensor, weight: Tensor) -> Any:
            loss, _, _ = cross_entropy(hidden, weight, targets=batch.targets, mask=batch.mask)
            return loss, correct(hidden, weight, targets=batch.targets, mask=batch.mask)

        loss, hits = models.trained(batch.tokens, batch.documents, read)
        metrics = Metrics()
        metrics.mean("loss", loss, batch.weight)
        metrics.mean("token_accuracy", hits, batch.weight)
        return metrics
