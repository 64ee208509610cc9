"""Losses of policy and critic, and KL divergences: pure functions of values at the sampled tokens, each ``(N,)``."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class Clipped(NamedTuple):
    """A loss of every token, and where its clip holds (1, else 0)."""

    loss: Tensor
    clipped: Tensor


def ratios(logprobs: Tensor, old: Tensor) -> Tensor:
    """How much likelier each token has become since it was sampled."""
    return (logprobs - old).clamp(-20, 20).exp()


def policy_loss(ratio: Tensor, advantages: Tensor, low: float, high: float) -> Clipped:
    """PPO's surrogate (Schulman et al. 2017, arXiv:1707.06347, eq. 7); two limits as in DAPO (arXiv:2503.14476)."""
    unclipped, clipped = -advantages * ratio, -advantages * ratio.clamp(1 - low, 1 + high)
    return Clipped(torch.maximum(unclipped, clipped), (clipped > unclipped).float())


def value_loss(values: Tensor, old: Tensor, returns: Tensor, clip: float) -> Clipped:
    """Half the squared error, the larger one of a value and of one that stays within ``clip`` of the old one."""
    near = old + (values - old).clamp(-clip, clip)
    unclipped, clipped = (values - returns).square(), (near - returns).square()
    return Clipped(torch.maximum(unclipped, clipped) / 2, (clipped > unclipped).float())


FAR = 20.0
"""Nats from which on k3 goes on as its tangent, as ratios do not go on at all: e**100 is no float32."""


def _k3(d: Tensor) -> Tensor:
    return torch.expm1(-d.clamp(min=-FAR)) + d + math.exp(FAR) * torch.relu(-FAR - d)


KL_ESTIMATORS: dict[str, Callable[[Tensor], Tensor]] = {
    "k1": lambda d: d,
    "k2": lambda d: d.square() / 2,
    "k3": _k3,
}
"""Estimators of KL(policy || reference) from ``d = logp - logp_ref`` at sampled tokens (Schulman 2020, "Approximating KL
Divergence"): k1 is unbiased and noisy, k2 biased with little variance, k3 unbiased and never negative."""


def approx_kl(ratio: Tensor) -> Tensor:
    """KL(old || new) of every token, k3 of ratios new / old of samples of the old policy: never negative."""
    return ratio - 1 - ratio.log()


@dataclass
class KLController:
    """The KL coefficient, steered to a target divergence (Ziegler et al. 2019, arXiv:1909.08593, section 2.2).

    coef: the coefficient now
    target: nats a completion; None = the coefficient stays
    """

    coef: float
    target: float | None = None

    def update(self, kl: float) -> None:
        """Follow an iteration whose completions were ``kl`` nats from the reference, by at most 2 %."""
        if self.target is not None:
            self.coef *= 1 + 0.1 * min(0.2, max(-0.2, kl / self.target - 1))
