"""Direct preference optimisation and its family: a policy learns from pairs of completions, beside a reference."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from trainer.batch import Batch
from trainer.config import schema, setting
from trainer.data.pairs import PairBatch
from trainer.diagnostics.first_step import FirstStep
from trainer.metrics import Metrics
from trainer.pipelines.base import Models
from trainer.pipelines.preference_losses import LOSSES, PairLogps, PreferenceLoss
from trainer.pipelines.reference import OWN_REFERENCE, REFERENCE_REMEDY, ReferencePipeline, policy_logps


@schema("pipeline/dpo")
@dataclass
class DPO(ReferencePipeline):
    """A loss of log-probabilities of preferred and rejected completions (docs/algorithms.md#preferences)."""

    batch_type: ClassVar[type[Batch]] = PairBatch

    loss_type: str = setting("sigmoid", "the loss; sigmoid is DPO's own", choices=LOSSES)
    beta: float | None = setting(None, "how strongly to stay with the reference; null = the loss's usual", above=0)
    gamma: float | None = setting(
        None, "simpo: the margin; orpo: weight of the odds ratio; null = the loss's usual", least=0
    )
    label_smoothing: float | None = setting(
        None, "sigmoid, robust: probability that a label is wrong; null = 0", least=0, below=0.5
    )
    average: bool | None = setting(
        None, "ipo: mean log-probability of a token instead of the completion's sum; null = true"
    )
    loss_parameters: dict[str, float] = setting(dict, "further hyper-parameters of a loss of your own, by name")
    rpo_alpha: float = setting(0.0, "weight of an added loss of the chosen answer's tokens (arXiv:2404.19733)", least=0)

    def problems(self) -> Iterator[str]:
        if self.loss_type in LOSSES:
            defaults = LOSSES[self.loss_type].defaults
            for name in sorted(self._given.keys() - defaults.keys()):
                path = f"loss_parameters.{name}" if name in self.loss_parameters else name
                used = ", ".join(defaults)
                yield f"pipeline.{path} is not used by pipeline.loss_type={self.loss_type}, which has {used}; leave it out"

    @property
    def preference_loss(self) -> PreferenceLoss:
        """The entry of `loss_type`."""
        return LOSSES[self.loss_type]

    @property
    def hyper_parameters(self) -> dict[str, Any]:
        """Those of the loss, at their usual values where none are given."""
        return self.preference_loss.defaults | self._given

    @property
    def _given(self) -> dict[str, Any]:
        named = {name: getattr(self, name) for name in ("beta", "gamma", "label_smoothing", "average")}
        return {name: value for name, value in named.items() if value is not None} | self.loss_parameters

    @property
    def uses_reference(self) -> bool:
        return super().uses_reference and self.preference_loss.uses_reference

    @property
    def initial_loss(self) -> float | None:
        """That of pairs whose completions are as likely as under the reference."""
        if not self.uses_reference or self.rpo_alpha:
            return None
        pairs = PairLogps.interleaved(torch.zeros(2), torch.zeros(2), torch.ones(2))
        return float(self.preference_loss.function(pairs, **self.hyper_parameters))

    def loss(self, models: Models, batch: PairBatch) -> tuple[Tensor, Metrics]:
        policy, tokens, entropy = policy_logps(models.trained, batch)
        pairs = PairLogps.interleaved(policy, self.reference_logps(models, batch), tokens.clamp(min=1))
        losses = self.preference_loss.function(pairs, **self.hyper_parameters) - self.rpo_alpha * pairs.chosen.mean
        return (losses * batch.unit_mask).sum(), self.report(pairs, entropy, batch)

    def report(self, pairs: PairLogps, entropy: Tensor, batch: PairBatch) -> Metrics:
        """Implicit rewards, how often the chosen one's is larger (a tie counts as wrong), and the policy's entropy."""
        beta: float = self.hyper_parameters["beta"]
        chosen, rejected = (
            beta * (side.ratio if self.preference_loss.uses_reference else side.mean).detach()
            for side in (pairs.chosen, pairs.rejected)
        )
        metrics = Metrics()
        for name, values in {
            "rewards/chosen": chosen,
            "rewards/rejected": rejected,
            "rewards/margin": chosen - rejected,
            "rewards/accuracy": (chosen > rejected).float(),
            "logps/chosen": pairs.chosen.policy.detach(),
            "logps/rejected": pairs.rejected.policy.detach(),
            "logps/accuracy": (pairs.chosen.policy > pairs.rejected.policy).float(),
        }.items():
            metrics.mean(name, (values * batch.unit_mask).sum(), batch.weight)
        metrics.mean("entropy", entropy.detach().sum(), float(entropy.numel()))
        metrics.per_example("rewards/margin", chosen - rejected, batch.rows)
        return metrics

    def first_step_problems(self, first: FirstStep) -> list[str]:
        """Also, the loss is that of a policy which prefers nothing yet."""
        problems = super().first_step_problems(first)
        if self.initial_loss is None or getattr(first.load.adapter, "dropout", 0.0) > 0:
            return problems
        rule = f"{OWN_REFERENCE}, whose loss is {self.initial_loss:.6f}"
        return problems + first.near("loss", self.initial_loss, rule, REFERENCE_REMEDY)
