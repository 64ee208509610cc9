"""Several runs in one report: their curves over each other, their last values, and the settings that differ."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

from trainer.report.catalogue import SECTIONS, Better, Chart, Curve, Level, LevelKind, held_out
from trainer.report.charts import by_section, charts_for, figures, is_hidden, levels_of
from trainer.report.curves import Figure
from trainer.report.html import Html, anchor, markup, number, tag
from trainer.report.page import opening, page, plots
from trainer.report.readings import Reading, Trace, settled
from trainer.report.recording import Recording
from trainer.report.sweeps import objective, varied
from trainer.report.tables import code, last_answers, plain, side_by_side, table
from trainer.report.verdict import Line, State, headline_figure


def comparison(runs: Sequence[Recording], title: str) -> str:
    """The page of several runs."""
    drawn = overlaid(runs)
    parts = {
        "Sweep": plots([], more=objective(runs)),
        "Last values": last_values(runs, drawn),
        "Settings": differing(runs),
    }
    # Raw values of many runs would hide each other.
    kind = "plots many" if len(runs) > 3 else "plots"
    parts |= {SECTIONS[section]: plots(group, kind=kind) for section, group in by_section(drawn).items()}
    names = [run.name for run in runs]
    parts["Answers"] = side_by_side(last_answers(runs), names, "The same prompt, answered by each run's last model")
    return page(title, opening(title, _headline(runs, drawn), list(_verdict(runs)), {}), parts)


def overlaid(runs: Sequence[Recording]) -> list[Figure]:
    """A plot for every metric that at least one run has, all runs in it."""
    charts: dict[str, Chart] = {}
    for run in runs:
        charts |= {chart.id: chart for chart in charts_for(run)}
    for run in runs:
        for figure in figures(run):
            charts.setdefault(figure.chart.id, figure.chart)
    return [figure for chart in charts.values() if chart.compare for figure in _figures_of(runs, chart)]


def _figures_of(runs: Sequence[Recording], chart: Chart) -> Iterator[Figure]:
    """A plot a metric of a chart, held-out ones first, each with a title of its own."""
    for metric, label in chart.metrics.items():
        part = f": {label}" if len(chart.metrics) > 1 and label != "training" else ""
        for name, where in ((held_out(metric), ", held out"), (metric, "")):
            evaluated, exact = name.startswith("eval/"), chart.curve is Curve.exact
            traces = [
                Trace(run.name, run.series[name], n, evaluated, exact, evaluated)
                for n, run in enumerate(runs)
                if name in run.series and len(run.series[name].finite)
            ]
            title = f"{chart.title}{part}{where}"
            if not traces or is_hidden(chart, traces):
                continue
            alone = dataclasses.replace(chart, id=anchor(title), title=title, metrics={name: label}, hint="")
            yield Figure(alone, traces, Reading(_ranking(traces, chart.better)), _shared_levels(runs, name, chart))


def _shared_levels(runs: Sequence[Recording], name: str, chart: Chart) -> list[Level]:
    """Levels that are the same for all runs."""
    floors = {run.floors.get(f"eval/{name.removeprefix('eval/')}") for run in runs}
    optimum = floors.pop() if len(floors) == 1 else None
    shared = [] if optimum is None else [Level(optimum, f"best possible {optimum:.4g}", LevelKind.optimum)]
    of_runs = [list(levels_of(run, chart)) for run in runs]
    return shared + [level for level in of_runs[0] if all(level in levels for levels in of_runs)]


def _ranking(traces: Sequence[Trace], better: Better) -> str:
    """Which run is ahead, and by how much."""
    values = {t.label: settled(t) for t in traces}
    if len(values) > 1 and better is not Better.neither and not _comparable(traces):
        shown = [f"{t.label} {number(values[t.label])} at step {t.series.finite.steps[-1]:,.0f}" for t in traces[:4]]
        return f"Not of the same length, so none is called best: {', '.join(shown)}{' …' if len(traces) > 4 else ''}"
    if len(values) < 2 or better is Better.neither:
        few = ", ".join(f"{name} {number(value)}" for name, value in list(values.items())[:4])
        return few + (" …" if len(values) > 4 else "")
    order = sorted(values, key=lambda name: -better.value * values[name])
    best, last = order[0], order[-1]
    if math.isclose(values[best], values[last], rel_tol=1e-9, abs_tol=1e-12):
        return f"All alike: {number(values[best])}"
    return f"Best: {best} with {number(values[best])}; last: {last} with {number(values[last])}"


def _comparable(traces: Sequence[Trace]) -> bool:
    """Whether the last values are of the same step."""
    return len({float(trace.series.finite.steps[-1]) for trace in traces}) == 1


def _headline(runs: Sequence[Recording], drawn: Sequence[Figure]) -> str:
    best = headline_figure([f for f in drawn if f.chart.better is not Better.neither])
    if best is None:
        return f"{len(runs)} runs, nothing measured yet."
    return f"{best.chart.title}: {best.reading.text[:1].lower()}{best.reading.text[1:]}."


def _verdict(runs: Sequence[Recording]) -> Iterator[Line]:
    for run in runs:
        if not run.series:
            yield Line(State.watch, f"{run.name} has logged nothing.")
        elif not run.finished:
            of = f" of {run.planned:,}" if run.planned else ""
            yield Line(State.note, f"{run.name} is not finished: step {run.last:,}{of}.")
    if all(run.finished for run in runs):
        yield Line(State.good, f"All {len(runs)} runs are finished.")


def last_values(runs: Sequence[Recording], drawn: Sequence[Figure]) -> Html:
    """The last value of every metric of every run, the best one marked."""
    mark = (Html(" "), tag("span", "◂", aria_hidden="true"), tag("span", "best", class_="hidden"))
    rows = []
    for figure in (figure for group in by_section(drawn).values() for figure in group):
        values, better = {t.label: settled(t) for t in figure.traces}, figure.chart.better
        rated = better is not Better.neither and len(set(values.values())) > 1 and _comparable(figure.traces)
        best = max(values, key=lambda name: better.value * values[name]) if rated else None
        cells = {run.name: number(values.get(run.name)) for run in runs}
        if best is not None:
            cells[best] = markup(tag("strong", cells[best]), *mark)
        rows.append([figure.chart.heading, *(cells[run.name] for run in runs)])
    caption = "Last values; training metrics are means of the last steps, ◂ marks the best"
    columns = ["Metric", *(run.name for run in runs)]
    return table(caption, columns, rows, numbers=range(1, len(columns)))


def differing(runs: Sequence[Recording]) -> Html:
    """Settings in which runs differ, one column a run."""
    cells = [[code(key), *map(plain, values)] for key, values in varied(runs).items()]
    return table("Settings that differ", ["Setting", *(run.name for run in runs)], cells)


def title_of(folders: Sequence[Path]) -> str:
    """A title for several runs."""
    names = [folder.resolve().name for folder in folders]
    return " · ".join(names) if len(names) <= 3 else f"{len(names)} runs: {names[0]} … {names[-1]}"
