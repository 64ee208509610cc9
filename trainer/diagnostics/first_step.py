"""What the first step of a fresh run must show: where it does not, everything after it would be learnt from a wrong start."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trainer.data.tokenizer import Tokenizer
from trainer.diagnostics.guard import FirstStepError, FirstStepPolicy
from trainer.models.load import ModelLoader
from trainer.parallel.precision import Compute

log = logging.getLogger(__name__)

TOLERANCE = {Compute.fp32: 1e-4, Compute.fp16: 4e-3, Compute.bf16: 2e-2}
"""How far two passes over the same tokens may be apart in a loss of order 1: they are batched and summed differently."""


@dataclass(frozen=True)
class FirstStep:
    """The first step of a fresh run, as a pipeline validates it.

    ``values``: its metrics by name, the same on all ranks.
    ``batches``: this rank's micro-batches.
    ``load``: what built the models.
    ``tokenizer``: theirs.
    ``compute``: the format that the forwards ran in.
    """

    values: Mapping[str, float]
    batches: Sequence[Any]
    load: ModelLoader
    tokenizer: Tokenizer
    compute: Compute

    @property
    def learnt_nothing(self) -> bool:
        """Whether the step was skipped because all weights of its loss are 0."""
        finite = math.isfinite(self.values["loss"]) and math.isfinite(self.values["grad_norm"])
        return finite and self.values["skipped_in_a_row"] > 0

    def unless(self, holds: bool, metric: str, rule: str, remedy: str) -> list[str]:
        """A sentence on the value of ``metric`` unless it ``holds`` that it is as the ``rule`` says."""
        value = self.values.get(metric, math.nan)
        return [] if holds else [f"the first step's {metric} is {value:.6g}, and {rule}: {remedy}"]

    def near(self, metric: str, expected: float, rule: str, remedy: str, *, value: float | None = None) -> list[str]:
        """A sentence unless a metric, or the ``value`` that is made of it, is ``expected``, up to the format's rounding."""
        tolerance = TOLERANCE[self.compute] * max(1.0, abs(expected))
        measured = self.values.get(metric, math.nan) if value is None else value
        holds = abs(measured - expected) <= tolerance
        return self.unless(holds, metric, rule, remedy)


def validate_first_step(problems: Sequence[str], policy: FirstStepPolicy) -> None:
    """Log the problems of a first step, or end the run.

    Raises:
        FirstStepError: naming all of them, where ``policy`` is ``error``.
    """
    if problems and policy is FirstStepPolicy.error:
        raise FirstStepError("; ".join(problems) + " (guard.first_step=warn goes on all the same)")
    for problem in problems:
        log.warning("%s", problem)
