"""How far a policy is from its reference: estimators at sampled tokens, and the coefficient that follows a target."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

KL_ESTIMATORS: dict[str, Callable[[Tensor], Tensor]] = {
    "k1": lambda d: d,
    "k2": lambda d: d.square() / 2,
    "k3": lambda d: torch.expm1(-d) + d,
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
