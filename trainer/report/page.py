"""A report as one HTML file: no network, light and dark, from a phone to a wide screen, by mouse and by keyboard."""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from trainer.report.charts import Drawn
from trainer.report.curves import DASHES, STYLES, Figure, Trace, data, draw, number
from trainer.report.tables import table
from trainer.report.verdict import Line

HERE = Path(__file__).parent
WORDS = {"good": "✓ good", "note": "· note", "watch": "! look", "bad": "✕ failed"}


def page(title: str, top: str, parts: Mapping[str, str]) -> str:
    """The whole document. ``top``: what comes first; ``parts``: sections by heading, empty ones are left out."""
    shown = {name: body for name, body in parts.items() if body}
    links = "".join(f'<a href="#{anchor(name)}">{escape(name)}</a>' for name in shown)
    sections = "".join(
        f'<section id="{anchor(name)}" aria-labelledby="{anchor(name)}-h"><h2 id="{anchor(name)}-h">{escape(name)}</h2>'
        f"{body}</section>"
        for name, body in shown.items()
    )
    when = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)} · Onecurve</title><link rel="icon" href="data:,">
<style>{(HERE / "page.css").read_text()}</style></head>
<body><a class="skip" href="#content">Skip to the content</a>
<div class="bar"><div><nav aria-label="Sections">{links}</nav><div class="tools">
<label for="smoothing">Smoothing <input id="smoothing" type="range" min="0" max="20" step="0.5" value="2"></label>
<output id="smoothed" for="smoothing">2%</output><button id="theme" type="button">Dark</button></div></div></div>
<header class="top">{top}</header>
<main id="content" tabindex="-1">{sections}</main>
<footer>Written by Onecurve on {when}. One file, no network: it can be sent as it is.</footer>
<script>{(HERE / "page.js").read_text()}</script></body></html>
"""


def anchor(name: str) -> str:
    """A heading as an id."""
    return "".join(c if c.isascii() and c.isalnum() else "-" for c in name.lower())


def opening(title: str, headline: str, lines: Sequence[Line], tiles: Mapping[str, str]) -> str:
    """Name, result in a sentence, statements, and a few figures."""
    shown = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in tiles.items())
    return f'<h1>{escape(title)}</h1><p class="headline">{escape(headline)}</p>{statements(lines)}' + (
        f'<dl class="tiles">{shown}</dl>' if shown else ""
    )


def statements(lines: Sequence[Line]) -> str:
    """Lines of a verdict as a list."""
    said = "".join(
        f'<li><span class="state {line.state}">{WORDS[line.state]}</span><span>{escape(line.text)}</span></li>'
        for line in lines
    )
    return f'<ul class="verdict">{said}</ul>'


def plots(found: Sequence[Drawn], prefix: str = "", kind: str = "plots") -> str:
    """Plots in a grid."""
    return f'<div class="{kind}">' + "".join(plot(d.figure, prefix) for d in found) + "</div>" if found else ""


def plot(figure: Figure, prefix: str = "") -> str:
    """A plot with its title, reading, legend and numbers; empty where it has no finite value."""
    figure = dataclasses.replace(figure, key=f"{prefix}{figure.key}")
    picture = draw(figure)
    if not picture:
        return ""
    hint = f'<p class="hint">{escape(figure.hint)}</p>' if figure.hint else ""
    return (
        f'<figure data-plot id="{escape(figure.key)}"><figcaption><h3>{escape(figure.title)}</h3>'
        f'<p class="reading">{escape(figure.reading)}</p>{hint}</figcaption>{legend(figure.traces)}'
        f'<div class="plot">{picture}</div><output class="values"></output>'
        f"<details><summary>Numbers</summary>{numbers(figure)}</details>"
        f'<script type="application/json">{data(figure)}</script></figure>'
    )


def style(number: int) -> str:
    """Classes of a curve: colour and dashes."""
    return f"s{number % STYLES} d{number % DASHES}"


def legend(traces: Sequence[Trace]) -> str:
    """Names of curves with their line as it is drawn; nothing where there is one curve."""
    if len(traces) < 2:
        return ""
    items = ""
    for trace in traces:
        look = style(trace.style)
        line = (
            f'<g class="evals {look}"><path d="M1 5H29"/><circle cx="15" cy="5" r="3.2"/></g>'
            if trace.points
            else f'<path class="smooth {look}" d="M1 5H29"/>'
        )
        items += f'<li><svg viewBox="0 0 30 10" aria-hidden="true">{line}</svg>{escape(trace.label)}</li>'
    return f'<ul class="legend" aria-label="Curves">{items}</ul>'


def numbers(figure: Figure, rows: int = 9) -> str:
    """A few values of every curve as a table: what the picture shows, for those who do not see it."""
    cells = []
    for trace in figure.traces:
        series = trace.series.finite
        count = len(series)
        for n in sorted({round(i * (count - 1) / max(1, rows - 1)) for i in range(min(rows, count))}):
            cells.append([escape(trace.label), number(float(series.steps[n])), number(float(series.values[n]))])
    return table(f"{figure.title}: some values", ["Curve", figure.x_label, "Value"], cells, numbers=(1, 2))
