"""Losses over preference pairs by name: pure functions of log-probabilities (docs/algorithms.md#preferences).

A loss takes the pairs, ``beta``, and hyper-parameters of its own as keywords, whose defaults are their usual values:

    @preference_loss(uses_reference=False)
    def simpo(pairs: PairLogps, beta: float = 2.0, *, gamma: float = 1.0) -> Tensor: ...

is ``pipeline.loss_type=simpo``. A user's module (``imports=[mine]``) adds another in the same way.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from trainer.pipelines.reference import CompletionLogps


@dataclass(frozen=True)
class PairLogps:
    """Log-probabilities of B pairs: of the ``chosen`` completions and of the ``rejected`` ones."""

    chosen: CompletionLogps
    rejected: CompletionLogps

    @classmethod
    def interleaved(cls, policy: Tensor, reference: Tensor, tokens: Tensor) -> PairLogps:
        """From ``(2 B,)`` each, in the order of a `PairBatch`: chosen, rejected, chosen, ..."""
        sides = zip(*(values.view(-1, 2).unbind(1) for values in (policy, reference, tokens)), strict=True)
        return cls(*(CompletionLogps(*side) for side in sides))

    @property
    def difference(self) -> Tensor:
        """The log-ratio of the chosen completion less that of the rejected one, ``(B,)``."""
        return self.chosen.ratio - self.rejected.ratio


@dataclass(frozen=True)
class PreferenceLoss:
    """A loss ``(B,)`` of pairs.

    ``function``: called with the pairs, beta, and the loss's own hyper-parameters.
    ``uses_reference``: whether it compares with a reference model.
    """

    function: Callable[..., Tensor]
    uses_reference: bool = True

    @property
    def defaults(self) -> dict[str, Any]:
        """Its hyper-parameters with their usual values, ``beta`` among them."""
        parameters = list(inspect.signature(self.function).parameters.values())[1:]
        return {parameter.name: parameter.default for parameter in parameters}


LOSSES: dict[str, PreferenceLoss] = {}
"""Every `preference_loss` by its name."""


def preference_loss(*, uses_reference: bool = True) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """Make a function of pairs and ``beta`` a value of ``pipeline.loss_type``, under its own name.

    Raises:
        TypeError: if a hyper-parameter has no default, or ``beta`` is none of them.
    """

    def register(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        loss = PreferenceLoss(function, uses_reference)
        if "beta" not in loss.defaults or inspect.Parameter.empty in loss.defaults.values():
            raise TypeError(f"{function.__name__} needs a parameter beta, and a default for each but the pairs")
        LOSSES[function.__name__] = loss
        return function

    return register


@preference_loss()
def sigmoid(pairs: PairLogps, beta: float = 0.1, *, label_smoothing: float = 0.0) -> Tensor:
    """DPO, with label smoothing cDPO (Rafailov et al. 2023, arXiv:2305.18290, eq. 7)."""
    d = beta * pairs.difference
    return -(1 - label_smoothing) * logsigmoid(d) - label_smoothing * logsigmoid(-d)


@preference_loss()
def robust(pairs: PairLogps, beta: float = 0.1, *, label_smoothing: float = 0.0) -> Tensor:
    """Unbiased under flipped labels (Chowdhury et al. 2024, arXiv:2403.00409)."""
    d = beta * pairs.difference
    return (-(1 - label_smoothing) * logsigmoid(d) + label_smoothing * logsigmoid(-d)) / (1 - 2 * label_smoothing)


@preference_loss()
def hinge(pairs: PairLogps, beta: float = 0.1) -> Tensor:
    """SLiC's hinge on the log-ratios (Zhao et al. 2023, arXiv:2305.10425)."""
    return torch.relu(1 - beta * pairs.difference)


@preference_loss()
def ipo(pairs: PairLogps, beta: float = 0.1, *, average: bool = True) -> Tensor:
    """A squared distance to a margin of ``1 / (2 beta)`` (Azar et al. 2023, arXiv:2310.12036, eq. 17)."""
    d = pairs.chosen.mean_ratio - pairs.rejected.mean_ratio if average else pairs.difference
    return (d - 1 / (2 * beta)).square()


@preference_loss(uses_reference=False)
def simpo(pairs: PairLogps, beta: float = 2.0, *, gamma: float = 1.0) -> Tensor:
    """Mean log-probabilities with a margin, without a reference (Meng et al. 2024, arXiv:2405.14734, eq. 6)."""
    return -logsigmoid(beta * (pairs.chosen.mean - pairs.rejected.mean) - gamma)


@preference_loss(uses_reference=False)
def orpo(pairs: PairLogps, beta: float = 0.1, *, gamma: float = 0.1) -> Tensor:
    """The chosen completion's loss and an odds ratio, without a reference (Hong et al. 2024, arXiv:2403.07691, eq. 6).

    ``beta`` only scales the rewards that are reported.
    """
    odds = [m - torch.log1p(-torch.exp(m).clamp(max=1 - 1e-7)) for m in (pairs.chosen.mean, pairs.rejected.mean)]
    return -pairs.chosen.mean - gamma * logsigmoid(odds[0] - odds[1])
