"""Supervised fine-tuning: predict what the assistant wrote, given what came before."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from trainer.batch import PackedRows
from trainer.config import schema
from trainer.diagnostics.first_step import FirstStep
from trainer.functional import Head, correct, cross_entropy
from trainer.metrics import Metrics
from trainer.parallel import distributed
from trainer.pipelines.base import Models, Pipeline
from trainer.pipelines.pretrain import Pretrain

log = logging.getLogger(__name__)


@schema("pipeline/sft")
@dataclass
class SFT(Pretrain):
    """Next-token prediction on the tokens that the data's mask names (docs/algorithms.md#language-modelling)."""

    learning_rate: ClassVar[float] = 2e-5
    next_command: ClassVar[str] = Pipeline.next_command

    def first_step_problems(self, first: FirstStep) -> list[str]:
        """Also, an answer's end is among what is learnt: else a warning."""
        ends = torch.tensor(list(first.tokenizer.stops))
        learnt = torch.stack([(torch.isin(b.targets, ends) & (b.mask > 0)).sum() for b in first.batches]).sum()
        if not distributed.sum_over_data(learnt):
            log.warning(
                "the first step learns no end-of-turn token, so the model does not learn to stop: raise batch.length if "
                "every answer was cut, and see with onecurve preview whether the template ends an answer with an end token"
            )
        return super().first_step_problems(first)

    def evaluate(self, models: Models, batch: PackedRows) -> Metrics:
        """``loss`` in nats per learnt token, and ``token_accuracy``: the part of them that is the likeliest one."""

        def read(hidden: Tensor, head: Head) -> Any:
            loss, _, _ = cross_entropy(hidden, head, targets=batch.targets, mask=batch.mask, places=batch.places)
            return loss, correct(hidden, head, targets=batch.targets, mask=batch.mask)

        loss, hits = models.trained(batch.tokens, batch.documents, read)
        metrics = Metrics()
        metrics.mean("loss", loss, batch.weight)
        metrics.mean("token_accuracy", hits, batch.weight)
        return metrics
