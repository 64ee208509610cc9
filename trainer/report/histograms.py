"""How a metric's values are spread over held-out units, at the beginning and at the end."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from itertools import pairwise
from typing import Any

from trainer.report.curves import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, number, ticks
from trainer.report.recording import Recording


def histograms(run: Recording, prefix: str = "") -> str:
    """A figure for every metric whose spread was measured; empty where there is none."""
    by_name: dict[str, list[dict[str, Any]]] = {}
    for line in run.histograms:
        edges, counts = line.get("edges"), line.get("counts")
        if isinstance(edges, list) and isinstance(counts, list) and len(edges) == len(counts) + 1 and sum(counts) > 0:
            by_name.setdefault(str(line.get("name")), []).append(line)
    return "".join(_figure(name, lines, f"{prefix}spread-{n}") for n, (name, lines) in enumerate(by_name.items()))


def above_zero(line: dict[str, Any]) -> float:
    """The share of units above 0, those of the bin around it in proportion."""
    total = sum(line["counts"])
    part = 0.0
    for (low, high), count in zip(pairwise(line["edges"]), line["counts"], strict=True):
        part += count * (1.0 if low >= 0 else 0.0 if high <= 0 else high / (high - low))
    return float(part / total)


def above(line: dict[str, Any]) -> str:
    """The same in words; in a single bin around 0 nobody knows on which side the units are."""
    alike = sum(1 for count in line["counts"] if count) == 1 and line["edges"][0] < 0 < line["edges"][-1]
    return "all alike" if alike else f"{above_zero(line):.0%}"


def _figure(name: str, lines: list[dict[str, Any]], key: str) -> str:
    first, last = lines[0], lines[-1]
    several = first["step"] != last["step"]
    title = f"Spread of {name.removeprefix('eval/')}, held out"
    reading = f"{above(last)} of {sum(last['counts']):,} units above 0 at step {last['step']}"
    reading += f"; {above(first)} at step {first['step']}" if several else ""
    shown = [first, last] if several else [last]
    low, high = min(line["edges"][0] for line in shown), max(line["edges"][-1] for line in shown)
    high = high if high > low else low + 1
    width, base = WIDTH - LEFT - RIGHT, HEIGHT - BOTTOM

    def across(value: float) -> float:
        return float(LEFT + (value - low) / (high - low) * width)

    # Density, so that wide and narrow bins compare; each drawn to its own highest.
    out = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-labelledby="{key}-t {key}-d"><title id="{key}-t">'
        f'{escape(title)}</title><desc id="{key}-d">{escape(reading)}</desc>'
    ]
    for value in ticks(low, high, 6):
        said = number(round(value, 9))
        out.append(f'<text class="tick" x="{across(value):.1f}" y="{base + 20}" text-anchor="middle">{said}</text>')
    for n, line in enumerate(shown):
        out.append(f'<path class="hist s{1 - n if several else 0}" d="{"".join(_outline(line, across, base))}"/>')
    if low < 0 < high:
        out.append(f'<path class="level reference" d="M{across(0):.1f} {TOP}V{base}"/>')
    out.append(f'<path class="grid" d="M{LEFT} {base}H{WIDTH - RIGHT}"/></svg>')
    items = "".join(
        f'<li><svg viewBox="0 0 30 10" aria-hidden="true">'
        f'<rect class="hist s{1 - n if several else 0}" width="30" height="10"/>'
        f"</svg>step {escape(str(line['step']))}</li>"
        for n, line in enumerate(shown)
    )
    return (
        f'<figure id="{key}"><figcaption><h3>{escape(title)}</h3><p class="reading">{escape(reading)}</p></figcaption>'
        f'<ul class="legend" aria-label="Moments">{items}</ul><div class="plot">{"".join(out)}</div></figure>'
    )


def _outline(line: dict[str, Any], across: Any, base: float) -> Iterator[str]:
    top = max(c / max(1e-12, b - a) for (a, b), c in zip(pairwise(line["edges"]), line["counts"], strict=True))
    yield f"M{across(line['edges'][0]):.1f} {base}"
    for (low, high), count in zip(pairwise(line["edges"]), line["counts"], strict=True):
        y = base - count / max(1e-12, high - low) / top * (base - TOP)
        yield f"V{y:.1f}H{across(high):.1f}"
    yield f"V{base}Z"
