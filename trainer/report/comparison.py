"""Several runs in one report: their curves over each other, their last values, and what they were told differently."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from html import escape
from pathlib import Path

from trainer.report.catalogue import Better, Chart, Manner
from trainer.report.charts import Drawn, drawn, held_out, sections, suited
from trainer.report.curves import Figure, Level, Trace, number
from trainer.report.page import opening, page, plots
from trainer.report.readings import settled
from trainer.report.recording import Recording
from trainer.report.tables import differing, last_answers, side_by_side, table
from trainer.report.verdict import Line, State


def comparison(runs: Sequence[Recording], title: str) -> str:
    """The page of several runs."""
    found = overlaid(runs)
    parts = {"Last values": finals(runs, found), "Settings": differing(runs)}
    # Raw values of many runs would hide each other.
    many = "plots many" if len(runs) > 3 else "plots"
    parts |= {name: plots(group, kind=many) for name, group in sections(found).items()}
    stages = [run.name for run in runs]
    parts["Answers"] = side_by_side(last_answers(runs), stages, "The same prompt, answered by each run's last model")
    headline, lines = _said(runs, found)
    return page(title, opening(title, headline, lines, {}), parts)


def overlaid(runs: Sequence[Recording]) -> list[Drawn]:
    """A plot for every metric that at least one run has, all runs in it."""
    every = {name: run for run in runs for name in run.series}
    known: dict[str, Chart] = {}
    for run in runs:
        known |= {chart.title: chart for chart in suited(run)}
    for run in runs:
        for one in drawn(run):
            known.setdefault(one.chart.title, one.chart)
    found = []
    for chart in known.values():
        if chart.against or chart.title == "Gold against proxy":
            continue
        for name, label in _metrics(chart, every).items():
            evaluated = name.startswith("eval/")
            traces = [
                Trace(run.name, run.series[name], n, points=evaluated, exact=chart.manner is Manner.exact)
                for n, run in enumerate(runs)
                if name in run.series and len(run.series[name].finite)
            ]
            if not traces or (name == "skipped" and not any(t.series.finite.values.any() for t in traces)):
                continue
            alone = Chart(chart.section, label, {name: label}, chart.better, weight=chart.weight)
            falls = chart.better is Better.lower
            read = _best(traces, chart.better)
            levels = _shared(runs, name, chart)
            found.append(Drawn(alone, Figure(alone.key, label, traces, read, "", levels, chart.band, chart.log, falls)))
    return found


def _metrics(chart: Chart, known: Collection[str]) -> dict[str, str]:
    """The metrics of a chart that are known, held-out ones first, each with a title of its own."""
    titles = {}
    for name, label in chart.metrics.items():
        part = f": {label}" if len(chart.metrics) > 1 and label != "training" else ""
        for key, where in ((held_out(name), ", held out"), (name, "")):
            if key in known:
                titles[key] = f"{chart.title}{part}{where}"
    return titles


def _shared(runs: Sequence[Recording], name: str, chart: Chart) -> list[Level]:
    """Levels that are the same for all runs."""
    plain = name.removeprefix("eval/")
    floors = {(run.facts.get("floors") or {}).get(f"eval/{plain}") for run in runs}
    levels = [Level(float(f), f"best possible {f:.4g}", optimum=True) for f in floors if isinstance(f, int | float)]
    levels = levels if len(floors) == 1 else []
    for make in chart.levels:
        each = {tuple((v.value, v.label, v.optimum) for v in make(run)) for run in runs}
        if len(each) == 1:
            levels += [Level(*values) for values in next(iter(each))]
    return levels


def _best(traces: Sequence[Trace], better: Better) -> str:
    """Which run is ahead, and by how much."""
    values = {t.label: settled(t) for t in traces}
    if len(values) < 2 or better is Better.neither:
        return ", ".join(f"{name} {number(value)}" for name, value in list(values.items())[:4]) + (
            " …" if len(values) > 4 else ""
        )
    order = sorted(values, key=lambda name: -better.value * values[name])
    best, last = order[0], order[-1]
    if math.isclose(values[best], values[last], rel_tol=1e-9, abs_tol=1e-12):
        return f"All alike: {number(values[best])}"
    return f"Best: {best} with {number(values[best])}; last: {last} with {number(values[last])}"


def _said(runs: Sequence[Recording], found: Sequence[Drawn]) -> tuple[str, list[Line]]:
    """Headline and statements."""
    judged = [d for d in found if d.chart.better is not Better.neither]
    held = [d for d in judged if next(iter(d.chart.metrics)).startswith("eval/")] or judged
    best = max(held, key=lambda d: d.chart.weight, default=None)
    headline = (
        f"{best.chart.title}: {best.figure.reading[:1].lower()}{best.figure.reading[1:]}."
        if best
        else f"{len(runs)} runs, nothing measured yet."
    )
    lines = []
    for run in runs:
        if not run.series:
            lines.append(Line(State.watch, f"{run.name} has logged nothing."))
        elif not run.finished:
            lines.append(
                Line(
                    State.note,
                    f"{run.name} is not finished: step {run.last:,}{f' of {run.planned:,}' if run.planned else ''}.",
                )
            )
    if sum(1 for run in runs if run.finished) == len(runs):
        lines.append(Line(State.good, f"All {len(runs)} runs are finished."))
    return headline, lines


def finals(runs: Sequence[Recording], found: Sequence[Drawn]) -> str:
    """The last value of every metric of every run, the best one marked."""
    rows = []
    for d in (d for group in sections(found).values() for d in group):
        values = {t.label: settled(t) for t in d.figure.traces}
        best = (
            max(values, key=lambda name: d.chart.better.value * values[name])
            if d.chart.better is not Better.neither
            else None
        )
        cells = []
        for run in runs:
            value = number(values.get(run.name))
            several = len(set(values.values())) > 1
            cells.append(
                f'<strong>{value}</strong> <span aria-hidden="true">◂</span><span class="hidden">best</span>'
                if run.name == best and several
                else value
            )
        rows.append([escape(d.chart.title), *cells])
    columns = ["Metric", *(run.name for run in runs)]
    return table(
        "Last values; training metrics are means of the last steps, ◂ marks the best",
        columns,
        rows,
        numbers=range(1, len(columns)),
    )


def named(folders: Sequence[Path]) -> str:
    """A title for several runs."""
    names = [folder.resolve().name for folder in folders]
    return " · ".join(names) if len(names) <= 3 else f"{len(names)} runs: {names[0]} … {names[-1]}"
