"""What a policy and its critic follow: pure functions of log-probabilities and values at sampled tokens, each ``(N,)``."""

from __future__ import annotations

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
