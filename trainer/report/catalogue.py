"""The charts of a report (``charts.yaml``): which metrics belong into one plot, what is healthy there, what to look for."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, StrEnum
from pathlib import Path
from typing import Any

import yaml

SECTIONS = {
    "learning": "Learning",
    "rewards": "Rewards",
    "policy": "Policy",
    "value": "Value function",
    "routing": "Experts",
    "optimisation": "Optimisation",
    "machine": "Speed and memory",
    "further": "Further metrics",
}
"""Headings, in their order on the page."""


class Better(Enum):
    """Which way a metric should go."""

    lower = -1
    neither = 0
    higher = 1


class Curve(StrEnum):
    """How a metric behaves, so how it is drawn and read."""

    noisy = "noisy"
    exact = "exact"
    """Without noise, such as the learning rate."""
    steady = "steady"
    """Noise around one value, such as the throughput."""


class LevelKind(StrEnum):
    """What a level in a plot stands for."""

    reference = "reference"
    """A value to know, such as a limit."""
    optimum = "optimum"
    """No model gets beyond it."""
    chance = "chance"
    """What guessing reaches."""
    no_preference = "no_preference"
    """The loss of a model that prefers neither of two completions, as the run recorded it (``initial_loss``)."""


@dataclass(frozen=True)
class Level:
    """A horizontal line to compare with.

    Attributes:
        value: where it lies; None: the value of ``setting``, and no line where that is 0 or null.
        label: written at it.
        kind: what it stands for.
        setting: full name of a setting of the run.
        name: what it is called in a sentence; only an optimum that the data knows has one.
    """

    value: float | None = None
    label: str = ""
    kind: LevelKind = LevelKind.reference
    setting: str = ""
    name: str = ""


@dataclass(frozen=True)
class Chart:
    """A plot of some metrics.

    Attributes:
        id: identifies it, also in the page.
        section: a key of `SECTIONS`.
        title: its heading.
        metrics: label by metric name; held-out values (``eval/<name>``) are drawn in with dots.
        better: which way the metrics should go.
        weight: how well it tells what a run is worth; the headline reads the weightiest, 0 is never read.
        curve: how the metrics behave.
        levels: lines to compare with.
        band: the range that a healthy run stays in.
        hint: what to look for, for somebody who sees such a plot for the first time.
        log: logarithmic axis.
        against: a metric on the horizontal axis, instead of the step.
        needs_all: drawn only where the run has all of the metrics.
        hide_zero: not drawn where all values are 0.
        compare: drawn in comparisons of runs, too.
        unit: of its values, named in the heading.
    """

    id: str
    section: str
    title: str
    metrics: dict[str, str]
    better: Better = Better.neither
    weight: int = 0
    curve: Curve = Curve.noisy
    levels: tuple[Level, ...] = ()
    band: tuple[float, float] | None = None
    hint: str = ""
    log: bool = False
    against: str = ""
    needs_all: bool = False
    hide_zero: bool = False
    compare: bool = True
    unit: str = ""

    @property
    def heading(self) -> str:
        """The title with its unit."""
        return f"{self.title}, {self.unit}" if self.unit else self.title

    @classmethod
    def from_yaml(cls, section: str, entry: dict[str, Any]) -> Chart:
        """A chart from its entry in the file."""
        levels = tuple(
            Level(**{**level, "kind": LevelKind(level.get("kind", "reference"))}) for level in entry.get("levels", [])
        )
        typed = {"better": Better[entry.get("better", "neither")], "curve": Curve(entry.get("curve", "noisy"))}
        band = tuple(entry["band"]) if "band" in entry else None
        return cls(**{**entry, **typed, "levels": levels, "band": band, "section": section})


CHARTS = tuple(
    Chart.from_yaml(section, entry)
    for section, entries in yaml.safe_load(Path(__file__).with_name("charts.yaml").read_text()).items()
    for entry in entries
)
SAMPLED = "policy/loss"
"""A run with this metric learns from its own samples: its total loss, whose scale changes with them, is no result."""
HELD_OUT = {"completion/length_mean": "eval/length"}
"""What a metric is called on held-out data where it is not ``eval/<name>``."""
HIDDEN = (
    "tokens",
    "skipped_in_a_row",
    "score/std",
    "completion/length_max",
    "objective/score_std",
    "objective/missing",
    "straggler/waiting",
    "straggler/rank",
)
"""Metrics without a plot of their own."""


def held_out(metric: str) -> str:
    """What a metric is called on held-out data."""
    return HELD_OUT.get(metric, f"eval/{metric.removeprefix('objective/')}")
