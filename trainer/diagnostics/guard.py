"""Bad steps: what is skipped, how many in a row are too many, and what counts as a spike."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum, auto
from typing import Any

import torch
from torch import Tensor

from trainer.config import InputError, Node, RunError, schema, setting

log = logging.getLogger(__name__)


class TrainingError(RunError):
    """The run cannot go on: too many steps in a row were skipped."""


class FirstStepError(TrainingError, InputError):
    """A first step that cannot be right: the same command would take it again."""


class FirstStepPolicy(StrEnum):
    """How a first step that contradicts the algorithm is handled."""

    error = auto()
    warn = auto()
    off = auto()


@schema("guard")
@dataclass
class GuardSettings(Node):
    """When a step is skipped, and when the run stops."""

    max_bad_steps: int = setting(20, "skipped steps in a row that end the run", least=1)
    spike_deviations: float = setting(
        0.0,
        "skip a step whose gradient norm is this many standard deviations above the mean of the window; 0 = off",
        least=0,
    )
    first_step: FirstStepPolicy = setting(
        FirstStepPolicy.error, "a first step that cannot be right (DPO not at ln 2, nothing learnt): error, warn or off"
    )
    spike_window: int = setting(100, "applied steps whose gradient norms are remembered", least=10)


class Guard:
    """Remembers gradient norms on the device, sets the limit for the next one, and counts steps that were skipped."""

    def __init__(self, settings: GuardSettings, device: torch.device) -> None:
        self.settings = settings
        self._norms = torch.zeros(settings.spike_window, dtype=torch.float64, device=device)
        self._applied = torch.zeros((), dtype=torch.int64, device=device)
        self._streak = torch.zeros((), dtype=torch.int64, device=device)
        self._skipped = torch.zeros((), dtype=torch.int64, device=device)
        self._flat = 0

    @property
    def limit(self) -> Tensor | None:
        """The largest gradient norm that is applied now; infinite until the window is half full; None when off."""
        if not self.settings.spike_deviations:
            return None
        size = len(self._norms)
        count = self._applied.clamp(max=size)
        real = torch.arange(size, device=self._norms.device) < count
        mean = (self._norms * real).sum() / count.clamp(min=1)
        deviation = ((self._norms - mean).square() * real).sum().div(count.clamp(min=1)).sqrt()
        limit = mean + self.settings.spike_deviations * deviation
        return torch.where(count * 2 < size, torch.inf, limit)

    def observe(self, grad_norm: Tensor, applied: Tensor) -> None:
        """Take note of a step; nothing waits for the device."""
        place = (self._applied % len(self._norms)).reshape(1)
        before = self._norms[place]
        self._norms.scatter_(0, place, torch.where(applied, grad_norm.double(), before))
        self._applied = self._applied + applied
        self._skipped = self._skipped + ~applied
        self._streak = torch.where(applied, 0, self._streak + 1)

    def metrics(self) -> dict[str, Tensor]:
        """``skipped``: steps since the beginning of the run; ``skipped_in_a_row``: up to this one. Both on the device."""
        return {"skipped": self._skipped, "skipped_in_a_row": self._streak}

    def check(self, step: int, values: Mapping[str, float], rows: Sequence[int]) -> None:
        """Name the rows of a step that was skipped, stop the run after too many in a row; warn of steps without gradient.

        ``values``: the step's metrics, as they arrived on the host; ``rows``: what this rank would have learnt from.

        Raises:
            TrainingError: naming the step and what to try.
        """
        streak = int(values["skipped_in_a_row"])
        self._flat = self._flat + 1 if not streak and values["grad_norm"] == 0 else 0
        if self._flat > 1 and self._flat.bit_count() == 1:  # 2, 4, 8, ...: a run's first step has a check of its own
            log.warning(
                "steps %d to %d taught nothing: their gradients are exactly 0 (in policy gradients: every group's scores are "
                "equal, or cut to equal ones; see objective/score_std and objective/clipped)",
                step - self._flat + 1, step,
            )  # fmt: skip
        if not streak:
            return
        log.warning(
            "step %d was skipped: loss %s, gradient norm %s, rows %s",
            step, values["loss"], values["grad_norm"], ", ".join(map(str, rows)),
        )  # fmt: skip
        if streak >= self.settings.max_bad_steps:
            raise TrainingError(
                f"{streak} steps in a row up to step {step} were skipped (guard.max_bad_steps="
                f"{self.settings.max_bad_steps}): their loss or gradient was not finite, a spike, or without a loss token; "
                "the last checkpoint is good: lower optimizer.lr or look at the rows named above, then run again"
            )

    def state_dict(self) -> dict[str, Any]:
        return {
            "norms": self._norms.tolist(),
            "applied": int(self._applied),
            "skipped": int(self._skipped),
            "streak": int(self._streak),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue; a window of another size keeps its newest norms."""
        size, old, applied = len(self._norms), state["norms"], int(state["applied"])
        if len(old) != size:
            in_order = [old[n % len(old)] for n in range(max(0, applied - len(old)), applied)][-size:]
            applied = len(in_order)
            old = in_order + [0.0] * (size - applied)
        self._norms.copy_(torch.tensor(old, dtype=torch.float64))
        self._applied.fill_(applied)
        self._skipped.fill_(int(state["skipped"]))
        self._streak.fill_(int(state["streak"]))
