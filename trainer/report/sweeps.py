"""Runs of a sweep: named by the settings that tell them apart, and a plot of the sweep's metric over each of these."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

from trainer.report.curves import BOTTOM, LEFT, RIGHT, Axes, axis_name, picture, rows
from trainer.report.html import Html, anchor, number, tag
from trainer.report.recording import Recording, flat
from trainer.report.tables import plain

OWN = ("run_dir", "name", "tracking.wandb.group")
"""Settings that every run has to itself."""
PLOTS, LABELS = 6, 12
"""Settings that get a plot; values of a setting whose names are written out."""


def varied(runs: Sequence[Recording]) -> dict[str, list[Any]]:
    """Settings in which runs differ, with the value of each run."""
    configs = [dict(flat(run.config)) for run in runs]
    keys = dict.fromkeys(key for config in configs for key in config if key not in OWN)
    values = {key: [config.get(key) for config in configs] for key in keys}
    return {key: of_runs for key, of_runs in values.items() if len({_text(value) for value in of_runs}) > 1}


def labelled(runs: Sequence[Recording]) -> list[Recording]:
    """Points of one sweep under their settings (``lr=0.001 seed=1``): their folders are digests. Other runs stay."""
    sweeps = {run.folder.resolve().parent for run in runs}
    differing = varied(runs)
    if len(sweeps) > 1 or not differing or not all((sweep / "points").is_dir() for sweep in sweeps):
        return list(runs)
    short = {key: key.rpartition(".")[2] for key in differing}
    names = {key: name if list(short.values()).count(name) == 1 else key for key, name in short.items()}
    labels = [" ".join(f"{names[key]}={plain(differing[key][n])}" for key in differing) for n in range(len(runs))]
    return [dataclasses.replace(run, label=label) for run, label in zip(runs, labels, strict=True)]


def objective(runs: Sequence[Recording]) -> list[Html]:
    """A plot of the metric that the points of a sweep are compared by over each setting that varies; else nothing."""
    if not all(run.label for run in runs):
        return []
    metric, sign = (
        str(runs[0].get("sweep.metric", "eval/loss")),
        1 if runs[0].get("sweep.direction") == "maximize" else -1,
    )
    values = [run.latest(metric) for run in runs]
    plots = []
    for key, settings in list(varied(runs).items())[:PLOTS]:
        points = [(setting, value) for setting, value in zip(settings, values, strict=True) if value is not None]
        if len({_text(setting) for setting, _ in points}) > 1:
            plots.append(_figure(metric, key, points, sign))
    return plots


def _figure(metric: str, key: str, points: Sequence[tuple[Any, float]], sign: int) -> Html:
    """Values of the metric over those of a setting, in their order and at equal distances."""
    choices = sorted({_text(setting): setting for setting, _ in points}.values(), key=_order)
    low, high = min(value for _, value in points), max(value for _, value in points)
    free = 0.08 * (high - low) or 0.02 * abs(high) or 1.0
    axes = Axes((-0.5, len(choices) - 0.5), (low - free, high + free))
    every = -(-len(choices) // LABELS)
    drawn = [*rows(axes), axis_name(key)]
    for n, choice in list(enumerate(choices))[::every]:
        x = float(axes.across(float(n)))
        drawn.append(tag("text", plain(choice), class_="tick", x=x, y=BOTTOM + 20, text_anchor="middle"))
    places = {_text(choice): n for n, choice in enumerate(choices)}
    best = max(points, key=lambda point: sign * point[1])
    for setting, value in points:
        x, y = float(axes.across(float(places[_text(setting)]))), float(axes.up(value))
        drawn.append(tag("circle", cx=x, cy=y, r=5.5 if (setting, value) == best else 3.6, class_="s0"))
    drawn.append(tag("path", class_="grid", d=f"M{LEFT} {BOTTOM}H{RIGHT}"))
    title, reading = f"{metric} over {key}", f"Best: {number(best[1])} at {key}={plain(best[0])}"
    name = f"sweep-{anchor(key)}"
    return tag(
        "figure",
        tag("figcaption", tag("h3", title), tag("p", reading, class_="reading")),
        tag("div", picture(name, title, reading, *drawn), class_="plot"),
        id=name,
    )


def _order(value: Any) -> tuple[int, float, str]:
    numeric = isinstance(value, int | float) and not isinstance(value, bool)
    return (0, float(value), "") if numeric else (1, 0.0, _text(value))


def _text(value: Any) -> str:
    return json.dumps(value, default=str, sort_keys=True)
