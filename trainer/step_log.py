"""The metrics of steps on their way from the device to everything that reads them."""

from __future__ import annotations

from trainer.diagnostics.guard import Guard
from trainer.diagnostics.stragglers import Stragglers
from trainer.loop import Step
from trainer.metrics import Readback
from trainer.stopping import StopConsensus
from trainer.tracking.progress import PendingStep, TokenCounter
from trainer.tracking.throughput import Speed
from trainer.tracking.tracker import Tracker


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
        self.tracker.table(step.number, "samples", step.shown)
        self.speed.count(sum(batch.pairs for batch in step.micro_batches))
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
