"""The whole life of a model in one report: results against their targets, answers by stage, and each stage's own plots."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from trainer.report.charts import drawn, sections
from trainer.report.curves import number
from trainer.report.histograms import histograms
from trainer.report.page import opening, page, plots, statements
from trainer.report.recording import Recording, read
from trainer.report.tables import ancestry, side_by_side, table
from trainer.report.verdict import Line, State, duration, headline, verdict

RECORD = "lifecycle.json"


def lifecycle(folder: Path) -> str:
    """The page of a folder whose ``lifecycle.json`` lists ``stages``, ``results`` and ``samples``, each if there."""
    try:
        held = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        held = {}
    held = held if isinstance(held, dict) else {}
    stages, results = _rows(held, "stages"), _rows(held, "results")
    runs = {str(stage.get("name", n)): _run(folder, stage) for n, stage in enumerate(stages)}
    answers = _rows(held, "samples")
    names = list(dict.fromkeys(str(key) for row in answers for key in _answers(row)))
    parts = {
        "Results": _results(results),
        "Stages": _stages(stages, runs),
        "Answers by stage": side_by_side(
            [(str(row.get("prompt", "")), _answers(row)) for row in answers], names, "The same prompt after each stage"
        ),
    }
    for name, run in runs.items():
        if run is not None and run.series:
            parts[name] = _stage(name, run)
    title = str(held.get("name") or folder.resolve().name)
    return page(title, opening(title, *_said(stages, results, runs), {}), parts)


def _rows(held: Mapping[str, Any], key: str) -> list[dict[str, Any]]:
    """A list of objects; stages may also be an object by name."""
    found = held.get(key) or []
    if isinstance(found, Mapping):
        found = [{"name": name, **row} for name, row in found.items() if isinstance(row, Mapping)]
    return [row for row in found if isinstance(row, dict)] if isinstance(found, list) else []


def _answers(row: Mapping[str, Any]) -> dict[str, Any]:
    """The answers by stage, under ``answers`` or beside the prompt."""
    inside = row.get("answers")
    return (
        dict(inside)
        if isinstance(inside, Mapping)
        else {k: v for k, v in row.items() if k not in ("prompt", "step", "ideal")}
    )


def _run(folder: Path, stage: Mapping[str, Any]) -> Recording | None:
    """The run of a stage: its ``run_dir`` (or ``run``), from here or from inside the folder."""
    named = stage.get("run_dir") or stage.get("run") or stage.get("dir") or stage.get("folder")
    if not isinstance(named, str):
        return None
    here = next(
        (p for p in (Path(named), folder / named, folder / Path(named).name) if (p / "config.yaml").is_file()), None
    )
    return read(here) if here is not None else None


def met(row: Mapping[str, Any]) -> bool | None:
    """Whether a result reached its target; None where that cannot be told.

    The way to go is ``met`` itself, ``better`` (lower, higher), or the side of the target on which the optimum lies.
    """
    if isinstance(row.get("met"), bool):
        return bool(row["met"])
    value, target, optimum = (row.get(key) for key in ("value", "target", "optimum"))
    if not all(isinstance(v, int | float) for v in (value, target)):
        return None
    lower = row.get("better") == "lower" or (
        row.get("better") is None and isinstance(optimum, int | float) and optimum < target  # type: ignore[operator]
    )
    return bool(value <= target if lower else value >= target)  # type: ignore[operator]


def _results(results: Sequence[Mapping[str, Any]]) -> str:
    rows = []
    for row in results:
        reached = met(row)
        state, word = {True: ("good", "✓ met"), False: ("bad", "✕ missed"), None: ("note", "–")}[reached]
        cells = [
            number(v) if isinstance(v := row.get(key), int | float) else escape(str(v if v is not None else "–"))
            for key in ("value", "target", "optimum")
        ]
        rows.append([escape(str(row.get("name", ""))), *cells, f'<span class="state {state}">{word}</span>'])
    columns = ["What", "Value", "Target", "Known optimum", "Target met"]
    return (
        table("What was reached, against the target and the best possible", columns, rows, numbers=(1, 2, 3))
        if rows
        else ""
    )


def _stages(stages: Sequence[Mapping[str, Any]], runs: Mapping[str, Recording | None]) -> str:
    rows = []
    for n, stage in enumerate(stages):
        name = str(stage.get("name", n))
        run, seconds, parents = runs[name], stage.get("seconds"), stage.get("parents") or []
        result = headline(run, drawn(run)) if run is not None and run.series else "–"
        parents = parents if isinstance(parents, list) else [parents]
        rows.append([
            escape(name), escape(str(stage.get("status", "–"))),
            duration(seconds) if isinstance(seconds, int | float) else "–",
            escape(", ".join(map(str, parents)) or "–"), escape(result),
        ])  # fmt: skip
    return (
        table("Stages in their order", ["Stage", "Status", "Time", "Made from", "Result"], rows, numbers=(2,))
        if rows
        else ""
    )


def _stage(name: str, run: Recording) -> str:
    found = drawn(run)
    body = statements(verdict(run, found))
    spread = histograms(run, f"{name}-")
    for section, group in sections(found).items():
        inside = plots(group, f"{name}-")
        body += inside if section == "Learning" else f"<details><summary>{escape(section)}</summary>{inside}</details>"
    body += f'<details><summary>Spread</summary><div class="plots">{spread}</div></details>' if spread else ""
    return body + ancestry(run)


def _said(
    stages: Sequence[Mapping[str, Any]], results: Sequence[Mapping[str, Any]], runs: Mapping[str, Recording | None]
) -> tuple[str, list[Line]]:
    reached = [met(row) for row in results]
    lines = [
        Line(
            {True: State.good, False: State.bad, None: State.note}[one],
            f"{row.get('name')}: {_plain(row.get('value'))}"
            + (f", target {_plain(row['target'])}" if row.get("target") is not None else "")
            + (f", best possible {_plain(row['optimum'])}" if row.get("optimum") is not None else ""),
        )
        for row, one in zip(results, reached, strict=True)
    ]
    if results:
        return f"{sum(one is True for one in reached)} of {len(results)} targets met.", lines
    done = sum(run is not None and run.finished for run in runs.values())
    return f"{done} of {len(stages)} stages finished.", lines


def _plain(value: Any) -> str:
    return number(value) if isinstance(value, int | float) and not isinstance(value, bool) else str(value)
