"""What a plot says, from its numbers: the value, how far it is from the best possible, and where it is going."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from trainer.report.catalogue import Better, Chart, Curve, Level, LevelKind
from trainer.report.html import capital, number, plural
from trainer.report.recording import Floats, Series

LATE = 0.2
"""The part of a run, at its end, that its direction is told from."""
BLOCKS = 20
"""Parts of a noisy curve whose means are compared."""


@dataclass(frozen=True)
class Trace:
    """A curve.

    Attributes:
        label: whose values these are.
        series: the values.
        style: number of its colour and dashes.
        points: few values without noise (evaluations), drawn as dots and never smoothed.
        exact: without noise too, drawn as a line.
        evaluated: measured on held-out data.
    """

    label: str
    series: Series
    style: int = 0
    points: bool = False
    exact: bool = False
    evaluated: bool = False


@dataclass(frozen=True)
class Reading:
    """What the numbers of a plot say.

    Attributes:
        text: the statement, without its subject.
        subject: label of the curve that it is about; empty where it is about all of them.
        value: the value to quote.
        evaluated: about held-out data.
        declined: the last values are clearly worse than the best one: overfitting, or a reward that is exploited.
        healthy: part of the values in the healthy range; None where the plot has none.
    """

    text: str
    subject: str = ""
    value: float = math.nan
    evaluated: bool = False
    declined: bool = False
    healthy: float | None = None

    def line(self) -> str:
        """As it stands under a plot's title."""
        return f"{capital(self.subject)} {self.text}" if self.subject else self.text

    def sentence(self, chart: Chart) -> str:
        """As it stands alone."""
        if self.evaluated:
            return f"Held-out {chart.title[:1].lower()}{chart.title[1:]} {self.text}."
        if len(chart.metrics) == 1:
            return f"{chart.title} {self.text}."
        return f"{chart.title}: {self.subject} {self.text}."


def read_off(traces: Sequence[Trace], chart: Chart, levels: Sequence[Level] = ()) -> Reading:
    """What a plot of ``traces`` says."""
    if chart.against:
        return Reading(capital("; ".join(map(_path_of, traces))))
    main = next((t for t in traces if t.points), traces[0])
    value, values = settled(main), main.series.finite.values
    if len({t.style for t in traces}) > 1 and not main.points:
        return Reading(capital(", ".join(f"{t.label} {number(settled(t))}" for t in traces)), value=value)
    if main.exact:
        return Reading(
            f"{number(float(values[-1]))} at the end, {number(float(values.max()))} at most", main.label, value
        )
    if chart.curve is Curve.steady:
        low, middle, high = (number(float(v)) for v in np.quantile(values, [0.1, 0.5, 0.9]))
        return Reading(f"{middle} {main.label} in the median step, {low} to {high} in eight of ten", value=value)
    decline = _decline(main, chart.better)
    parts = [compared(value, levels, chart.better), decline or trend(main)]
    healthy = None
    if chart.band:
        low_edge, high_edge = chart.band
        healthy = float(((values >= low_edge) & (values <= high_edge)).mean())
        where = f"the healthy range {number(low_edge)} to {number(high_edge)}"
        parts.append(f"always in {where}" if healthy == 1 else f"in {where} {healthy:.0%} of the time")
    if lost := sum(len(t.series) - len(t.series.finite) for t in traces):
        parts.append(f"{plural(lost, 'value')} not finite")
    text = "; ".join(part for part in parts if part)
    return Reading(text, main.label, value, main.evaluated, bool(decline), healthy)


def settled(trace: Trace) -> float:
    """The value to quote: the last evaluation, or the mean of the last steps, as single ones are noisy."""
    values = trace.series.finite.values
    if trace.points or trace.exact or len(values) < 10:
        return float(values[-1])
    return float(values[-max(5, len(values) // 50) :].mean())


def compared(value: float, levels: Sequence[Level], better: Better) -> str:
    """A value beside the best that is possible: "0.7800, 2.3% above the entropy of the language", "0.98 of 1.0"."""
    best = next((level for level in levels if level.kind is LevelKind.optimum), None)
    if best is None or best.value is None:
        return number(value)
    if best.value == 1 and better is Better.higher:
        return f"{value:.3g} of 1.0" if value < 0.9995 else "1.0 of 1.0"
    if best.value > 0 and better is Better.lower:
        share = value / best.value - 1
        return f"{value:.4f}, {abs(share):.1%} {'above' if share >= 0 else 'below'} the {best.name}"
    return f"{number(value)} of {number(best.value)} possible"


def trend(trace: Trace) -> str:
    """The direction at the end: "still falling by 0.4% per 100 steps", or level; empty where there are too few values."""
    series = trace.series.finite
    fitted = _slope(series)
    if fitted is None or (len(series) < BLOCKS // 2 and not trace.points):
        return ""  # a few noisy values have no direction
    change, error = fitted
    span = float(series.steps[-1] - series.steps[0])
    size = abs(float(series.values[-1])) or float(np.abs(series.values).mean())
    if trace.points and (latest := _steady_change(series)):
        # Evaluations are few and have little noise: a curve that bends goes where the last ones go.
        change, error = latest, 0.0
    late_change = abs(change) * span * LATE
    extent = float(series.values.max() - series.values.min())
    if abs(change) < 2 * error or late_change < 0.002 * size or late_change < 0.01 * extent:
        return "level by now"
    unit = 10 ** max(0, round(math.log10(max(1.0, span / 6))))
    share = abs(change) * unit / size if size else math.inf
    # Of a value near 0 a percentage says nothing.
    amount = f"{share:.1%}" if 0.0005 <= share < 1 else number(abs(change) * unit)
    per = f"per {unit:,} steps" if unit > 1 else "a step"
    return f"still {'falling' if change < 0 else 'rising'} by {amount} {per}"


def _slope(series: Series) -> tuple[float, float] | None:
    """Change a step over the last part, by least squares, and its standard error; None from fewer than 3 values."""
    if len(series) < 3:
        return None
    late = series.steps >= series.steps[-1] - LATE * (series.steps[-1] - series.steps[0])
    if late.sum() < 3:
        late = np.arange(len(series)) >= len(series) - 3
    x, y = series.steps[late], series.values[late]
    if x[-1] == x[0]:
        return None
    centred = x - x.mean()
    change = float((centred * (y - y.mean())).sum() / (centred**2).sum())
    rest = y - y.mean() - change * centred
    error = math.sqrt(float((rest**2).sum()) / max(1, len(x) - 2) / float((centred**2).sum()))
    return change, error


def _steady_change(series: Series) -> float:
    """Change a step between the last two values, if it has the sign of the change before; else 0."""
    before, last = np.diff(series.values[-3:]) / np.diff(series.steps[-3:])
    return float(last) if before * last > 0 else 0.0


def _decline(trace: Trace, better: Better) -> str:
    """Where the best value was, when the last ones are clearly worse; else empty."""
    series, margin = trace.series.finite, 0.02
    if better is Better.neither or len(series) < 3:
        return ""
    if not trace.points:
        series, margin = series.block_means(BLOCKS), 0.1
    values = better.value * series.values
    best = int(np.argmax(values))
    behind, gained = values[best] - values[-1], abs(values[best] - values[0])
    if best == len(series) - 1 or behind <= margin * max(gained, 1e-12) or behind <= 0.005 * abs(values[best]):
        return ""
    return f"best {number(float(series.values[best]))} at step {series.steps[best]:,.0f}, worse since then"


def _path_of(trace: Trace) -> str:
    """Of one metric over another: from where to where."""
    x, y = trace.series.steps, trace.series.values
    top = int(np.argmax(y))
    text = f"{trace.label} from {number(float(y[0]))} to {number(float(y[-1]))} at a KL of {number(float(x[-1]))}"
    if y[top] - y[-1] > 0.1 * float(y.max() - y.min()):
        text += f", after {number(float(y[top]))} at {number(float(x[top]))}"
    return text


def spikes(values: Floats) -> int:
    """How many values are more than eight times the median of their neighbourhood, a twentieth of the curve."""
    known = values[np.isfinite(values) & (values > 0)]
    if len(known) < 30:
        return 0
    return sum(int((block > 8 * np.median(block)).sum()) for block in np.array_split(known, BLOCKS))
