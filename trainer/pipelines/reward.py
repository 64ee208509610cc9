"""Reward modelling: a score of an answer, learnt from which of two answers was preferred."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from trainer.batch import Batch
from trainer.config import schema, setting
from trainer.data.corpus import Corpus
from trainer.data.pairs import AnswerBatch, PairBatch
from trainer.metrics import Metrics
from trainer.models.actor_critic import values_at
from trainer.parallel import distributed
from trainer.parallel.engine import Engine
from trainer.pipelines.base import Models, Pipeline


@schema("pipeline/reward")
@dataclass
class RewardModelling(Pipeline):
    """Bradley-Terry on the scores of last tokens (docs/algorithms.md#reward-model; Ouyang et al. 2022, arXiv:2203.02155)."""

    learning_rate: ClassVar[float] = 1e-5
    scores: ClassVar[bool] = True
    next_command: ClassVar[str] = "onecurve score {export} ANSWERS.jsonl"
    batch_type: ClassVar[type[Batch]] = PairBatch

    margin: bool = setting(True, "ask for the pair's own margin, where the data has one (arXiv:2307.09288)")
    centering: float = setting(0.0, "weight of (r_c + r_r)^2, which keeps scores near 0; 0.01 is usual", least=0)
    normalize: bool = setting(True, "store mean and deviation of the training set's scores with the model")

    @property
    def initial_loss(self) -> float:
        return math.log(2)

    def loss(self, models: Models, batch: PairBatch) -> tuple[Tensor, Metrics]:
        scores = read_scores(models.trained, batch)
        chosen, rejected = scores.view(-1, 2).unbind(1)
        wanted = batch.margins if self.margin else 0.0
        losses = -logsigmoid(chosen - rejected - wanted) + self.centering * (chosen + rejected).square()
        return (losses * batch.unit_mask).sum(), report(scores.detach(), batch)

    def finalize(self, models: Models, engine: Engine, corpus: Corpus) -> dict[str, Any]:
        """Mean and standard deviation of every training score; collective."""
        if not self.normalize:
            return {}
        data, metrics = distributed.world().data, Metrics()
        with engine.evaluating():
            for pairs in getattr(corpus.train, "parts", []):
                for numbers in pairs.forwards(data.rank, data.size):
                    batch = pairs.collate(numbers).to(engine.device)
                    values, real = read_scores(models.trained, batch), _of_answers(batch.unit_mask)
                    metrics.mean("mean", (values.double() * real).sum(), real.sum())
                    metrics.std("std", values, real)
        return {"reward": {name: float(value) for name, value in metrics.reduced(distributed.stack_over_data).items()}}


def read_scores(model: Any, batch: AnswerBatch) -> Tensor:
    """A float32 score of every answer ``(A,)``, off its last token."""
    scores: Tensor = model(batch.tokens, batch.documents, values_at(batch.final_index))
    return scores


def report(scores: Tensor, batch: PairBatch) -> Metrics:
    """How often the chosen answer scores higher (an equal score counts as wrong), by how much, and the scores' spread."""
    metrics, mask = Metrics(), batch.unit_mask
    chosen, rejected = scores.view(-1, 2).unbind(1)
    metrics.mean("accuracy", ((chosen > rejected).float() * mask).sum(), batch.weight)
    metrics.mean("margin", ((chosen - rejected) * mask).sum(), batch.weight)
    metrics.per_example("margin", chosen - rejected, batch.rows)
    # Multiplied and replaced rather than selected: how many there are is not known to the host.
    real, wide = _of_answers(mask), scores.double()
    metrics.mean("score/mean", (wide * real).sum(), real.sum())
    metrics.std("score/std", wide, real)
    metrics.minimum("score/min", torch.where(real > 0, wide, torch.inf).min())
    metrics.maximum("score/max", torch.where(real > 0, wide, -torch.inf).max())
    return metrics


def _of_answers(mask: Tensor) -> Tensor:
    """The mask of pairs ``(B,)`` for their answers ``(2 B,)``, float64."""
    return mask.double()[:, None].expand(-1, 2).reshape(-1)
