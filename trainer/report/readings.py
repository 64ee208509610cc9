"""What a plot says, in one line, from its numbers: the value, how far it is from the best possible, and where it is going."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from trainer.report.curves import Band, Level, Trace, number
from trainer.report.recording import Floats, Series, smoothed

LATE = 0.2
"""The part of a run, at its end, that its direction is told from."""


def read_off(
    traces: Sequence[Trace], levels: Sequence[Level], band: Band | None, better: int, *, steady: bool = False
) -> str:
    """One line about a plot. ``better``: 1 where more is better, -1 where less is, 0 where neither is.

    ``steady``: the curve stays around one value, so its median is what counts.
    """
    main = next((t for t in traces if t.points), traces[0])
    if len(traces) > 1 and len({t.style for t in traces}) > 1 and not main.points:
        return ", ".join(f"{t.label} {number(settled(t))}" for t in traces)
    if steady or main.exact:
        return around(main)
    value = settled(main)
    said = [f"{main.label} {compared(value, levels, better)}"]
    if worse := turned(main, better):
        said.append(worse)
    elif direction := going(main):
        said.append(direction)
    if band:
        said.append(inside(main, band))
    lost = sum(len(t.series) - len(finite(t)) for t in traces)
    if lost:
        said.append(f"{lost:,} value{'s' * (lost > 1)} not finite")
    return "; ".join(said)


def around(trace: Trace) -> str:
    """Of a curve without a direction: its last and largest value where it has no noise, else its middle."""
    values = finite(trace).values
    if trace.exact:
        return f"{trace.label} {number(float(values[-1]))} at the end, {number(float(values.max()))} at most"
    low, middle, high = (number(float(v)) for v in np.quantile(values, [0.1, 0.5, 0.9]))
    return f"{middle} {trace.label} in the median step, {low} to {high} in eight of ten"


def finite(trace: Trace) -> Series:
    """Its values that can be drawn."""
    return trace.series.finite


def settled(trace: Trace) -> float:
    """The value to quote: the last evaluation, or the mean of the last steps, as single ones are noisy."""
    values = finite(trace).values
    if trace.points or len(values) < 10:
        return float(values[-1])
    return float(values[-max(5, len(values) // 50) :].mean())


def compared(value: float, levels: Sequence[Level], better: int) -> str:
    """A value beside the best that is possible: "0.7800, 2.3% above the entropy of the language", "0.98 of 1.0"."""
    best = next((level for level in levels if level.optimum), None)
    if best is None:
        return number(value)
    if best.value == 1 and better > 0:
        return f"{value:.3g} of 1.0" if value < 0.9995 else "1.0 of 1.0"
    if best.value > 0 and better < 0:
        share = value / best.value - 1
        # The label ends with the value itself; here only its name is said.
        name = best.label.rsplit(" ", 1)[0]
        return f"{value:.4f}, {abs(share):.1%} {'above' if share >= 0 else 'below'} the {name}"
    return f"{number(value)} of {number(best.value)} possible"


def slope(series: Series) -> tuple[float, float] | None:
    """Change a step over the last part, by least squares, and its standard error; None from fewer than 3 values."""
    since = series.steps[-1] - LATE * (series.steps[-1] - series.steps[0])
    keep = series.steps >= since
    if keep.sum() < 3:
        keep = np.arange(len(series)) >= len(series) - 3
    x, y = series.steps[keep], series.values[keep]
    if len(x) < 3 or x[-1] == x[0]:
        return None
    centred = x - x.mean()
    change = float((centred * (y - y.mean())).sum() / (centred**2).sum())
    rest = y - y.mean() - change * centred
    error = math.sqrt(float((rest**2).sum()) / max(1, len(x) - 2) / float((centred**2).sum()))
    return change, error


def going(trace: Trace) -> str:
    """The direction at the end: "still falling by 0.4% per 100 steps", or level; empty where there are too few values."""
    series = finite(trace)
    found = slope(series) if len(series) >= 3 else None
    if found is None:
        return ""
    change, error = found
    span = float(series.steps[-1] - series.steps[0])
    size = abs(float(series.values[-1])) or float(np.abs(series.values).mean())
    if trace.points and (latest := steady_change(series)):
        # Evaluations are few and have little noise: a curve that bends goes where the last ones go.
        change, error = latest, 0.0
    whole = abs(change) * span * LATE
    spread = float(series.values.max() - series.values.min())
    if abs(change) < 2 * error or whole < 0.002 * size or whole < 0.01 * spread:
        return "level by now"
    unit = 10 ** max(0, round(math.log10(max(1.0, span / 6))))
    share = abs(change) * unit / size if size else math.inf
    # Of a value near 0 a percentage says nothing.
    amount = f"{share:.1%}" if 0.0005 <= share < 1 else number(abs(change) * unit)
    return f"still {'falling' if change < 0 else 'rising'} by {amount} per {unit:,} steps"


def steady_change(series: Series) -> float:
    """Change a step between the last two values, if it has the sign of the change before; else 0."""
    before, last = np.diff(series.values[-3:]) / np.diff(series.steps[-3:])
    return float(last) if before * last > 0 else 0.0


def turned(trace: Trace, better: int) -> str:
    """Where the best value was, when the last ones are clearly worse: the sign of overfitting, or of exploiting a reward."""
    series, clear = finite(trace), 0.02
    if not better or len(series) < 3:
        return ""
    if not trace.points:
        series, clear = Series(series.steps, smoothed(series.values, 0.05)), 0.1
    best = int(np.argmax(better * series.values))
    behind = better * (series.values[best] - series.values[-1])
    earlier = float(np.abs(series.values[best] - series.values[0]))
    if best < len(series) - 1 and behind > clear * max(earlier, 1e-12) and behind > 0.005 * abs(series.values[best]):
        return (
            f"best {number(float(series.values[best]))} at step {number(float(series.steps[best]))}, worse since then"
        )
    return ""


def inside(trace: Trace, band: Band) -> str:
    """How many of the values lie in the healthy range."""
    values = finite(trace).values
    share = float(((values >= band.low) & (values <= band.high)).mean())
    where = f"the healthy range {number(band.low)} to {number(band.high)}"
    return f"always in {where}" if share == 1 else f"in {where} {share:.0%} of the time"


def way_of(traces: Sequence[Trace]) -> str:
    """Of a plot of one metric over another: from where to where."""
    said = []
    for trace in traces:
        x, y = trace.series.steps, trace.series.values
        top = int(np.argmax(y))
        line = f"{trace.label} from {number(float(y[0]))} to {number(float(y[-1]))} at a KL of {number(float(x[-1]))}"
        if y[top] - y[-1] > 0.1 * float(y.max() - y.min()):
            line += f", after {number(float(y[top]))} at {number(float(x[top]))}"
        said.append(line)
    return "; ".join(said)


def capital(text: str) -> str:
    """With a capital letter at the beginning, also where it is a name such as KL."""
    return text[:1].upper() + text[1:]


def spiky(values: Floats) -> int:
    """How many values are far above their neighbourhood (eight times the smoothed curve): gradient spikes."""
    known = values[np.isfinite(values) & (values > 0)]
    if len(known) < 30:
        return 0
    around = np.exp(smoothed(np.log(known), 0.05))
    return int((known > 8 * around).sum())
