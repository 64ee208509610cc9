"""How a metric is distributed over held-out examples, at the beginning and at the end."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

from trainer.report.curves import BOTTOM, LEFT, RIGHT, TOP, picture, ticks
from trainer.report.html import Html, number, tag
from trainer.report.recording import Recording


def histograms(run: Recording, prefix: str = "") -> list[Html]:
    """A plot for every metric with a histogram. ``prefix``: of ids, where the page has several runs."""
    by_name: dict[str, list[dict[str, Any]]] = {}
    for row in run.histograms:
        edges, counts = row.get("edges"), row.get("counts")
        if isinstance(edges, list) and isinstance(counts, list) and len(edges) == len(counts) + 1 and sum(counts) > 0:
            by_name.setdefault(str(row.get("name")), []).append(row)
    return [_figure(name, rows, f"{prefix}spread-{n}") for n, (name, rows) in enumerate(by_name.items())]


def above_zero(row: dict[str, Any]) -> float:
    """The share of examples above 0, those of the bin around it in proportion."""
    part = 0.0
    for (low, high), count in zip(pairwise(row["edges"]), row["counts"], strict=True):
        part += count * (1.0 if low >= 0 else 0.0 if high <= 0 else high / (high - low))
    return float(part / sum(row["counts"]))


def _above(row: dict[str, Any]) -> str:
    """The same in words; in a single bin around 0 nobody knows on which side the examples are."""
    alike = sum(1 for count in row["counts"] if count) == 1 and row["edges"][0] < 0 < row["edges"][-1]
    return "all alike" if alike else f"{above_zero(row):.0%}"


def _figure(name: str, rows: list[dict[str, Any]], key: str) -> Html:
    first, last = rows[0], rows[-1]
    several = first["step"] != last["step"]
    title = f"Distribution of {name.removeprefix('eval/')}, held out"
    reading = f"{_above(last)} of {sum(last['counts']):,} units above 0 at step {last['step']}"
    reading += f"; {_above(first)} at step {first['step']}" if several else ""
    shown = [(first, "hist s1"), (last, "hist s0")] if several else [(last, "hist s0")]
    low, high = min(row["edges"][0] for row, _ in shown), max(row["edges"][-1] for row, _ in shown)
    high = high if high > low else low + 1

    def across(value: float) -> float:
        return float(LEFT + (value - low) / (high - low) * (RIGHT - LEFT))

    drawn = [
        tag("text", number(round(v, 9)), class_="tick", x=across(v), y=BOTTOM + 20, text_anchor="middle")
        for v in ticks(low, high, 6)
    ]
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
