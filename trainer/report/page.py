"""A report as one HTML file: no network, light and dark, from a phone to a wide screen, by mouse and by keyboard."""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from pathlib import Path

from trainer.report.curves import Figure, data, draw, style_of
from trainer.report.html import Html, anchor, details, markup, number, tag
from trainer.report.readings import Trace
from trainer.report.tables import table
from trainer.report.verdict import Line

HERE = Path(__file__).parent
MARKS = {"good": "✓ good", "note": "· note", "watch": "! look", "bad": "✕ failed"}


def page(title: str, top: Html, parts: Mapping[str, Html]) -> str:
    """The whole document. ``top``: what comes first; ``parts``: sections by heading, empty ones are left out."""
    parts = {name: body for name, body in parts.items() if body}
    links = markup(*(tag("a", name, href=f"#{anchor(name)}") for name in parts))
    sections = []
    for name, body in parts.items():
        heading = tag("h2", name, id=f"{anchor(name)}-h")
        sections.append(tag("section", heading, body, id=anchor(name), aria_labelledby=f"{anchor(name)}-h"))
    when = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
{tag("title", f"{title} · Onecurve")}<link rel="icon" href="data:,">
<style>{(HERE / "page.css").read_text()}</style></head>
<body><a class="skip" href="#content">Skip to the content</a>
<div class="bar"><div><nav aria-label="Sections">{links}</nav><div class="tools">
<label for="smoothing">Smoothing <input id="smoothing" type="range" min="0" max="20" step="0.5" value="2"></label>
<output id="smoothed" for="smoothing">2%</output><button id="theme" type="button">Dark</button></div></div></div>
<header class="top">{top}</header>
<main id="content" tabindex="-1">{markup(*sections)}</main>
<footer>Written by Onecurve on {when}. One file, no network: it can be sent as it is.</footer>
<script>{(HERE / "page.js").read_text()}</script></body></html>
"""


def opening(title: str, headline: str, lines: Sequence[Line], tiles: Mapping[str, str]) -> Html:
    """Name, result in a sentence, statements, and a few figures."""
    shown = [tag("div", tag("dt", name), tag("dd", value)) for name, value in tiles.items()]
    top = markup(tag("h1", title), tag("p", headline, class_="headline"), statements(lines))
    return markup(top, tag("dl", *shown, class_="tiles")) if shown else top


def statements(lines: Sequence[Line]) -> Html:
    """Lines of a verdict as a list."""
    items = [
        tag("li", tag("span", MARKS[line.state], class_=f"state {line.state}"), tag("span", line.text))
        for line in lines
    ]
    return tag("ul", *items, class_="verdict")


def plots(drawn: Sequence[Figure], prefix: str = "", kind: str = "plots", more: Sequence[Html] = ()) -> Html:
    """Plots in a grid. ``prefix``: of ids, where the page has several runs; ``more``: further plots behind them."""
    shown = [*(plot(figure, prefix) for figure in drawn), *more]
    return tag("div", *shown, class_=kind) if shown else Html()


def plot(figure: Figure, prefix: str = "") -> Html:
    """A plot with its title, reading, legend and numbers."""
    chart, key = figure.chart, f"{prefix}{figure.chart.id}"
    hint = [tag("p", chart.hint, class_="hint")] if chart.hint else []
    return tag(
        "figure",
        tag("figcaption", tag("h3", chart.heading), tag("p", figure.reading.line(), class_="reading"), *hint),
        legend(figure.traces),
        tag("div", draw(figure, key), class_="plot"),
        tag("output", class_="values"),
        details("Numbers", some_values(figure)),
        tag("script", data(figure), type="application/json"),
        data_plot=True,
        id=key,
    )


def legend(traces: Sequence[Trace]) -> Html:
    """Names of curves with their line as it is drawn; nothing where there is one curve."""
    if len(traces) < 2:
        return Html()
    items = []
    for trace in traces:
        line = tag("path", class_=f"smooth {style_of(trace)}", d="M1 5H29")
        if trace.points:
            line = tag("path", d="M1 5H29")
            line = tag("g", line, tag("circle", cx=15, cy=5, r=3.2), class_=f"evals {style_of(trace)}")
        items.append(tag("li", tag("svg", line, viewBox="0 0 30 10", aria_hidden="true"), trace.label))
    return tag("ul", *items, class_="legend", aria_label="Curves")


def some_values(figure: Figure, rows: int = 9) -> Html:
    """A few values of every curve as a table: what the picture shows, for those who do not see it."""
    cells: list[list[str]] = []
    for trace in figure.traces:
        series = trace.series.finite
        last = len(series) - 1
        for n in sorted({round(i * last / max(1, rows - 1)) for i in range(min(rows, last + 1))}):
            cells.append([trace.label, number(float(series.steps[n])), number(float(series.values[n]))])
    return table(f"{figure.chart.title}: some values", ["Curve", figure.x_label, "Value"], cells, numbers=(1, 2))
