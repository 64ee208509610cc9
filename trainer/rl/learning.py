"""From what an iteration was worth to what is learnt from it: one experience, its metrics, and texts to be seen."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trainer.rl.advantages import Discount, Estimator, Rewards, owners
from trainer.rl.experience import Experience
from trainer.rl.rollouts import Judged, Learnable


@dataclass(frozen=True)
class Learning:
    """The settings of `PPO` that decide it. ``kl``: the price of a nat; ``longest``: tokens of the longest completion."""

    estimator: Estimator
    discount: Discount
    kl: float
    kl_of: Callable[[Tensor], Tensor]
    aggregate: Callable[[Tensor, int], tuple[Tensor, Tensor]]
    score_clip: float
    penalty: float
    masks: bool
    bootstraps: bool
    longest: int
    shown: int
    decode: Callable[[Sequence[int]], str]

    def of(self, judged: Judged) -> Learnable:
        """Advantages and returns of every token; completions without a score are left out of the loss."""
        completions = [c for group in judged.groups for c in group.completions]
        lengths = torch.tensor([len(c.ids) for c in completions])
        logprobs, entropy, reference, values, beyond = (
            torch.cat([getattr(reading, name) for reading in judged.readings])
            for name in ("logprobs", "entropy", "reference", "values", "beyond")
        )
        ended = torch.tensor([c.ended for c in completions])
        raw = torch.tensor([math.nan if s is None else s for s in judged.scores["score"]], dtype=torch.float32)
        scores = raw.clamp(-self.score_clip, self.score_clip) if self.score_clip else raw
        # nan stays nan: a missing score is never taken for 0.
        scores = torch.where(ended, scores, scores * 0 if self.bootstraps else scores - self.penalty)
        counted = ~torch.isnan(scores) & (ended | (not self.masks))
        weights, units = self.aggregate(lengths, self.longest)
        whose = owners(lengths)
        weights, units = weights * counted[whose], units * counted
        rewards = Rewards(
            scores, -self.kl * self.kl_of(logprobs - reference), values, beyond * (~ended & self.bootstraps), weights,
            lengths, len(judged.groups[0].completions),
        )  # fmt: skip
        advantages, returns = self.estimator.of(rewards, self.discount)
        prompts = [group.prompt.ids for group in judged.groups]
        experience = Experience(
            rows=torch.tensor([group.row for group in judged.groups]),
            prompt_lengths=torch.tensor([len(ids) for ids in prompts]),
            prompts=torch.tensor([token for ids in prompts for token in ids]),
            lengths=lengths, ids=torch.tensor([token for c in completions for token in c.ids]),
            sampled=torch.tensor([value for c in completions for value in c.logprobs]),
            logprobs=logprobs, reference=reference, values=values, advantages=advantages, returns=returns,
            weights=weights, units=units,
        )  # fmt: skip
        away = torch.zeros(len(lengths)).index_add(0, whose, logprobs - reference)
        worth = torch.zeros(len(lengths)).index_add(0, whose, rewards.tokens)
        made = {
            "objective/score": _mean(raw), "objective/reward": _mean(worth[~torch.isnan(raw)]),
            "objective/kl": float(away.mean()), "objective/entropy": float(entropy.mean()),
            "objective/kl_price": self.kl, "objective/missing": float(torch.isnan(raw).float().mean()),
            "completion/length_mean": float(lengths.float().mean()), "completion/length_max": float(lengths.max()),
            "completion/eos_fraction": float(ended.float().mean()),
            **{f"objective/{name}": _mean(_tensor(found)) for name, found in judged.scores.items() if name != "score"},
        }  # fmt: skip
        spread = raw[~torch.isnan(raw)]
        made["objective/score_std"] = float(spread.std(correction=0)) if len(spread) else 0.0
        if self.estimator.critic:
            made["value/explained_variance"] = explained_variance(values, returns, weights)
        return Learnable(experience, made, self._samples(judged, away, advantages, lengths))

    def _samples(self, judged: Judged, away: Tensor, advantages: Tensor, lengths: Tensor) -> list[dict[str, Any]]:
        means = torch.zeros(len(lengths)).index_add(0, owners(lengths), advantages) / lengths
        rows = []
        flat = [(group, c) for group in judged.groups for c in group.completions]
        for n, (group, completion) in enumerate(flat[: self.shown]):
            scores = {name: found[n] for name, found in judged.scores.items()}
            rows.append(
                {
                    "prompt": group.prompt.text, "completion": self.decode(completion.ids), "ended": completion.ended,
                    **scores, "kl": float(away[n]), "advantage": float(means[n]),
                }
            )  # fmt: skip
        return rows


def explained_variance(values: Tensor, returns: Tensor, weights: Tensor) -> float:
    """How much of the returns' variance the values know: 1 = all, 0 = as good as their mean."""
    kept = weights > 0
    if int(kept.sum()) < 2:
        return 0.0
    variance = float(returns[kept].var(correction=0))
    return 1 - float((returns[kept] - values[kept]).var(correction=0)) / variance if variance else 0.0


def _mean(values: Tensor) -> float:
    kept = values[~torch.isnan(values)]
    return float(kept.mean()) if len(kept) else 0.0


def _tensor(values: Sequence[float | None]) -> Tensor:
    return torch.tensor([math.nan if v is None else v for v in values])
