"""From scored rollouts to the experience that is trained on, and the micro-batches that it is cut into."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from trainer.batch import Branches, Documents, TokenBatch
from trainer.data.pairs import collate_shared_prefix
from trainer.data.rows import Encoded
from trainer.rl.advantages import AGGREGATES, AdvantageInputs, Compute
from trainer.rl.losses import KL_ESTIMATORS
from trainer.rl.scoring import ScoredRollouts, as_tensor
from trainer.rl.settings import PolicyGradientSettings, Unfinished


@dataclass
class RolloutBatch(TokenBatch):
    """Completions with their prompts, in one ragged row ``(1, T)``; completions of one prompt share it.

    logit_index: from which token of the row each sampled id is predicted (N,)
    targets: the sampled ids (N,)
    logprobs, reference, sampled, values, advantages, returns: as in `Experience` (N,)
    weights: what a token counts in the loss (N,)
    units: what all completions together count, a float64 scalar
    rollout_metrics: of the iteration, with its first micro-batch
    samples: some of its completions, likewise
    """

    logit_index: Tensor
    targets: Tensor
    logprobs: Tensor
    reference: Tensor
    sampled: Tensor
    values: Tensor
    advantages: Tensor
    returns: Tensor
    weights: Tensor
    units: Tensor
    rollout_metrics: dict[str, float] = field(default_factory=dict)
    samples: list[dict[str, Any]] = field(default_factory=list)

    @property
    def weight(self) -> Tensor:
        return self.units

    @property
    def texts(self) -> list[dict[str, Any]]:
        return self.samples


@dataclass(frozen=True)
class Experience:
    """C completions of G prompts, ``C / G`` in a row of each; N tokens of completions lie end to end.

    rows: the prompts' row numbers in the data (G,)
    prompt_lengths: their tokens (G,)
    prompts: their ids, end to end
    lengths: tokens of each completion (C,)
    ids: the sampled tokens (N,)
    sampled: the sampler's log-probabilities, nats (N,)
    logprobs: the policy's before the first update (N,)
    reference: the reference policy's (N,)
    values, advantages, returns: at each token (N,)
    weights: what a token counts in the loss (N,)
    units: what a completion counts in the loss (C,)
    """

    rows: Tensor
    prompt_lengths: Tensor
    prompts: Tensor
    lengths: Tensor
    ids: Tensor
    sampled: Tensor
    logprobs: Tensor
    reference: Tensor
    values: Tensor
    advantages: Tensor
    returns: Tensor
    weights: Tensor
    units: Tensor

    def tensors(self) -> dict[str, Tensor]:
        """All of it by name, for a checkpoint."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> Experience:
        """From what `tensors` gave."""
        return cls(**{f.name: tensors[f.name] for f in fields(cls)})

    @property
    def group_size(self) -> int:
        """Completions of a prompt."""
        return len(self.lengths) // len(self.rows)

    def batch(self, numbers: Sequence[int]) -> RolloutBatch:
        """A micro-batch of these completions; neighbours of one prompt pass it through the model once."""
        prompts = torch.split(self.prompts, self.prompt_lengths.tolist())
        sizes = self.lengths.tolist()
        starts = (self.lengths.cumsum(0) - self.lengths).tolist()
        units: list[tuple[int, list[Encoded]]] = []
        spans: list[Tensor] = []
        previous = -1
        for number in numbers:
            group, span = number // self.group_size, torch.arange(starts[number], starts[number] + sizes[number])
            prompt = prompts[group].tolist()
            if group != previous:
                units.append((len(prompt), []))
                previous = group
            trained = [False] * len(prompt) + [True] * len(span)
            units[-1][1].append(Encoded(prompt + self.ids[span].tolist(), trained))
            spans.append(span)
        collated = collate_shared_prefix(units, [int(self.rows[n // self.group_size]) for n in numbers])
        tokens = torch.cat(spans)
        return RolloutBatch(
            rows=collated["rows"],
            tokens=collated["tokens"],
            documents=unshared(collated["documents"]),
            logit_index=collated["logit_index"],
            targets=collated["targets"],
            logprobs=self.logprobs[tokens],
            reference=self.reference[tokens],
            sampled=self.sampled[tokens],
            values=self.values[tokens],
            advantages=self.advantages[tokens],
            returns=self.returns[tokens],
            weights=self.weights[tokens],
            units=self.units[list(numbers)].sum(dtype=torch.float64),
            real=collated["real"],
        )


def unshared(documents: Branches) -> Branches | Documents:
    """The same sequences as plain documents where no token belongs to two: then attention has nothing to gather."""
    return documents.sequences if len(documents.index) == documents.positions.numel() else documents


class AdvantageComputer:
    """From scored rollouts to experience: rewards of tokens, advantages and returns, weights in the loss.

    estimator: the function (or instance with a state) that ``pipeline.advantage`` names
    """

    def __init__(self, settings: PolicyGradientSettings) -> None:
        self.settings = settings
        self.estimator: Compute = settings.estimator.build()

    def state_dict(self) -> dict[str, Any]:
        """What the estimator remembers from iteration to iteration; empty for a function."""
        return self.estimator.state_dict() if hasattr(self.estimator, "state_dict") else {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if hasattr(self.estimator, "load_state_dict"):
            self.estimator.load_state_dict(state)

    def inputs(self, rollouts: ScoredRollouts, kl_coef: float) -> AdvantageInputs:
        """What the estimator sees; completions without a score, or masked ones, have weight 0 in the loss."""
        s, completions = self.settings, rollouts.completions
        lengths = torch.tensor([len(c.ids) for c in completions])
        ended = torch.tensor([c.ended for c in completions])
        scores = as_tensor(rollouts.clipped(s.clip_at))
        bootstraps = s.unfinished is Unfinished.bootstrap
        # nan stays nan: a missing score is never taken for 0.
        scores = torch.where(ended, scores, scores * 0 if bootstraps else scores - s.missing_eos_penalty)
        trained = ~torch.isnan(scores) & (ended | (s.unfinished is not Unfinished.mask))
        weights, units = AGGREGATES[s.aggregate or s.estimator.aggregate](lengths, s.rollout.tokens)
        return AdvantageInputs(
            scores=scores,
            penalties=-kl_coef
            * KL_ESTIMATORS[s.kl_estimator](rollouts.column("logprobs") - rollouts.column("reference")),
            values=rollouts.column("values"),
            bootstrap_values=rollouts.column("bootstrap_values") * (~ended & bootstraps),
            weights=weights * trained.repeat_interleave(lengths),
            units=units * trained,
            lengths=lengths,
            group_size=len(rollouts.groups[0].completions),
            rows=torch.tensor([group.row for group in rollouts.groups]),
            gamma=s.gamma,
            lam=s.lam,
        )

    def experience(self, rollouts: ScoredRollouts, inputs: AdvantageInputs) -> Experience:
        """Advantages and returns, with everything else that is trained on in this iteration."""
        advantages, returns = self.estimator(inputs)
        completions, prompts = rollouts.completions, [group.prompt.ids for group in rollouts.groups]
        return Experience(
            rows=inputs.rows,
            prompt_lengths=torch.tensor([len(ids) for ids in prompts]),
            prompts=torch.tensor([token for ids in prompts for token in ids]),
            lengths=inputs.lengths,
            ids=torch.tensor([token for c in completions for token in c.ids]),
            sampled=torch.tensor([value for c in completions for value in c.logprobs]),
            logprobs=rollouts.column("logprobs"),
            reference=rollouts.column("reference"),
            values=inputs.values,
            advantages=advantages,
            returns=returns,
            weights=inputs.weights,
            units=inputs.units,
        )
