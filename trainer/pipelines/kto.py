"""Kahneman-Tversky optimisation: a policy learns from single completions, each labelled desirable or not."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from trainer.batch import Batch
from trainer.config import schema, setting
from trainer.data.labelled import LabelledBatch
from trainer.metrics import Metrics
from trainer.parallel import distributed
from trainer.parallel.engine import Engine
from trainer.pipelines.base import Models
from trainer.pipelines.reference import CompletionLogps, ReferencePipeline, policy_logps


@dataclass
class KTOBatch(LabelledBatch):
    """Labelled completions with ``kl_estimate``, the loss's z0: a scalar >= 0 that is one for all batches of a step."""

    kl_estimate: Tensor


@schema("pipeline/kto")
@dataclass
class KTO(ReferencePipeline):
    """Single completions against how far the policy has moved elsewhere (docs/algorithms.md#kto).

    Ethayarajh et al. 2024, arXiv:2402.01306, eq. 8.
    """

    batch_type: ClassVar[type[Batch]] = LabelledBatch

    beta: float = setting(0.1, "how strongly to stay with the reference", above=0)
    desirable_weight: float = setting(1.0, "weight of desirable completions", least=0)
    undesirable_weight: float = setting(1.0, "weight of undesirable completions", least=0)
    rpo_alpha: float = setting(0.0, "weight of an added loss of the desirable completions' tokens", least=0)

    def prepare_step(self, models: Models, engine: Engine, micro_batches: Iterable[Any]) -> list[KTOBatch]:
        """Estimate the KL divergence from the reference by mismatched completions, over all batches of all ranks."""
        batches = [batch.to(engine.device) for batch in micro_batches]
        total = torch.zeros(2, dtype=torch.float64, device=engine.device)
        with engine.evaluating():
            for batch in batches:
                mismatched = batch.mismatched
                sums, _, _ = policy_logps(models.trained, mismatched)
                ratio = (sums - self.reference_logps(models, mismatched)).double() * mismatched.unit_mask
                total = total + torch.stack([ratio.sum(), mismatched.weight])
        ratio, weight = distributed.sum_over_data(total).unbind()
        estimate = (ratio / weight.clamp(min=1)).clamp(min=0).float()
        return [KTOBatch(**vars(batch), kl_estimate=estimate) for batch in batches]

    def loss(self, models: Models, batch: KTOBatch) -> tuple[Tensor, Metrics]:
        policy, tokens, entropy = policy_logps(models.trained, batch)
        completions = CompletionLogps(policy, self.reference_logps(models, batch), tokens.clamp(min=1))
        losses = kto_loss(
            completions.ratio,
            batch.labels,
            batch.kl_estimate,
            self.beta,
            self.desirable_weight,
            self.undesirable_weight,
        )
        losses = losses - self.rpo_alpha * completions.mean * (batch.labels > 0)
        return (losses * batch.unit_mask).sum(), self.report(completions, entropy, batch)

    def report(self, completions: CompletionLogps, entropy: Tensor, batch: KTOBatch) -> Metrics:
        """Implicit rewards of both kinds, how often one lies on its own side of z0, and the policy's entropy."""
        margins = self.beta * (batch.labels * (completions.ratio - batch.kl_estimate)).detach()
        rewards, logps = self.beta * completions.ratio.detach(), completions.policy.detach()
        everything = torch.ones_like(rewards)
        desirable = (batch.labels > 0).float()
        metrics = Metrics()
        for name, values, weights in (
            ("rewards/chosen", rewards, desirable),
            ("rewards/rejected", rewards, 1 - desirable),
            ("rewards/margin", margins, everything),
            ("rewards/accuracy", (margins > 0).float(), everything),
            ("logps/chosen", logps, desirable),
            ("logps/rejected", logps, 1 - desirable),
            ("kl", batch.kl_estimate * everything, everything),
        ):
            weights = weights * batch.unit_mask
            metrics.mean(name, (values * weights).sum(), weights.sum())
        metrics.mean("entropy", entropy.detach().sum(), float(entropy.numel()))
        metrics.per_example("rewards/margin", margins, batch.rows)
        return metrics


def kto_loss(
    ratio: Tensor,
    labels: Tensor,
    kl_estimate: Tensor,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """``w (1 - sigmoid(beta label (ratio - z0)))`` of every completion, ``(B,)``.

    ``ratio`` ``(B,)``: log-ratio of policy and reference, nats.
    ``labels`` ``(B,)``: 1 where the completion is desirable, -1 where it is not.
    ``kl_estimate``: z0, a scalar in nats.
    """
    gain = beta * labels * (ratio - kl_estimate)
    weight = torch.where(labels > 0, desirable_weight, undesirable_weight)
    return weight * (1 - torch.sigmoid(gain))
