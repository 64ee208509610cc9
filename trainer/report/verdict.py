"""What a person wants to know in ten seconds: how far the run is, what it reached, and what looks wrong."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum, auto

import numpy as np

from trainer.report.catalogue import Better, LevelKind
from trainer.report.curves import Figure
from trainer.report.html import duration, number, plural
from trainer.report.readings import spikes
from trainer.report.recording import Recording

CLOSE = 0.05
"""How near to the best possible counts as reached."""


class State(StrEnum):
    """How a line is meant."""

    good = auto()
    note = auto()
    watch = auto()
    bad = auto()


@dataclass(frozen=True)
class Line:
    """One statement about a run."""

    state: State
    text: str


def headline(drawn: Sequence[Figure]) -> str:
    """The result in one sentence."""
    figure = headline_figure(drawn)
    return figure.reading.sentence(figure.chart) if figure else "Nothing was measured yet."


def headline_figure(drawn: Sequence[Figure]) -> Figure | None:
    """The plot that tells best what a run is worth: held-out data, where there is any, says more than training."""
    rated = [f for f in drawn if f.chart.weight]
    evaluated = [f for f in rated if any(t.evaluated for t in f.traces)]
    return max(evaluated or rated, key=lambda f: f.chart.weight, default=None)


def verdict(run: Recording, drawn: Sequence[Figure]) -> list[Line]:
    """Statements about a run, how far it is first and what looks wrong last."""
    first = headline_figure(drawn)
    return [*_progress(run), *_results(drawn, first), *_health(run, drawn), *_speed(run)]


def _progress(run: Recording) -> Iterator[Line]:
    of = f" of {run.planned:,}" if run.planned else ""
    if run.stopped:
        yield Line(
            State.note, f"Stopped after step {run.last:,}{of} ({run.stopped}) and saved; the same command continues."
        )
    elif run.ended:
        yield Line(State.bad, f"Stopped after step {run.last:,}{of}: {run.ended}")
    elif run.finished:
        tokens = run.latest("tokens")
        seen = f", {number(tokens)} tokens" if tokens else ""
        spent = f", about {duration(sum(run.seconds.values()))} of work" if run.seconds else ""
        yield Line(State.good, f"Finished: {run.last:,} steps{seen}{spent}.")
    elif run.last:
        yield Line(State.note, f"Not finished when this was written: step {run.last:,}{of}.")
    else:
        yield Line(State.note, "No step was logged yet.")
    if attempts := len(run.facts.get("attempts") or []):
        yield Line(State.note, f"Continued {plural(attempts, 'time')}: after an interruption, or with more steps.")
    if run.unreadable:
        text = f"{plural(run.unreadable, 'line')} of the logs cannot be read, as after a run was killed."
        yield Line(State.watch, text)


def _results(drawn: Sequence[Figure], first: Figure | None) -> Iterator[Line]:
    """Results with their states; the one in the headline is repeated only where it is worth a look."""
    for figure in drawn:
        chart, reading = figure.chart, figure.reading
        if chart.better is Better.neither or chart.section != "learning":
            continue
        state = State.note
        for level in figure.levels:
            distance = chart.better.value * ((level.value or 0.0) - reading.value)
            if level.kind is LevelKind.optimum and distance / (abs(level.value or 0.0) or 1.0) <= CLOSE:
                state = State.good
            elif level.kind is LevelKind.chance and distance > -CLOSE:
                state = State.watch
        state = State.watch if reading.declined else state
        if figure is not first or state is State.watch:
            yield Line(state, reading.sentence(chart))


def _health(run: Recording, drawn: Sequence[Figure]) -> Iterator[Line]:
    for figure in drawn:
        if figure.reading.healthy is not None and figure.reading.healthy < 0.8:
            yield Line(State.watch, figure.reading.sentence(figure.chart))
    if skipped := run.latest("skipped"):
        state = State.bad if skipped > 0.01 * max(1, run.last) else State.watch
        reasons = "loss or gradient not finite, spike, or nothing to learn"
        yield Line(state, f"{plural(skipped, 'step')} skipped: {reasons}.")
    lost = {n: len(s) - len(s.finite) for n, s in run.series.items() if len(s) > len(s.finite)}
    if lost:
        names = ", ".join(f"{n} ({c:,})" for n, c in list(lost.items())[:4])
        yield Line(State.bad, f"Values that are not finite: {names}.")
    if "grad_norm" in run.series and (flat := int((run.series["grad_norm"].finite.values == 0).sum())):
        state = State.bad if flat > run.last / 2 else State.watch
        yield Line(state, f"{plural(flat, 'step')} taught nothing: the gradient was exactly 0.")
    if "grad_norm" in run.series and (count := spikes(run.series["grad_norm"].values)):
        yield Line(State.watch, f"{plural(count, 'gradient spike')}, more than eight times the norm around them.")


def _speed(run: Recording) -> Iterator[Line]:
    speed, utilisation = run.series.get("tokens_per_second"), run.series.get("mfu")
    if speed is None or not len(speed.finite):
        return
    parts = [f"{number(float(np.median(speed.finite.values)))} tokens a second"]
    if utilisation is not None and len(utilisation.finite):
        parts.append(f"{float(np.median(utilisation.finite.values)):.0%} of the device's peak")
    if (memory := run.latest("memory_gb")) is not None:
        parts.append(f"{memory:.2f} GB a rank")
    ranks, device = run.facts.get("ranks"), run.facts.get("device")
    where = f" on {plural(ranks, 'rank')} of {device}" if isinstance(ranks, int) and device else ""
    yield Line(State.note, f"{', '.join(parts)}{where}.")
