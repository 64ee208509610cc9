"""The plots of a run: the curves of its metrics, with levels, ranges and a reading of each."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from trainer.report.catalogue import (
    CHARTS,
    FURTHER,
    HELD_OUT,
    HIDDEN,
    POLICY,
    SECTIONS,
    UNDERSTOOD,
    Better,
    Chart,
    Manner,
)
from trainer.report.curves import Figure, Level, Trace
from trainer.report.readings import capital, read_off, way_of
from trainer.report.recording import Recording, Series


@dataclass(frozen=True)
class Drawn:
    """A chart with its figure."""

    chart: Chart
    figure: Figure


def drawn(run: Recording) -> list[Drawn]:
    """Every plot that the run has numbers for; metrics that no chart knows come last, each in a plot of its own."""
    found = []
    for chart in [*suited(run), *_further(run)]:
        traces = _traces(run, chart)
        names = {n for n in chart.metrics if n in run.series or held_out(n) in run.series}
        if not traces or (chart.title == "Gold against proxy" and len(names) < 2):
            continue
        if chart.title == "Skipped steps" and not traces[0].series.finite.values.any():
            continue
        levels = list(_levels(run, chart))
        steady = chart.manner is Manner.steady
        said = (
            way_of(traces) if chart.against else read_off(traces, levels, chart.band, chart.better.value, steady=steady)
        )
        label = "KL from the reference" if chart.against else "step"
        falls = chart.better is Better.lower
        figure = Figure(
            chart.key, chart.title, traces, capital(said), chart.hint, levels, chart.band, chart.log, falls, label
        )
        found.append(Drawn(chart, figure))
    return found


def suited(run: Recording) -> list[Chart]:
    """The charts as they are meant for a run."""
    if UNDERSTOOD not in run.series:
        return list(CHARTS)
    plain: dict[str, Any] = {
        "section": POLICY,
        "better": Better.neither,
        "weight": 0,
        "hint": "Policy, value and entropy terms together.",
    }
    return [dataclasses.replace(chart, **plain) if "loss" in chart.metrics else chart for chart in CHARTS]


def held_out(name: str) -> str:
    """What a metric is called on held-out data."""
    return HELD_OUT.get(name, f"eval/{name.removeprefix('objective/')}")


def _traces(run: Recording, chart: Chart) -> list[Trace]:
    traces: list[Trace] = []
    for name, label in chart.metrics.items():
        style = len({t.style for t in traces})
        # Two metrics of a chart may be called alike on held-out data; it is then that of the one that was logged.
        names = (name, held_out(name)) if name in run.series or held_out(name) == f"eval/{name}" else ()
        known = [n for n in names if n in run.series and len(run.series[n].finite)]
        if chart.against:
            over = run.series.get(chart.against)
            if over is not None and name in run.series:
                traces.append(Trace(label, paired(over, run.series[name]), style, points=True))
            continue
        for key in known:
            held = key.startswith("eval/")
            several = len(chart.metrics) > 1 and label != "training"
            words = label if not held else f"{label}, held out" if several else "held out"
            traces.append(
                Trace(
                    words,
                    run.series[key],
                    style + (0 if several else held),
                    points=held,
                    exact=chart.manner is Manner.exact,
                )
            )
    return [t for t in traces if len(t.series.finite)]


def paired(over: Series, series: Series) -> Series:
    """A metric over another one: means of up to 60 stretches of steps, in their order, against the noise."""
    _steps, a, b = np.intersect1d(over.steps, series.steps, return_indices=True)
    x, y = over.values[a], series.values[b]
    keep = np.isfinite(x) & np.isfinite(y)
    x, y = x[keep], y[keep]
    parts = np.array_split(np.arange(len(x)), min(60, len(x))) if len(x) else []
    return Series(np.array([x[p].mean() for p in parts]), np.array([y[p].mean() for p in parts]))


def _levels(run: Recording, chart: Chart) -> Iterator[Level]:
    floors = run.facts.get("floors") or {}
    for name in chart.metrics:
        floor = floors.get(held_out(name), floors.get(name))
        if isinstance(floor, int | float):
            label = "entropy of the language" if name in ("loss", "bits_per_byte") else "known optimum"
            yield Level(float(floor), f"{label} {floor:.4g}", optimum=True)
    for levels in chart.levels:
        yield from levels(run)


def _further(run: Recording) -> Iterator[Chart]:
    known = {name for chart in CHARTS for name in chart.metrics} | set(HIDDEN)
    known |= {held_out(name).removeprefix("eval/") for name in known}
    names: dict[str, None] = {}
    for name in run.series:
        plain = name.removeprefix("eval/")
        if plain not in known and not name.startswith("time/"):
            names[plain] = None
    for name in names:
        yield Chart(FURTHER, name, {name: "training"})


def sections(found: Sequence[Drawn]) -> dict[str, list[Drawn]]:
    """Plots by section, in the order of the sections."""
    by_name: dict[str, list[Drawn]] = {name: [] for name in SECTIONS}
    for one in found:
        by_name[one.chart.section].append(one)
    return {name: group for name, group in by_name.items() if group}
