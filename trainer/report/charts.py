"""The plots of a run: the curves of its metrics, with levels, ranges and a reading of each."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from trainer.report.catalogue import CHARTS, HIDDEN, SAMPLED, SECTIONS, Better, Chart, Curve, Level, LevelKind, held_out
from trainer.report.curves import Figure
from trainer.report.html import anchor
from trainer.report.readings import Trace, read_off
from trainer.report.recording import Recording, Series


def figures(run: Recording) -> list[Figure]:
    """Every plot that the run has numbers for; metrics that no chart knows come last, each in a plot of its own."""
    drawn = []
    for chart in [*charts_for(run), *_further(run)]:
        traces = _traces(run, chart)
        if not traces or (chart.needs_all and not _has_all(run, chart)) or is_hidden(chart, traces):
            continue
        levels = [*_optima(run, chart), *levels_of(run, chart)]
        x_label = "KL from the reference" if chart.against else "step"
        drawn.append(Figure(chart, traces, read_off(traces, chart, levels), levels, x_label))
    return drawn


def charts_for(run: Recording) -> list[Chart]:
    """The charts as they are meant for a run."""
    if SAMPLED not in run.series:
        return list(CHARTS)
    hint = "Policy, value and entropy terms together."
    return [
        dataclasses.replace(chart, section="policy", better=Better.neither, weight=0, hint=hint)
        if "loss" in chart.metrics
        else chart
        for chart in CHARTS
    ]


def is_hidden(chart: Chart, traces: Sequence[Trace]) -> bool:
    """Whether it is a chart of something that did not happen."""
    return chart.hide_zero and not any(trace.series.finite.values.any() for trace in traces)


def _has_all(run: Recording, chart: Chart) -> bool:
    return all(name in run.series or held_out(name) in run.series for name in chart.metrics)


def _traces(run: Recording, chart: Chart) -> list[Trace]:
    if chart.against:
        return list(_paths(run, chart))
    traces: list[Trace] = []
    for name, label in chart.metrics.items():
        # Two metrics of a chart may be called alike on held-out data; it is then that of the one that was logged.
        if name not in run.series and held_out(name) != f"eval/{name}":
            continue
        style = len({t.style for t in traces})
        several = len(chart.metrics) > 1 and label != "training"
        for key, evaluated in ((name, False), (held_out(name), True)):
            if key not in run.series or not len(run.series[key].finite):
                continue
            shown = label if not evaluated else f"{label}, held out" if several else "held out"
            exact, own_style = chart.curve is Curve.exact, style + (evaluated and not several)
            traces.append(Trace(shown, run.series[key], own_style, evaluated, exact, evaluated))
    return traces


def _paths(run: Recording, chart: Chart) -> Iterator[Trace]:
    """The metrics of a chart over another metric: means of up to 60 stretches of steps, against the noise."""
    over = run.series.get(chart.against)
    for style, (name, label) in enumerate(chart.metrics.items()):
        if over is None or name not in run.series:
            continue
        series = run.series[name]
        _steps, a, b = np.intersect1d(over.steps, series.steps, return_indices=True)
        x, y = over.values[a], series.values[b]
        both = np.isfinite(x) & np.isfinite(y)
        if both.any():
            yield Trace(label, Series(x[both], y[both]).block_means(60), style, points=True)


def _optima(run: Recording, chart: Chart) -> Iterator[Level]:
    """The best possible values that the data knows, such as the entropy of its language."""
    for name in chart.metrics:
        floor = run.floors.get(held_out(name), run.floors.get(name))
        if floor is not None:
            label = "entropy of the language" if name in ("loss", "bits_per_byte") else "known optimum"
            yield Level(floor, f"{label} {floor:.4g}", LevelKind.optimum, name=label)


def levels_of(run: Recording, chart: Chart) -> Iterator[Level]:
    """The levels of a chart with their values in this run."""
    for level in chart.levels:
        if level.kind is LevelKind.no_preference:
            start = run.facts.get("initial_loss")
            if start is not None:
                yield dataclasses.replace(level, value=start, label=f"{start:.3g}: {level.label}")
        elif level.value is not None:
            yield level
        elif isinstance(value := run.get(level.setting), int | float) and value:
            yield dataclasses.replace(level, value=float(value), label=f"{level.label} {value:g}")


def _further(run: Recording) -> Iterator[Chart]:
    known = {name for chart in CHARTS for name in chart.metrics} | set(HIDDEN)
    known |= {held_out(name).removeprefix("eval/") for name in known}
    plain = dict.fromkeys(name.removeprefix("eval/") for name in run.series if not name.startswith("time/"))
    for name in plain:
        if name not in known:
            yield Chart(f"further-{anchor(name)}", "further", name, {name: "training"})


def by_section(drawn: Sequence[Figure]) -> dict[str, list[Figure]]:
    """Plots by section, in the order of the sections."""
    groups = {section: [f for f in drawn if f.chart.section == section] for section in SECTIONS}
    return {section: group for section, group in groups.items() if group}
