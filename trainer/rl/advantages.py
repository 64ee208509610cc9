"""How much better each token was than expected: pure functions of rewards and values (docs/algorithms.md#advantages).

Completions are ragged: tensors over all tokens ``(N,)`` lie end to end, ``lengths`` ``(C,)`` says how many are whose. With
groups, ``samples`` completions in a row answer the same prompt.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rewards:
    """What a rollout was worth.

    ``scores`` ``(C,)``: of whole completions, nan where there is none. ``penalties`` ``(N,)``: rewards of single tokens (the
    price of leaving the reference). ``values`` ``(N,)``: expected returns where each token is predicted. ``beyond`` ``(C,)``:
    the value behind a completion that was cut off, else 0. ``weights`` ``(N,)``: 0 for tokens that are not learnt from.
    ``lengths`` ``(C,)`` int64, ``samples``: completions of a prompt.
    """

    scores: Tensor
    penalties: Tensor
    values: Tensor
    beyond: Tensor
    weights: Tensor
    lengths: Tensor
    samples: int

    @property
    def tokens(self) -> Tensor:
        """The rewards of tokens ``(N,)``: penalties, and on a completion's last token its score too."""
        whole = self.penalties.clone()
        last = self.lengths.cumsum(0) - 1
        whole[last] += torch.nan_to_num(self.scores)
        return whole


@dataclass(frozen=True)
class Discount:
    """``gamma`` of rewards to come, ``lam`` of the differences that an estimate adds up."""

    gamma: float = 1.0
    lam: float = 0.95


def gae(r: Rewards, d: Discount) -> tuple[Tensor, Tensor]:
    """Advantages and returns ``(N,)``: generalised advantage estimation (Schulman et al. 2016, arXiv:1506.02438, eq. 16)."""
    rewards, values = padded(r.tokens, r.lengths), padded(r.values, r.lengths)
    real = padded(torch.ones_like(r.values), r.lengths)
    advantages = torch.zeros_like(values)
    following, ahead = r.beyond.clone(), torch.zeros_like(r.beyond)
    for t in range(values.shape[1] - 1, -1, -1):
        step = rewards[:, t] + d.gamma * following - values[:, t] + d.gamma * d.lam * ahead
        ahead = torch.where(real[:, t] > 0, step, ahead)
        following = torch.where(real[:, t] > 0, values[:, t], following)
        advantages[:, t] = ahead
    flat = advantages[real > 0]
    return flat, flat + r.values


def whitened(advantages: Tensor, weights: Tensor) -> Tensor:
    """Mean 0 and variance 1 over the tokens that are learnt from; ``(N,)``."""
    kept = weights > 0
    if not bool(kept.any()):
        return advantages
    values = advantages.double()
    mean = values[kept].mean()
    variance = (values[kept] - mean).square().mean()
    return ((values - mean) / (variance + 1e-8).sqrt()).to(advantages.dtype)


def actor_critic(r: Rewards, d: Discount) -> tuple[Tensor, Tensor]:
    """`gae` with whitened advantages; returns are never whitened."""
    advantages, returns = gae(r, d)
    return whitened(advantages, r.weights), returns


def grpo(r: Rewards, d: Discount) -> tuple[Tensor, Tensor]:
    """``(r - mean) / (std + 1e-4)`` in each group (Shao et al. 2024, arXiv:2402.03300, section 4.1.2)."""
    centred, present = _centred(r)
    count = present.sum(1, keepdim=True)
    deviation = (centred.square().sum(1, keepdim=True) / (count - 1).clamp(min=1)).sqrt()
    return _on_tokens(centred / (deviation + 1e-4), r)


def dr_grpo(r: Rewards, d: Discount) -> tuple[Tensor, Tensor]:
    """``r - mean``: no question counts more because its answers differ less (Liu et al. 2025, arXiv:2503.20783)."""
    return _on_tokens(_centred(r)[0], r)


def rloo(r: Rewards, d: Discount) -> tuple[Tensor, Tensor]:
    """``r`` less the mean of the group's others (Ahmadian et al. 2024, arXiv:2402.14740, eq. 8)."""
    centred, present = _centred(r)
    count = present.sum(1, keepdim=True)
    return _on_tokens(centred * count / (count - 1).clamp(min=1), r)


def _centred(r: Rewards) -> tuple[Tensor, Tensor]:
    """Rewards of whole completions less their group's mean ``(G, samples)``, 0 where there is none; and which there are."""
    present = ~torch.isnan(r.scores).view(-1, r.samples)
    totals = torch.zeros_like(r.scores).index_add(0, owners(r.lengths), r.tokens).view(-1, r.samples)
    totals = totals * present
    mean = totals.sum(1, keepdim=True) / present.sum(1, keepdim=True).clamp(min=1)
    return (totals - mean) * present, present


def _on_tokens(of_completions: Tensor, r: Rewards) -> tuple[Tensor, Tensor]:
    advantages = of_completions.flatten()[owners(r.lengths)]
    return advantages, torch.zeros_like(advantages)


@dataclass(frozen=True)
class Estimator:
    """How advantages are found, with the usual settings. ``critic``: whether a model of returns is needed.

    ``samples`` of a prompt; ``epochs``: passes over a rollout; ``kl``: the price of leaving the reference; ``aggregate``.
    """

    of: Callable[[Rewards, Discount], tuple[Tensor, Tensor]]
    critic: bool = False
    samples: int = 8
    epochs: int = 1
    kl: float = 0.0
    aggregate: str = "token_mean"


ESTIMATORS = {
    "gae": Estimator(actor_critic, critic=True, samples=1, epochs=4, kl=0.05),
    "grpo": Estimator(grpo),
    "dr_grpo": Estimator(dr_grpo, aggregate="constant"),
    "rloo": Estimator(rloo),
}


def token_mean(lengths: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Every token counts alike (Yu et al. 2025, DAPO, arXiv:2503.14476)."""
    return torch.ones(int(lengths.sum())), lengths.float()


def sequence_mean(lengths: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Every completion counts alike: a token of a long one counts less."""
    return (1 / lengths.float())[owners(lengths)], torch.ones(len(lengths))


def constant(lengths: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Every token counts ``1 / most`` of a completion, however long its own is (Liu et al. 2025, arXiv:2503.20783)."""
    return torch.full((int(lengths.sum()),), 1 / most), torch.ones(len(lengths))


AGGREGATES: dict[str, Callable[[Tensor, int], tuple[Tensor, Tensor]]] = {
    "token_mean": token_mean,
    "sequence_mean": sequence_mean,
    "constant": constant,
}
"""From tokens of completions ``(C,)`` and of the longest possible one: weights of tokens ``(N,)`` and completions."""

KL = {
    "k1": lambda d: d,
    "k2": lambda d: d.square() / 2,
    "k3": lambda d: torch.expm1(-d) + d,
}
"""Estimators of KL(policy || reference) from ``d = logp - logp_ref`` at sampled tokens (Schulman 2020)."""


def owners(lengths: Tensor) -> Tensor:
    """Whose each token is: completion numbers ``(N,)``."""
    return torch.repeat_interleave(torch.arange(len(lengths)), lengths)


def padded(values: Tensor, lengths: Tensor) -> Tensor:
    """Ragged values ``(N,)`` as ``(C, longest)``, zeros behind the ends."""
    places = torch.arange(int(lengths.max()))[None] < lengths[:, None]
    whole = values.new_zeros(places.shape)
    whole[places] = values
    return whole
