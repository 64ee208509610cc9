"""What an iteration reports: its metrics, and some of its completions as text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from trainer.rl.advantages import AdvantageInputs, completion_sums
from trainer.rl.experience import Experience
from trainer.rl.scoring import ScoredRollouts, as_tensor


def rollout_metrics(
    rollouts: ScoredRollouts, inputs: AdvantageInputs, e: Experience, clip: float = 0.0
) -> dict[str, float]:
    """Scores as they were given, rewards with the KL penalty, and what the completions are like.

    ``clip``: the size that scores were cut to. A mean of nothing is left out: without scores there is no score.
    """
    scores, lengths = as_tensor(rollouts.scores["score"]), e.lengths
    missing = torch.isnan(scores)
    present = scores[~missing]
    means = {f"objective/{name}": as_tensor(v) for name, v in rollouts.scores.items()}
    means["objective/reward"] = inputs.completion_rewards()[~missing]
    if clip:
        means["objective/clipped"] = (present.abs() > clip).float()
    if len(present):
        means["objective/score_std"] = present.std(correction=0)[None]
    return {
        **{name: mean for name, values in means.items() if (mean := _mean(values)) is not None},
        "objective/kl": float(completion_kl(e).mean()),
        "objective/entropy": float(rollouts.column("entropy").mean()),
        "objective/missing": float(missing.float().mean()),
        "completion/length_mean": float(lengths.float().mean()),
        "completion/length_max": float(lengths.max()),
        "completion/eos_fraction": float(torch.tensor([c.ended for c in rollouts.completions]).float().mean()),
    }


def rollout_samples(
    rollouts: ScoredRollouts, e: Experience, decode: Callable[[Sequence[int]], str], count: int
) -> list[dict[str, Any]]:
    """The first ``count`` completions as text, with scores, KL divergence in nats and mean advantage."""
    kl, advantages = completion_kl(e), completion_sums(e.advantages, e.lengths) / e.lengths
    flat = ((group, completion) for group in rollouts.groups for completion in group.completions)
    return [
        {
            "prompt": group.prompt.text,
            "completion": decode(completion.ids),
            "ended": completion.ended,
            **{name: values[n] for name, values in rollouts.scores.items()},
            "kl": float(kl[n]),
            "advantage": float(advantages[n]),
        }
        for n, (group, completion) in enumerate(islice(flat, count))
    ]


def completion_kl(e: Experience) -> Tensor:
    """Each completion's log-probability ratio to the reference, nats ``(C,)``: KL divergence in expectation."""
    return completion_sums(e.logprobs - e.reference, e.lengths)


def explained_variance(values: Tensor, returns: Tensor, weights: Tensor) -> float:
    """How much of the returns' variance the values predict: 1 = all, 0 = as good as their mean."""
    trained = weights > 0
    if int(trained.sum()) < 2:
        return 0.0
    variance = float(returns[trained].var(correction=0))
    return 1 - float((returns[trained] - values[trained]).var(correction=0)) / variance if variance else 0.0


def _mean(values: Tensor) -> float | None:
    present = values[~torch.isnan(values)]
    return float(present.mean()) if len(present) else None
