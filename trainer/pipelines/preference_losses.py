"""Losses of pairs of answers or single ones: functions of log-probabilities, by name (docs/algorithms.md#preferences)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from trainer.pipelines.answers import Answers, LabelledAnswers, PairAnswers


@dataclass(frozen=True)
class Strength:
    """``beta``; ``smoothing``: probability that a label is wrong; ``gamma``: SimPO's margin, and ORPO's weight.

    ``desirable``, ``undesirable``: weights of KTO's two kinds of completions.
    """

    beta: float
    smoothing: float = 0.0
    gamma: float = 0.0
    average: bool = True
    desirable: float = 1.0
    undesirable: float = 1.0


def sigmoid(a: PairAnswers, s: Strength) -> Tensor:
    """DPO, with label smoothing cDPO (Rafailov et al. 2023, arXiv:2305.18290, eq. 7)."""
    d = s.beta * (a.ratio_chosen - a.ratio_rejected)
    return -(1 - s.smoothing) * logsigmoid(d) - s.smoothing * logsigmoid(-d)


def robust(a: PairAnswers, s: Strength) -> Tensor:
    """Unbiased under flipped labels (Chowdhury et al. 2024, arXiv:2403.00409)."""
    d = s.beta * (a.ratio_chosen - a.ratio_rejected)
    return (-(1 - s.smoothing) * logsigmoid(d) + s.smoothing * logsigmoid(-d)) / (1 - 2 * s.smoothing)


def hinge(a: PairAnswers, s: Strength) -> Tensor:
    """SLiC's hinge on the log-ratios (Zhao et al. 2023, arXiv:2305.10425)."""
    return torch.relu(1 - s.beta * (a.ratio_chosen - a.ratio_rejected))


def ipo(a: PairAnswers, s: Strength) -> Tensor:
    """A squared distance to a margin of ``1 / (2 beta)`` (Azar et al. 2023, arXiv:2310.12036, eq. 17)."""
    d = a.mean_ratio_chosen - a.mean_ratio_rejected if s.average else a.ratio_chosen - a.ratio_rejected
    return (d - 1 / (2 * s.beta)).square()


def simpo(a: PairAnswers, s: Strength) -> Tensor:
    """Mean log-probabilities with a margin, without a reference (Meng et al. 2024, arXiv:2405.14734, eq. 6)."""
    return -logsigmoid(s.beta * (a.mean_chosen - a.mean_rejected) - s.gamma)


def orpo(a: PairAnswers, s: Strength) -> Tensor:
    """The chosen answer's loss and an odds ratio, without a reference (Hong et al. 2024, arXiv:2403.07691, eq. 6)."""
    odds = [m - torch.log1p(-torch.exp(m).clamp(max=1 - 1e-7)) for m in (a.mean_chosen, a.mean_rejected)]
    return -a.mean_chosen - s.gamma * logsigmoid(odds[0] - odds[1])


def kto(a: LabelledAnswers, s: Strength) -> Tensor:
    """Single answers against how far the policy has moved elsewhere (Ethayarajh et al. 2024, arXiv:2402.01306, eq. 8)."""
    gain = s.beta * a.labels * (a.ratio - a.moved)
    return torch.where(a.labels > 0, s.desirable, s.undesirable) * (1 - torch.sigmoid(gain))


@dataclass(frozen=True)
class Objective:
    """A loss with its usual settings. ``referenced``: whether it compares with a reference model.

    ``reads``: what it is a function of. ``unit``: the data that it learns from.
    """

    loss: Callable[[Any, Strength], Tensor]
    referenced: bool = True
    beta: float = 0.1
    gamma: float = 0.0
    reads: type[Answers] = PairAnswers
    unit: str = "preference pairs"


OBJECTIVES = {
    "sigmoid": Objective(sigmoid),
    "robust": Objective(robust),
    "hinge": Objective(hinge),
    "ipo": Objective(ipo),
    "simpo": Objective(simpo, referenced=False, beta=2.0, gamma=1.0),
    "orpo": Objective(orpo, referenced=False, gamma=0.1),
    "kto": Objective(kto, reads=LabelledAnswers, unit="labelled completions"),
}
