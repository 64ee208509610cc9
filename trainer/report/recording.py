"""What a run left in its folder, as far as it can be read: also while it is going on, and after it was cut off."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

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
        keep = np.isfinite(self.values)
        return self if keep.all() else Series(self.steps[keep], self.values[keep])


@dataclass(frozen=True)
class Ancestor:
    """A model that this one came from: its ``folder``, what its ``onecurve.json`` says, and its configuration."""

    folder: Path
    facts: dict[str, Any]
    config: dict[str, Any]


@dataclass(frozen=True)
class Recording:
    """A run as its files tell it. Whatever is missing is empty; ``unreadable`` counts lines that are no JSON objects."""

    folder: Path
    config: dict[str, Any] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    export: dict[str, Any] = field(default_factory=dict)
    series: dict[str, Series] = field(default_factory=dict)
    samples: list[dict[str, Any]] = field(default_factory=list)
    errors: list[dict[str, Any]] = field(default_factory=list)
    histograms: list[dict[str, Any]] = field(default_factory=list)
    ancestors: list[Ancestor] = field(default_factory=list)
    unreadable: int = 0
    ended: str | None = None

    @property
    def name(self) -> str:
        """The folder's own name: it tells runs apart, as the configured one need not."""
        return self.folder.resolve().name

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
        found = self.series[name].finite if name in self.series else None
        return float(found.values[-1]) if found is not None and len(found) else None

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds by lap (``time/*``) over the whole run, those of steps that were not logged estimated."""
        times = {n.removeprefix("time/"): s.finite for n, s in self.series.items() if n.startswith("time/")}
        scale = max(1, int(self.get("tracking.every", 1) or 1))
        rare = ("evaluation", "checkpoint")
        found = {n: float(s.values.sum()) * (1 if n in rare else scale) for n, s in times.items() if len(s)}
        if "forward_backward" in found:
            found.pop("update", None)  # holds it and the optimizer's
        return found


def read(folder: Path, ended: str | None = None) -> Recording:
    """Read a run's folder. ``ended``: why the run came to an end, where it failed and the caller knows."""
    record = _yaml(folder / "config.yaml")
    lines = Lines(folder)
    series = _series(lines.of("metrics"))
    tables = {name: list(lines.of(name)) for name in ("samples", "errors", "histograms")}
    config = record.get("config") or {}
    return Recording(
        folder, config, record.get("facts") or {}, _json(folder / "export" / "onecurve.json"), series,
        tables["samples"], tables["errors"], tables["histograms"], list(_ancestors(folder, config)), lines.unreadable, ended,
    )  # fmt: skip


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
                    found = json.loads(line)
                except ValueError:
                    self.unreadable += 1
                    continue
                if isinstance(found, dict):
                    yield found
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
    found = {}
    for name, values in by_name.items():
        steps = np.fromiter(values.keys(), np.float64, len(values))
        order = np.argsort(steps, kind="stable")
        found[name] = Series(steps[order], np.fromiter(values.values(), np.float64, len(values))[order])
    return found


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
        config = _yaml(here.parent / "config.yaml").get("config") or {}
        yield Ancestor(here, _json(here / "onecurve.json"), config)
        folder = here.parent


def _yaml(file: Path) -> dict[str, Any]:
    try:
        found = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return found if isinstance(found, dict) else {}


def _json(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def flat(config: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """Every setting by its full name."""
    for key, value in config.items():
        name = f"{path}{key}"
        if isinstance(value, Mapping) and value:
            yield from flat(value, f"{name}.")
        else:
            yield name, value


def smoothed(values: Floats, share: float) -> Floats:
    """Two-sided exponential average whose length is ``share`` of the curve, so that it lags behind nothing; 0 = as it is."""
    count = len(values)
    if count < 3 or share <= 0:
        return values
    keep = math.exp(-1 / max(0.5, share * count))
    known = np.isfinite(values)
    clean = np.where(known, values, 0.0)
    total, weight = -clean, -known.astype(np.float64)
    for order in (slice(None), slice(None, None, -1)):
        sums, weights = _decayed(clean[order], keep), _decayed(known[order].astype(np.float64), keep)
        total, weight = total + sums[order], weight + weights[order]
    return np.where(weight > 1e-12, total / np.maximum(weight, 1e-12), np.nan)


def _decayed(values: Floats, keep: float) -> Floats:
    out, held = np.empty_like(values), 0.0
    for n, value in enumerate(values.tolist()):
        held = held * keep + value
        out[n] = held
    return out
