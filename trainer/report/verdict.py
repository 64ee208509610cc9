"""What a person wants to know in ten seconds: how far the run is, what it reached, and what looks wrong."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum, auto

import numpy as np

from trainer.report.catalogue import Better
from trainer.report.charts import Drawn
from trainer.report.curves import number
from trainer.report.readings import settled, spiky
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


def headline(run: Recording, found: Sequence[Drawn]) -> str:
    """The result in one sentence."""
    judged = [d for d in found if d.chart.weight]
    if not judged:
        return "Nothing was measured yet."
    # What was measured on held-out data, where there is any, says more than the same in training.
    held = [d for d in judged if any(t.points for t in d.figure.traces)]
    return result(max(held or judged, key=lambda d: d.chart.weight))


def verdict(run: Recording, found: Sequence[Drawn]) -> list[Line]:
    """Statements about a run, how far it is first and what looks wrong last."""
    first = headline(run, found)
    results = [line for line in _results(found) if line.text != first or line.state is State.watch]
    return [*_progress(run), *results, *_health(run, found), *_speed(run)]


def result(one: Drawn) -> str:
    """The reading of a plot as a sentence of its own."""
    read = one.figure.reading
    if read.startswith("Held out "):
        return sentence(f"Held-out {one.chart.title[:1].lower()}{one.chart.title[1:]} {read.removeprefix('Held out ')}")
    label = one.figure.traces[0].label
    if label == "training" or label.lower() in one.chart.title.lower():
        return sentence(f"{one.chart.title} {read[len(label) :].strip()}")
    return sentence(f"{one.chart.title}: {read[:1].lower()}{read[1:]}")


def sentence(text: str) -> str:
    """With a full stop."""
    return text if text.endswith(".") else f"{text}."


def duration(seconds: float) -> str:
    """As a person says it."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 100 else f"{minutes / 60:.1f} h"


def _progress(run: Recording) -> Iterator[Line]:
    of = f" of {run.planned:,}" if run.planned else ""
    if run.ended:
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
    attempts = len(run.facts.get("attempts") or [])
    if attempts:
        yield Line(State.note, f"Continued {attempts} time{'s' * (attempts > 1)} after it was interrupted.")
    if run.unreadable:
        yield Line(
            State.watch,
            f"{run.unreadable} line{'s' * (run.unreadable > 1)} of the logs cannot be read, as after a run was killed.",
        )


def _results(found: Sequence[Drawn]) -> Iterator[Line]:
    for d in found:
        if d.chart.better is Better.neither or d.chart.section != "Learning":
            continue
        main = next((t for t in d.figure.traces if t.points), d.figure.traces[0])
        best = next((level for level in d.figure.levels if level.optimum), None)
        value, state = settled(main), State.note
        if best is not None:
            off = d.chart.better.value * (best.value - value) / (abs(best.value) or 1.0)
            state = State.good if off <= CLOSE else State.note
        chance = next((level for level in d.figure.levels if level.label == "chance"), None)
        if chance is not None and value < chance.value + CLOSE:
            state = State.watch
        if "since then" in d.figure.reading:
            state = State.watch
        yield Line(state, result(d))


def _health(run: Recording, found: Sequence[Drawn]) -> Iterator[Line]:
    for d in found:
        if d.figure.band is None:
            continue
        values = np.concatenate([t.series.finite.values for t in d.figure.traces])
        share = float(((values >= d.figure.band.low) & (values <= d.figure.band.high)).mean())
        if share < 0.8:
            yield Line(State.watch, result(d))
    skipped = run.latest("skipped")
    if skipped:
        many = skipped > 0.01 * max(1, run.last)
        yield Line(
            State.bad if many else State.watch,
            f"{number(skipped)} step{'s' * (skipped > 1)} skipped: loss or gradient not finite, spike, or nothing to learn.",
        )
    lost = {n: len(s) - len(s.finite) for n, s in run.series.items() if len(s) > len(s.finite)}
    if lost:
        names = ", ".join(f"{n} ({c:,})" for n, c in list(lost.items())[:4])
        yield Line(State.bad, f"Values that are not finite: {names}.")
    if "grad_norm" in run.series and (spikes := spiky(run.series["grad_norm"].values)):
        yield Line(
            State.watch, f"{spikes:,} gradient spike{'s' * (spikes > 1)}, more than eight times the norm around them."
        )


def _speed(run: Recording) -> Iterator[Line]:
    speed = run.series.get("tokens_per_second")
    if speed is None or not len(speed.finite):
        return
    parts = [f"{number(float(np.median(speed.finite.values)))} tokens a second"]
    if (used := run.series.get("mfu")) is not None and len(used.finite):
        parts.append(f"{float(np.median(used.finite.values)):.0%} of the device's peak")
    if (held := run.latest("memory_gb")) is not None:
        parts.append(f"{held:.2f} GB a rank")
    ranks, device = run.facts.get("ranks"), run.facts.get("device")
    where = f" on {ranks} rank{'s' * (ranks > 1)} of {device}" if isinstance(ranks, int) and device else ""
    yield Line(State.note, f"{', '.join(parts)}{where}.")
