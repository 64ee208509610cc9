"""What the first step of a fresh run must show: where it does not, everything after it would be learnt from a wrong start."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trainer.batch import Batch
from trainer.diagnostics.guard import FirstStep, TrainingError
from trainer.parallel import distributed
from trainer.parallel.precision import Compute

log = logging.getLogger(__name__)

TOLERANCE = {Compute.fp32: 1e-4, Compute.fp16: 4e-3, Compute.bf16: 2e-2}
"""How far two passes over the same tokens may be apart in a loss of order 1: they are batched and summed differently."""


@dataclass(frozen=True)
class Expectation:
    """A value between ``low`` and ``high``: a metric of the first step, or ``measured`` where that is given.

    ``rule`` says why it must be there and ``remedy`` what to do where it is not. ``certain``: the algorithm itself says so,
    and the run must not go on; otherwise it is unusual, and somebody should look.
    """

    metric: str
    low: float
    high: float
    rule: str
    remedy: str
    certain: bool = True
    measured: float | None = None

    def problem(self, values: Mapping[str, float]) -> str | None:
        """One sentence where the value is elsewhere, or not finite; None where it is as expected."""
        value = values.get(self.metric, math.nan) if self.measured is None else self.measured
        if self.low <= value <= self.high and math.isfinite(value):
            return None
        return f"the first step's {self.metric} is {value:.6g}, and {self.rule}: {self.remedy}"


def near(metric: str, value: float, tolerance: float, rule: str, remedy: str) -> Expectation:
    """A metric that is known exactly, up to rounding."""
    return Expectation(metric, value - tolerance, value + tolerance, rule, remedy)


def check(expected: Iterable[Expectation], values: Mapping[str, float], policy: FirstStep) -> None:
    """Compare the first step of a run with what is expected of it; ``values``: its metrics, the same on all ranks.

    Raises:
        TrainingError: naming everything that cannot be, unless ``policy`` says to warn.
    """
    if policy is FirstStep.off:
        return
    broken = [(one.certain, problem) for one in expected if (problem := one.problem(values)) is not None]
    fatal = [problem for certain, problem in broken if certain and policy is FirstStep.error]
    for _, problem in broken:
        if problem not in fatal:
            log.warning("%s", problem)
    if fatal:
        raise TrainingError("; ".join(fatal) + " (guard.first_step=warn goes on all the same)")


def finite() -> Expectation:
    """A loss that is a number."""
    return Expectation(
        "loss", -math.inf, math.inf, "a loss is a number",
        "look for rows with broken values, or begin with precision=fp32 and a lower optimizer.lr",
    )  # fmt: skip


def something_learnt(batches: Sequence[Batch]) -> Expectation:
    """A mask that is not empty, over all ranks. Collective."""
    weight = sum((batch.weight for batch in batches), start=torch.zeros((), dtype=torch.float64))
    return Expectation(
        "number of learnt units", 1e-9, math.inf, "a step without any teaches nothing",
        "python scripts/preview.py with the same overrides shows what is learnt of each row; see data.train_on, "
        "data.truncation and batch.length",
        measured=float(distributed.sum_over_data(weight)),
    )  # fmt: skip


def plausible(vocabulary: int) -> Expectation:
    """The loss of a new model: about ln(vocabulary), plus half the variance of its logits."""
    chance = math.log(vocabulary)
    return Expectation(
        "loss", 0.8 * chance, 1.5 * chance + 1,
        f"a new model cannot know more or much less than chance, ln {vocabulary} = {chance:.2f}",
        "far below it, targets are visible to the model; far above it, model.initializer_range is too large",
        certain=False,
    )  # fmt: skip


def ends_learnt(batches: Sequence[Any], stops: Sequence[int]) -> Expectation:
    """An end-of-turn token among the learnt targets, over all ranks. Collective."""
    found = torch.zeros((), dtype=torch.float64)
    for batch in batches:
        ends: Tensor = torch.isin(batch.targets, torch.tensor(list(stops), device=batch.targets.device))
        found = found + (ends & (batch.mask > 0)).sum().double().cpu()
    return Expectation(
        "number of learnt end-of-turn tokens", 1, math.inf, "a model that never sees one does not learn to stop",
        "raise batch.length if every answer was cut, and see with python scripts/preview.py whether the template ends "
        "an answer with one of the tokenizer's end tokens",
        certain=False, measured=float(distributed.sum_over_data(found)),
    )  # fmt: skip


def same_policy(compute: Compute) -> Iterator[Expectation]:
    """PPO's first mini-batch, where the policy that learns is the one that sampled: ratio 1, nothing clipped, no KL."""
    tolerance = TOLERANCE[compute]
    remedy = (
        "old and new log-probabilities must come from the same ids, the same temperature and a model without dropout; "
        "with rollouts from another engine, recompute the old ones"
    )
    rule = "the policy has not changed since it sampled"
    yield near("policy/ratio_mean", 1.0, tolerance, rule, remedy)
    yield near("policy/clip_fraction", 0.0, tolerance, rule, remedy)
    yield near("policy/approx_kl", 0.0, tolerance, rule, remedy)
