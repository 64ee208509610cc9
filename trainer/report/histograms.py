"""How a metric is distributed over held-out examples, at the beginning and at the end."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

from trainer.report.curves import BOTTOM, LEFT, RIGHT, TOP, axis_name, picture, tick_labels, ticks
from trainer.report.html import Html, tag
from trainer.report.recording import Recording


def histograms(run: Recording, prefix: str = "") -> list[Html]:
    """A plot for every metric with a histogram. ``prefix``: of ids, where the page has several runs."""
    by_name: dict[str, list[dict[str, Any]]] = {}
    for row in run.histograms:
        edges, counts = row.get("edges"), row.get("counts")
        if isinstance(edges, list) and isinstance(counts, list) and len(edges) == len(counts) + 1 and sum(counts) > 0:
            by_name.setdefault(str(row.get("name")), []).append(row)
    return [_figure(name, rows, f"{prefix}spread-{n}") for n, (name, rows) in enumerate(by_name.items())]


def reading_of(first: dict[str, Any], last: dict[str, Any]) -> str:
    """How many examples are above 0, at the end and at the beginning, where the run counted them."""
    counted = [
        f"{row['positive']:,} of {sum(row['counts']):,} above 0 at step {row['step']}"
        for row in ([last, first] if first["step"] != last["step"] else [last])
        if isinstance(row.get("positive"), int)
    ]
    return "; ".join(counted) or f"{sum(last['counts']):,} examples at step {last['step']}"


def _figure(name: str, rows: list[dict[str, Any]], key: str) -> Html:
    first, last = rows[0], rows[-1]
    several = first["step"] != last["step"]
    title = f"Distribution of {name.removeprefix('eval/')}, held out"
    reading = reading_of(first, last)
    shown = [(first, "hist s1"), (last, "hist s0")] if several else [(last, "hist s0")]
    low, high = min(row["edges"][0] for row, _ in shown), max(row["edges"][-1] for row, _ in shown)
    high = high if high > low else low + 1

    def across(value: float) -> float:
        return float(LEFT + (value - low) / (high - low) * (RIGHT - LEFT))

    values = ticks(low, high, 6)
    drawn = [
        tag("text", label, class_="tick", x=across(v), y=BOTTOM + 20, text_anchor="middle")
        for v, label in zip(values, tick_labels(values), strict=True)
    ]
    drawn.append(axis_name(name.removeprefix("eval/")))
    drawn += [tag("path", class_=style, d="".join(_outline(row, across))) for row, style in shown]
    if low < 0 < high:
        drawn.append(tag("path", class_="level reference", d=f"M{across(0):.1f} {TOP}V{BOTTOM}"))
    drawn.append(tag("path", class_="grid", d=f"M{LEFT} {BOTTOM}H{RIGHT}"))
    legend = []
    for row, style in shown:
        swatch = tag("rect", class_=style, width=30, height=10)
        legend.append(tag("li", tag("svg", swatch, viewBox="0 0 30 10", aria_hidden="true"), f"step {row['step']}"))
    return tag(
        "figure",
        tag("figcaption", tag("h3", title), tag("p", reading, class_="reading")),
        tag("ul", *legend, class_="legend", aria_label="Moments"),
        tag("div", picture(key, title, reading, *drawn), class_="plot"),
        id=key,
    )


def _outline(row: dict[str, Any], across: Callable[[float], float]) -> Iterator[str]:
    """The path of a histogram: densities, so that wide and narrow bins compare, drawn to its own highest."""
    densities = [count / max(1e-12, b - a) for (a, b), count in zip(pairwise(row["edges"]), row["counts"], strict=True)]
    yield f"M{across(row['edges'][0]):.1f} {BOTTOM}"
    for edge, density in zip(row["edges"][1:], densities, strict=True):
        yield f"V{BOTTOM - density / max(densities) * (BOTTOM - TOP):.1f}H{across(edge):.1f}"
    yield f"V{BOTTOM}Z"
