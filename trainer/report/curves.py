"""Curves as SVG: axes, levels, healthy ranges, raw values; page.js draws their average. No library, no network."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from trainer.report.catalogue import Better, Chart, Level, LevelKind
from trainer.report.html import Html, markup, number, tag
from trainer.report.readings import Reading, Trace
from trainer.report.recording import Floats, Series

WIDTH, HEIGHT = 560, 264
LEFT, RIGHT, TOP, BOTTOM = 88, WIDTH - 12, 12, HEIGHT - 46
"""The box of the curves, in pixels; to its left a tick such as -2.98e-4 has room in the letters of a small window."""
LETTER = 8
"""Width of a digit, pixels."""
MARGIN = 0.02
"""Part of the horizontal axis that is left free at both ends: the dots of the first and the last step are whole."""
STEEP = 4
"""How many times a curve's usual range its beginning may take up; a steeper one leaves the picture, which then says so."""
POINTS = 600
"""Of a curve, before neighbouring steps are drawn as one: their smallest, largest and mean value."""
STYLES, DASHES = 6, 5
"""Colours; dashes come with the same number, so that curves can be told apart without colour."""


@dataclass(frozen=True)
class Figure:
    """A plot with its reading.

    Attributes:
        chart: what is drawn.
        traces: its curves, one at least.
        reading: what the numbers say.
        levels: lines to compare with, all of them with a value.
        x_label: name of the horizontal axis.
    """

    chart: Chart
    traces: Sequence[Trace]
    reading: Reading
    levels: Sequence[Level] = ()
    x_label: str = "step"


@dataclass(frozen=True)
class Axes:
    """Where a value lies in the picture, in pixels."""

    x: tuple[float, float]
    y: tuple[float, float]
    log: bool = False

    def across(self, value: Floats | float) -> Floats:
        low, high = self.x
        return np.asarray(LEFT + (value - low) / (high - low) * (RIGHT - LEFT))

    def up(self, value: Floats | float) -> Floats:
        low, high = (math.log10(v) for v in self.y) if self.log else self.y
        place = np.log10(np.maximum(value, 1e-300)) if self.log else value
        # Far outside is as good as just outside, and keeps coordinates short.
        return np.asarray(BOTTOM - np.clip((place - low) / (high - low), -2, 3) * (BOTTOM - TOP))


def axes_of(figure: Figure) -> Axes:
    """Limits that show most of every curve; a steep beginning may leave the picture."""
    finite = [trace.series.finite for trace in figure.traces]
    ranges = [_typical_range(trace, figure) for trace in figure.traces]
    marked = [float(level.value or 0.0) for level in figure.levels] + list(figure.chart.band or ())
    low, high = min([*(r[0] for r in ranges), *marked]), max([*(r[1] for r in ranges), *marked])
    # Room for the label of a level at the edge.
    below, above = (0.13 if edge in marked and figure.levels else 0.06 for edge in (low, high))
    log = figure.chart.log and low > 0 and all((series.values > 0).all() for series in finite)
    if log:
        low, high = math.log10(low), math.log10(high)
    # A constant is a line in the middle, not noise in its last digits.
    constant = high - low <= 1e-6 * abs(high)
    least = 0.6 * constant if log else abs(high) * (0.5 if constant else 0.02)  # on a logarithmic axis half to double
    span = max(high - low, least, 1e-9)
    middle = (low + high) / 2
    low, high = min(low, middle - span / 2) - below * span, max(high, middle + span / 2) + above * span
    steps = np.concatenate([series.steps for series in finite])
    first, last = float(steps.min()), float(steps.max())
    free = MARGIN * (last - first) or 0.5
    return Axes((first - free, last + free), (10**low, 10**high) if log else (low, high), log)


def _typical_range(trace: Trace, figure: Figure) -> tuple[float, float]:
    """A curve's values; of a noisy one without outliers, and without a beginning that would flatten the rest."""
    values = trace.series.finite.values
    low, high = float(values.min()), float(values.max())
    if len(values) < 20 or trace.exact or trace.points:
        return low, high
    usual = float(np.quantile(values, 0.92 if figure.chart.better is Better.lower else 0.995))
    bottom = float(np.quantile(values, 0.005))
    return bottom, high if high - bottom <= STEEP * (usual - bottom) else usual


def ticks(low: float, high: float, count: int = 5, *, integers: bool = False) -> list[float]:
    """About ``count`` round numbers between two values; ``integers``: as steps are."""
    raw = max((high - low) / count, 1.0 if integers else 0.0)
    power = 10.0 ** math.floor(math.log10(raw))
    multiples = (1, 2, 5, 10) if integers else (1, 2, 2.5, 5, 10)
    step = next(power * m for m in multiples if power * m >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [n * step for n in range(first, math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Round numbers between two positive values, a few a decade."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for parts in ((1,), (1, 3), (1, 2, 5)):
        inside = [p * 10.0**n for n in powers for p in parts if low <= p * 10.0**n <= high]
        if len(inside) >= 3:
            return inside[:: max(1, len(inside) // 5)]
    return ticks(low, high)


def thinned(series: Series) -> tuple[Series, Series]:
    """A long curve in few points: its extremes, which are drawn, and its means, which are smoothed."""
    if len(series) <= POINTS:
        return series, series
    means = series.block_means(POINTS // 2)
    finite = [block[np.isfinite(block)] for block in np.array_split(series.values, POINTS // 2)]
    ends = np.array([(b.min(), b.max()) if len(b) else (np.nan, np.nan) for b in finite])
    # Up and down in turn: one stroke through all extremes instead of a comb.
    ends[1::2] = ends[1::2, ::-1]
    return Series(np.repeat(means.steps, 2), ends.reshape(-1)), means


def path(axes: Axes, series: Series) -> str:
    """The ``d`` of an SVG path; it breaks where a value is not finite."""
    pieces, drawing = [], False
    finite = np.isfinite(series.values).tolist()
    for x, y, known in zip(axes.across(series.steps), axes.up(series.values), finite, strict=True):
        if known:
            pieces.append(f"{'L' if drawing else 'M'}{x:.1f} {y:.1f}")
        drawing = known
    return "".join(pieces)


def draw(figure: Figure, key: str) -> Html:
    """The figure as an ``<svg>`` with a title and a description; ``key``: makes its ids unique in the page."""
    axes = axes_of(figure)
    clip = tag("rect", x=LEFT, y=TOP - 4, width=RIGHT - LEFT, height=BOTTOM - TOP + 4)
    taken: list[float] = []
    return picture(
        key,
        figure.chart.title,
        figure.reading.line(),
        tag("clipPath", clip, id=f"{key}-c"),
        *_band(axes, figure),
        *rows(axes),
        *_columns(axes, figure),
        tag("g", *(_curve(axes, trace, figure) for trace in figure.traces), clip_path=f"url(#{key}-c)"),
        *(_level(axes, level, taken) for level in figure.levels),
        *_outside(axes, figure),
        tag("g", class_="cursor"),
    )


def picture(key: str, title: str, description: str, *children: str) -> Html:
    """An ``<svg>`` of a plot's size."""
    named = (tag("title", title, id=f"{key}-t"), tag("desc", description, id=f"{key}-d"))
    view = f"0 0 {WIDTH} {HEIGHT}"
    return tag("svg", *named, *children, viewBox=view, role="img", aria_labelledby=f"{key}-t {key}-d")


def _band(axes: Axes, figure: Figure) -> list[Html]:
    if figure.chart.band is None:
        return []
    bottom, top = (float(axes.up(edge)) for edge in figure.chart.band)
    shade = tag("rect", class_="band", x=LEFT, y=top, width=RIGHT - LEFT, height=max(1.0, bottom - top))
    return [shade, tag("text", "healthy", class_="mark", x=LEFT + 6, y=max(TOP + 10.0, top + 14))]


def rows(axes: Axes) -> list[Html]:
    """Lines of the vertical axis with their values."""
    values, drawn = log_ticks(*axes.y) if axes.log else ticks(*axes.y), []
    labels = [tick_labels([value])[0] for value in values] if axes.log else tick_labels(values)
    for value, label in zip(values, labels, strict=True):
        y = float(axes.up(value))
        drawn.append(tag("path", class_="grid", d=f"M{LEFT} {y:.1f}H{RIGHT}"))
        drawn.append(tag("text", label, class_="tick", x=LEFT - 8, y=y + 4, text_anchor="end"))
    return drawn


def axis_name(name: str) -> Html:
    """The name of the horizontal axis, under its values."""
    return tag("text", name, class_="tick", x=(LEFT + RIGHT) / 2, y=HEIGHT - 6, text_anchor="middle")


def _columns(axes: Axes, figure: Figure) -> list[Html]:
    places = np.concatenate([trace.series.finite.steps for trace in figure.traces])
    first, last = float(places.min()), float(places.max())
    values = ticks(first, last, integers=figure.x_label == "step") if last > first else [first]
    drawn = []
    for value, label in zip(values, tick_labels(values), strict=True):
        # A number at the right edge would be cut off.
        x = min(float(axes.across(value)), RIGHT + 0.0)
        side = "end" if x + LETTER * len(label) / 2 > WIDTH else "middle"
        drawn.append(tag("text", label, class_="tick", x=x, y=BOTTOM + 20, text_anchor=side))
    return [*drawn, axis_name(figure.x_label)]


def _outside(axes: Axes, figure: Figure) -> list[Html]:
    """Says how far curves go that leave the picture."""
    values = np.concatenate([trace.series.finite.values for trace in figure.traces])
    x, marks = LEFT + 0.3 * (RIGHT - LEFT), []
    if figure.chart.band is None and values.max() > axes.y[1]:
        marks.append(tag("text", f"↑ up to {number(float(values.max()))}", class_="mark", x=x, y=TOP + 10))
    if values.min() < axes.y[0]:
        marks.append(tag("text", f"↓ down to {number(float(values.min()))}", class_="mark", x=x, y=BOTTOM - 6))
    return marks


def _curve(axes: Axes, trace: Trace, figure: Figure) -> Html:
    style = style_of(trace)
    if trace.points:
        series = trace.series.finite
        places = zip(axes.across(series.steps), axes.up(series.values), strict=True)
        dots = [tag("circle", cx=float(x), cy=float(y), r=3.2) for x, y in places] if len(series) <= 120 else []
        # Over another metric the values go to and fro: a line in the order of time would cross itself.
        line = [] if figure.chart.against and dots else [tag("path", d=path(axes, series))]
        return tag("g", *line, *dots, class_=f"evals {style}")
    extremes, means = thinned(trace.series)
    alone = trace.series.finite if len(trace.series.finite) == 1 else None  # a line of one point is nothing
    x, y = (0.0, 0.0) if alone is None else (float(axes.across(alone.steps[0])), float(axes.up(alone.values[0])))
    dot = [] if alone is None else [tag("circle", cx=x, cy=y, r=3.2, class_=style)]
    if trace.exact:
        return markup(tag("path", class_=f"exact {style}", d=path(axes, means)), *dot)
    raw = tag("path", class_=f"raw {style}", d=path(axes, extremes))
    return markup(raw, tag("path", class_=f"smooth {style}"), *dot)


def style_of(trace: Trace) -> str:
    """Classes of a curve: colour and dashes."""
    return f"s{trace.style % STYLES} d{trace.style % DASHES}"


def _level(axes: Axes, level: Level, taken: list[float]) -> Html:
    y, best = float(axes.up(level.value or 0.0)), level.kind is LevelKind.optimum
    # Away from the curves: below an optimum at the bottom, else above, and never over another label.
    places = (y + 15, y - 6) if best and y > BOTTOM - 45 else (y - 6, y + 15)
    free = (p for p in places if TOP + 6 < p < BOTTOM and all(abs(p - other) > 14 for other in taken))
    taken.append(next(free, y - 6))
    line = tag("path", class_=f"level {'optimum' if best else 'reference'}", d=f"M{LEFT} {y:.1f}H{RIGHT}")
    return markup(line, tag("text", level.label, class_="mark", x=RIGHT - 4, y=taken[-1], text_anchor="end"))


def tick_labels(values: Sequence[float]) -> list[str]:
    """Ticks as short as they can be while they differ."""
    size = max((abs(v) for v in values), default=0.0)
    unit, letter = next(((u, c) for u, c in ((1e9, "G"), (1e6, "M"), (1e3, "k")) if size >= max(u, 1e4)), (1.0, ""))
    kind = "e" if 0 < size < 1e-3 else "f"
    texts: list[str] = []
    for places in range(8):
        texts = [f"{value / unit:.{places}{kind}}" for value in values]
        if all(abs(float(text) * unit - value) <= 1e-6 * size for text, value in zip(texts, values, strict=True)):
            break
    return [text.replace("e-0", "e-") + letter if float(text) else "0" for text in texts]


def data(figure: Figure) -> Html:
    """What page.js needs of a figure, as JSON that may stand inside a ``<script>``."""
    axes = axes_of(figure)
    traces = []
    for trace in figure.traces:
        means = trace.series.finite if trace.points else thinned(trace.series)[1].finite
        fixed = trace.points or trace.exact
        traces.append({"label": trace.label, "points": fixed, "x": _short(means.steps), "y": _short(means.values)})
    box = [LEFT, TOP, RIGHT, BOTTOM]
    facts = {"x": axes.x, "y": axes.y, "log": axes.log, "box": box, "xLabel": figure.x_label, "traces": traces}
    return Html(json.dumps(facts, separators=(",", ":")).replace("<", "\\u003c"))


def _short(values: Floats) -> list[float]:
    return [int(v) if v == int(v) and abs(v) < 1e15 else float(f"{v:.5g}") for v in values.tolist()]
