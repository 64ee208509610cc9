"""What a run left in its folder, as far as it can be read: also while it is going on, and after it was cut off."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from trainer.disk import read_json

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Series:
    """A metric over the steps: ``steps`` ascending, ``values`` as they were logged (NaN and infinities included)."""

    steps: Floats
    values: Floats

    def __len__(self) -> int:
        return len(self.steps)

    @property
    def finite(self) -> Series:
        """Without values that cannot be drawn."""
        finite = np.isfinite(self.values)
        return self if finite.all() else Series(self.steps[finite], self.values[finite])

    def block_means(self, count: int) -> Series:
        """Means over ``count`` stretches of neighbouring steps; NaN where nothing in a stretch is finite."""
        parts = np.array_split(np.arange(len(self)), min(count, len(self)))
        finite = [values[np.isfinite(values)] for values in (self.values[part] for part in parts)]
        means = [values.mean() if len(values) else np.nan for values in finite]
        return Series(np.array([self.steps[part].mean() for part in parts]), np.array(means))


@dataclass(frozen=True)
class Ancestor:
    """A model that this one came from.

    Attributes:
        folder: of the model.
        facts: its ``onecurve.json``.
        config: the configuration of the run that made it.
    """

    folder: Path
    facts: dict[str, Any]
    config: dict[str, Any]


@dataclass(frozen=True)
class Recording:
    """A run as its files tell it; whatever is missing is empty.

    Attributes:
        folder: of the run.
        config: its settings.
        facts: how it was made (versions, fingerprints, command).
        export: the record of its exported model.
        formats: what each further format of it cost, by name.
        series: values over the steps, by metric.
        samples: generations.
        errors: held-out examples that the model got most wrong.
        histograms: distributions of metrics over held-out examples.
        ancestors: the models that it started from, the nearest first.
        unreadable: lines that are no JSON objects.
        ended: why it failed, where the caller knows.
        stopped: the signal or the time limit that it stopped and was saved for; None of one that goes on.
        label: what tells it from other runs of its sweep.
    """

    folder: Path
    config: dict[str, Any] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    export: dict[str, Any] = field(default_factory=dict)
    formats: dict[str, dict[str, Any]] = field(default_factory=dict)
    series: dict[str, Series] = field(default_factory=dict)
    samples: list[dict[str, Any]] = field(default_factory=list)
    errors: list[dict[str, Any]] = field(default_factory=list)
    histograms: list[dict[str, Any]] = field(default_factory=list)
    ancestors: list[Ancestor] = field(default_factory=list)
    unreadable: int = 0
    ended: str | None = None
    stopped: str | None = None
    label: str = ""

    @property
    def name(self) -> str:
        """The folder's own name, which tells runs apart as the configured one need not; of a point its settings."""
        return self.label or self.folder.resolve().name

    @property
    def last(self) -> int:
        """The last step that was logged; 0 before the first."""
        return int(max((s.steps[-1] for s in self.series.values() if len(s)), default=0))

    @property
    def planned(self) -> int | None:
        """Steps of the whole run, where the configuration says so."""
        steps = self.config.get("steps")
        return steps if isinstance(steps, int) else None

    @property
    def finished(self) -> bool:
        """Whether the run came to its end: its model or adapter is written, or its last planned step logged."""
        done = bool(self.export) or (self.folder / "adapter" / "adapter_config.json").is_file()
        return self.last > 0 and (done or self.last == self.planned)

    def get(self, path: str, default: Any = None) -> Any:
        """A setting by its full name (``batch.size``)."""
        node: Any = self.config
        for key in path.split("."):
            if not isinstance(node, Mapping) or key not in node:
                return default
            node = node[key]
        return node

    def latest(self, name: str) -> float | None:
        """The last finite value of a metric."""
        if name not in self.series or not len(series := self.series[name].finite):
            return None
        return float(series.values[-1])

    @property
    def floors(self) -> dict[str, float]:
        """The best possible value of metrics, where the data knows it."""
        floors = self.facts.get("floors") or {}
        return {name: float(value) for name, value in floors.items() if isinstance(value, int | float)}

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds by lap (``time/*``) over the whole run, those of steps that were not logged estimated."""
        times = {n.removeprefix("time/"): s.finite for n, s in self.series.items() if n.startswith("time/")}
        scale = max(1, int(self.get("tracking.every", 1) or 1))
        rare = ("evaluation", "checkpoint")
        seconds = {n: float(s.values.sum()) * (1 if n in rare else scale) for n, s in times.items() if len(s)}
        if "forward_backward" in seconds:
            seconds.pop("update", None)  # the sum of it and the optimizer's
        return seconds


def read(folder: Path, ended: str | None = None, stopped: str | None = None) -> Recording:
    """Read a run's folder; ``ended``, ``stopped``: how the run came to an end, where the caller knows."""
    record = _object(folder / "config.yaml", yaml.safe_load)
    config = record.get("config") or {}
    lines = Lines(folder)
    return Recording(
        folder,
        config,
        facts=record.get("facts") or {},
        export=read_json(folder / "export" / "onecurve.json"),
        formats=dict(_formats(folder)),
        series=_series(lines.of("metrics")),
        samples=list(lines.of("samples")),
        errors=list(lines.of("errors")),
        histograms=list(lines.of("histograms")),
        ancestors=list(_ancestors(folder, config)),
        unreadable=lines.unreadable,
        ended=ended,
        stopped=stopped or read_json(folder / "stopped.json").get("reason"),
    )


def _formats(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Costs of the formats in ``export-<format>/``; what was moved aside there has another name."""
    for file in sorted(folder.glob("export-*/onecurve.json")):
        record = read_json(file)
        if file.parent.name == f"export-{record.get('format')}" and isinstance(record.get("cost"), dict):
            yield str(record["format"]), record["cost"]


class Lines:
    """The JSON lines of a folder's files; counts what cannot be read, such as a last line that was cut off."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.unreadable = folder, 0

    def of(self, name: str) -> Iterator[dict[str, Any]]:
        """Every object of a file, in order; nothing where there is no file."""
        file = self.folder / f"{name}.jsonl"
        if not file.is_file():
            return
        with file.open(encoding="utf-8", errors="replace") as opened:
            for line in opened:
                try:
                    row = json.loads(line)
                except ValueError:
                    row = None
                if isinstance(row, dict):
                    yield row
                else:
                    self.unreadable += 1


def _series(lines: Iterator[dict[str, Any]]) -> dict[str, Series]:
    """Metrics by name; a step that was logged twice, as a resumed run may, counts as it was logged last."""
    by_name: dict[str, dict[float, float]] = {}
    for line in lines:
        step = line.pop("step", None)
        if not _number(step):
            continue
        for name, value in line.items():
            if _number(value):
                by_name.setdefault(name, {})[step] = float(value)
    series = {}
    for name, values in by_name.items():
        steps = np.fromiter(values.keys(), np.float64, len(values))
        order = np.argsort(steps, kind="stable")
        series[name] = Series(steps[order], np.fromiter(values.values(), np.float64, len(values))[order])
    return series


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _ancestors(folder: Path, config: Mapping[str, Any]) -> Iterator[Ancestor]:
    """The models that the run started from, the nearest first: ``model.path`` of the run, of that model's run, and so on."""
    seen: set[Path] = set()
    while path := (config.get("model") or {}).get("path"):
        # A run is often looked at from another folder than it was started in.
        bases = [Path.cwd(), *folder.resolve().parents]
        here = next((base / path for base in bases if (base / path).is_dir()), Path(path))
        if here.resolve() in seen:
            return
        seen.add(here.resolve())
        config = _object(here.parent / "config.yaml", yaml.safe_load).get("config") or {}
        yield Ancestor(here, read_json(here / "onecurve.json"), config)
        folder = here.parent


def _object(file: Path, parse: Callable[[str], Any]) -> dict[str, Any]:
    try:
        content = parse(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return content if isinstance(content, dict) else {}


def flat(config: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """Every setting by its full name."""
    for key, value in config.items():
        name = f"{path}{key}"
        if isinstance(value, Mapping) and value:
            yield from flat(value, f"{name}.")
        else:
            yield name, value
