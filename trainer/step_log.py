"""The metrics of steps on their way from the device to everything that reads them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trainer.diagnostics.guard import Guard
from trainer.diagnostics.stragglers import Stragglers
from trainer.loop import Step
from trainer.metrics import Readback
from trainer.stopping import StopConsensus
from trainer.tracking.throughput import Speed, Timing
from trainer.tracking.tracker import Tracker


class TokenCounter:
    """Tokens learnt from since the beginning of the run, counted on the device."""

    def __init__(self, device: torch.device) -> None:
        self.tokens = torch.zeros((), dtype=torch.float64, device=device)

    def add(self, tokens: Tensor) -> Tensor:
        """The count with the tokens of another step."""
        self.tokens = self.tokens + tokens
        return self.tokens

    def state_dict(self) -> dict[str, Any]:
        return {"tokens": int(self.tokens)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.tokens.fill_(state["tokens"])


@dataclass(frozen=True)
class PendingStep:
    """What the host knows of a step whose metrics are still on the device.

    Attributes:
        number: the step.
        lr: its learning rate.
        rows: positions in the data of this rank's rows.
        timing: the clock since the step before.
        compared: what a comparison of the ranks after it showed, by metric; mostly nothing.
    """

    number: int
    lr: float
    rows: list[int]
    timing: Timing
    compared: Mapping[str, float]


class StepLog:
    """Hands the metrics of every step, once they are on the host, to the stop request, the guard and the tracker.

    On CUDA that is one step later, so that the host does not wait for the device.
    """

    def __init__(
        self,
        tracker: Tracker,
        guard: Guard,
        stop: StopConsensus,
        speed: Speed,
        tokens: TokenCounter,
        stragglers: Stragglers,
    ) -> None:
        self.tracker, self.guard, self.stop, self.speed = tracker, guard, stop, speed
        self.tokens, self.stragglers = tokens, stragglers
        self._readback: Readback[PendingStep] = Readback()

    def push(self, step: Step, *, lr: float) -> None:
        """Take the metrics of a step that has just been taken at learning rate ``lr``, and log those that have arrived."""
        self.tracker.table(step.number, "samples", step.texts)
        self.speed.count(sum(batch.attention_pairs for batch in step.micro_batches))
        rows = [row for batch in step.micro_batches for row in batch.rows.tolist()]
        timing = self.speed.lap()
        compared = self.stragglers.observe(step.number, timing.laps.get("data", 0.0))
        values = {**step.metrics, "tokens": self.tokens.add(step.metrics["tokens"])}
        self._log(self._readback.push(values, PendingStep(step.number, lr, rows, timing, compared)))

    def flush(self) -> None:
        """Wait for the metrics of all steps, and log them."""
        self._log(self._readback.flush())

    def _log(self, arrived: list[tuple[dict[str, float], PendingStep]]) -> None:
        for values, step in arrived:
            self.stop.update(values.pop("stopping"))
            self.guard.check(step.number, values, step.rows)
            rates = self.speed.figures(values["tokens"], step.timing)
            self.tracker.step(step.number, {**values, "lr": step.lr, **rates, **step.compared})
