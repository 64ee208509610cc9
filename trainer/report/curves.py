"""Curves as SVG: axes, levels, healthy ranges, raw values faint and smoothed ones strong. No library, no network."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np

from trainer.report.recording import Floats, Series, smoothed

WIDTH, HEIGHT = 560, 250
LEFT, RIGHT, TOP, BOTTOM = 62, 12, 12, 30
SMOOTHING = 0.02
"""Length of the average of the strong line, as a share of the curve, where nothing else is asked for."""
POINTS = 600
"""Of a curve, before neighbouring steps are drawn as one: their smallest, largest and mean value."""
STYLES, DASHES = 6, 5
"""Colours; dashes come with the same number, so that curves can be told apart without colour."""


@dataclass(frozen=True)
class Trace:
    """A curve. ``points``: few exact values (evaluations), drawn as dots and never smoothed; ``exact``: no noise either."""

    label: str
    series: Series
    style: int = 0
    points: bool = False
    exact: bool = False


@dataclass(frozen=True)
class Level:
    """A value to compare with: ``optimum`` (no model gets beyond it) or one to know (where a run starts, a limit)."""

    value: float
    label: str
    optimum: bool = False


@dataclass(frozen=True)
class Band:
    """The range that a healthy run stays in."""

    low: float
    high: float
    label: str = "healthy"


@dataclass(frozen=True)
class Figure:
    """A plot with its reading: what the numbers say in one line."""

    key: str
    title: str
    traces: Sequence[Trace]
    reading: str = ""
    hint: str = ""
    levels: Sequence[Level] = ()
    band: Band | None = None
    log: bool = False
    falls: bool = False
    x_label: str = "step"


def number(value: float | None) -> str:
    """As a person wants to read it: four digits that count, thousands apart."""
    if value is None:
        return "–"
    if not math.isfinite(value):
        return "not finite"
    size = abs(value)
    if value == int(value) and size < 1e15:
        return f"{int(value):,}"
    if size >= 1000:
        return f"{value:,.0f}"
    if size < 1e-3:
        return f"{value:.2e}"
    return f"{value:.4g}" if size >= 0.1 else f"{value:.3g}"


@dataclass(frozen=True)
class Axes:
    """Where a value lies in the picture."""

    x: tuple[float, float]
    y: tuple[float, float]
    log: bool

    def across(self, value: Any) -> Any:
        low, high = self.x
        return LEFT + (value - low) / (high - low) * (WIDTH - LEFT - RIGHT)

    def up(self, value: Any) -> Any:
        low, high = (math.log10(v) for v in self.y) if self.log else self.y
        place = np.log10(np.maximum(value, 1e-300)) if self.log else value
        # Far outside is as good as just outside, and keeps coordinates short.
        share = np.clip((place - low) / (high - low), -2, 3)
        return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)


def axes_of(figure: Figure) -> Axes | None:
    """Limits that show most of every curve: a steep beginning may leave the picture. None where there is nothing to draw."""
    finite = [t.series.finite for t in figure.traces]
    finite = [s for s in finite if len(s)]
    if not finite:
        return None
    steps = np.concatenate([s.steps for s in finite])
    positive = figure.log and all((s.values > 0).all() for s in finite)
    lows, highs = [], []
    curves = [t for t in figure.traces if not t.points]
    for trace in figure.traces:
        values = trace.series.finite.values
        if not len(values):
            continue
        noisy = len(values) >= 20 and not trace.points and not trace.exact
        # The first evaluations of a run may lie as far out as its first steps.
        values = values[1:] if trace.points and len(values) > 3 and figure.x_label == "step" else values
        lows.append(float(np.quantile(values, 0.005 if noisy else 0)))
        if not (trace.points and curves):
            highs.append(float(np.quantile(values, 0.92 if noisy and figure.falls else 0.995 if noisy else 1)))
        else:
            highs.append(float(values[-1]))
    marked = [level.value for level in figure.levels] + ([figure.band.low, figure.band.high] if figure.band else [])
    low, high = min([*lows, *marked]), max([*highs, *marked])
    logarithmic = positive and low > 0
    if logarithmic:
        low, high = math.log10(low), math.log10(high)
    # A constant is a line in the middle, not noise in its last digits.
    span = max(high - low, 0 if logarithmic else abs(high) * 0.02, 1e-9)
    middle = (low + high) / 2
    low, high = min(low, middle - span / 2), max(high, middle + span / 2)
    # Room for the name of a level at the edge.
    below, above = (
        0.13 if edge in marked and figure.levels else 0.06 for edge in (min([*lows, *marked]), max([*highs, *marked]))
    )
    low, high = low - below * span, high + above * span
    return Axes(_wide(steps), (10**low, 10**high) if logarithmic else (low, high), logarithmic)


def _wide(steps: Floats) -> tuple[float, float]:
    low, high = float(steps.min()), float(steps.max())
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About ``count`` round numbers between two values."""
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [n * step for n in range(first, math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Round numbers between two positive values, a few a decade."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for parts in ((1,), (1, 3), (1, 2, 5)):
        found = [p * 10.0**n for n in powers for p in parts if low <= p * 10.0**n <= high]
        if len(found) >= 3:
            return found[:: max(1, len(found) // 5)]
    return ticks(low, high)


def thinned(series: Series) -> tuple[Series, Series]:
    """A long curve in few points: its extremes, which `draw` shows, and its means, which are smoothed."""
    if len(series) <= POINTS:
        return series, series
    parts = np.array_split(np.arange(len(series)), POINTS // 2)
    steps = np.array([series.steps[p].mean() for p in parts])
    values = [series.values[p] for p in parts]
    known = [v[np.isfinite(v)] for v in values]
    means = np.array([v.mean() if len(v) else np.nan for v in known])
    ends = np.array([(v.min(), v.max()) if len(v) else (np.nan, np.nan) for v in known])
    # Up and down in turn: one stroke through all extremes instead of a comb.
    ends[1::2] = ends[1::2, ::-1]
    return Series(np.repeat(steps, 2), ends.reshape(-1)), Series(steps, means)


def path(axes: Axes, series: Series) -> str:
    """The ``d`` of an SVG path; it breaks where a value is not finite."""
    pieces, drawing = [], False
    for x, y, known in zip(
        axes.across(series.steps), axes.up(series.values), np.isfinite(series.values).tolist(), strict=True
    ):
        if known:
            pieces.append(f"{'L' if drawing else 'M'}{x:.1f} {y:.1f}")
        drawing = known
    return "".join(pieces)


def draw(figure: Figure) -> str:
    """The figure as an ``<svg>`` with a title and a description; empty where it has nothing to show."""
    axes = axes_of(figure)
    if axes is None:
        return ""
    key, right, base = escape(figure.key), WIDTH - RIGHT, HEIGHT - BOTTOM
    out = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-labelledby="{key}-t {key}-d"><title id="{key}-t">'
        f'{escape(figure.title)}</title><desc id="{key}-d">{escape(figure.reading)}</desc>'
        f'<clipPath id="{key}-c"><rect x="{LEFT}" y="{TOP - 4}" width="{right - LEFT}" height="{base - TOP + 4}"/></clipPath>'
    ]
    if figure.band:
        top, bottom = float(axes.up(figure.band.high)), float(axes.up(figure.band.low))
        out.append(
            f'<rect class="band" x="{LEFT}" y="{top:.1f}" width="{right - LEFT}" height="{max(1.0, bottom - top):.1f}"/>'
        )
    marks = log_ticks(*axes.y) if axes.log else ticks(*axes.y)
    for value in marks:
        y = float(axes.up(value))
        out.append(
            f'<path class="grid" d="M{LEFT} {y:.1f}H{right}"/><text class="tick" x="{LEFT - 8}" y="{y + 4:.1f}" '
            f'text-anchor="end">{_tick(value, marks)}</text>'
        )
    columns = ticks(*axes.x, 5)
    for value in columns:
        # A number at the right edge would be cut off.
        x = min(float(axes.across(value)), right)
        side = "end" if x > right - 16 else "middle"
        out.append(
            f'<text class="tick" x="{x:.1f}" y="{base + 20}" text-anchor="{side}">{_tick(value, columns)}</text>'
        )
    out.append(f'<g clip-path="url(#{key}-c)">')
    for trace in figure.traces:
        out.append(_trace(axes, trace))
    out.append("</g>")
    taken: list[float] = []
    for level in figure.levels:
        out.append(_level(axes, level, taken))
    if figure.band:
        y = max(TOP + 10.0, float(axes.up(figure.band.high)) + 14)
        out.append(f'<text class="mark" x="{LEFT + 6}" y="{y:.1f}">{escape(figure.band.label)}</text>')
    return "".join(out) + '<g class="cursor"></g></svg>'


def _trace(axes: Axes, trace: Trace) -> str:
    style = f"s{trace.style % STYLES} d{trace.style % DASHES}"
    if trace.points:
        shown = trace.series.finite
        dots = "".join(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.2"/>'
            for x, y in zip(axes.across(shown.steps), axes.up(shown.values), strict=True)
        )
        return f'<g class="evals {style}"><path d="{path(axes, shown)}"/>{dots if len(shown) <= 120 else ""}</g>'
    ends, means = thinned(trace.series)
    if trace.exact:
        return f'<path class="exact {style}" d="{path(axes, means)}"/>'
    strong = Series(means.steps, smoothed(means.values, SMOOTHING))
    return f'<path class="raw {style}" d="{path(axes, ends)}"/><path class="smooth {style}" d="{path(axes, strong)}"/>'


def _level(axes: Axes, level: Level, taken: list[float]) -> str:
    y = float(axes.up(level.value))
    # Away from the curves: below a level at the bottom, above one at the top, and never over another name.
    low = y > HEIGHT - BOTTOM - 45 and level.optimum
    places = (y + 15, y - 6) if low else (y - 6, y + 15)
    place = next((p for p in places if TOP + 6 < p < HEIGHT - BOTTOM and all(abs(p - t) > 14 for t in taken)), y - 6)
    taken.append(place)
    kind = "optimum" if level.optimum else "reference"
    return (
        f'<path class="level {kind}" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/><text class="mark" x="{WIDTH - RIGHT - 4}" '
        f'y="{place:.1f}" text-anchor="end">{escape(level.label)}</text>'
    )


def _tick(value: float, all_of_them: Sequence[float]) -> str:
    size = max(abs(v) for v in all_of_them)
    if size >= 10_000:
        unit, letter = (1e9, "G") if size >= 1e9 else (1e6, "M") if size >= 1e6 else (1e3, "k")
        return f"{value / unit:.3g}{letter}" if value else "0"
    if 0 < size < 1e-3:
        return f"{value:.1e}".replace("e-0", "e-") if value else "0"
    gap = min((abs(b - a) for a, b in itertools.pairwise(all_of_them)), default=1.0)
    places = max(0, min(6, -math.floor(math.log10(gap) + 1e-9))) if gap else 2
    if places and round(gap * 10**places, 6) % 1:
        places += 1
    return f"{value + 0.0:.{places}f}"


def data(figure: Figure) -> str:
    """What the page's script needs of a figure, as JSON that may stand inside a ``<script>``."""
    axes = axes_of(figure)
    assert axes is not None
    traces = []
    for trace in figure.traces:
        means = trace.series.finite if trace.points else thinned(trace.series)[1].finite
        traces.append(
            {
                "label": trace.label,
                "points": trace.points or trace.exact,
                "x": _short(means.steps),
                "y": _short(means.values),
            }
        )
    box = [LEFT, TOP, WIDTH - RIGHT, HEIGHT - BOTTOM]
    held = {"x": axes.x, "y": axes.y, "log": axes.log, "box": box, "xLabel": figure.x_label, "traces": traces}
    return json.dumps(held, separators=(",", ":")).replace("<", "\\u003c")


def _short(values: Floats) -> list[float]:
    return [int(v) if v == int(v) and abs(v) < 1e15 else float(f"{v:.5g}") for v in values.tolist()]
