"""The whole life of a model in one report: results against their targets, answers by stage, and each stage's own plots."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trainer.disk import read_json
from trainer.report.catalogue import SECTIONS
from trainer.report.charts import by_section, figures
from trainer.report.histograms import histograms
from trainer.report.html import Html, details, duration, markup, number, tag
from trainer.report.page import opening, page, plots, statements
from trainer.report.recording import Recording, read
from trainer.report.tables import ancestry, plain, side_by_side, table
from trainer.report.verdict import Line, State, headline, verdict

RECORD = "lifecycle.json"
Row = Mapping[str, Any]
STATES = {True: (State.good, "✓ met"), False: (State.bad, "✕ missed"), None: (State.note, "–")}
"""By whether a result met its target; None: it has none."""


def lifecycle(folder: Path) -> str:
    """The page of a folder whose ``lifecycle.json`` lists ``stages``, ``results`` and ``samples``, each if there."""
    record = read_json(folder / RECORD)
    stages, results, answers = (_rows(record, key) for key in ("stages", "results", "samples"))
    runs = {stage["name"]: _run(folder, stage) for stage in stages}
    models = list(dict.fromkeys(key for row in answers for key in row["answers"]))
    prompts = [(str(row["prompt"]), row["answers"]) for row in answers]
    parts = {
        "Results": _results(results),
        "Stages": _stages(stages, runs),
        "Answers by stage": side_by_side(prompts, models, "The same prompt after each stage"),
    }
    parts |= {name: _stage(name, run) for name, run in runs.items() if run is not None and run.series}
    title = str(record.get("name") or folder.resolve().name)
    lines = [_result_line(row) for row in results]
    return page(title, opening(title, _headline(results, stages, runs), lines, {}), parts)


def _rows(record: Row, key: str) -> list[dict[str, Any]]:
    """A list of objects; stages are an object by name."""
    rows = record.get(key, [])
    return [{"name": name, **row} for name, row in rows.items()] if isinstance(rows, dict) else rows


def _run(folder: Path, stage: Row) -> Recording | None:
    """The run of a stage: its ``run_dir``, from here or from inside the folder."""
    if "run_dir" not in stage:
        return None
    named = Path(stage["run_dir"])
    places = (named, folder / named, folder / named.name)
    return next((read(place) for place in places if (place / "config.yaml").is_file()), None)


def _results(results: Sequence[Row]) -> Html:
    rows = []
    for row in results:
        state, word = STATES[row.get("met")]
        cells = [_shown(row.get("value")), _target(row), _shown(row.get("optimum"))]
        rows.append([str(row.get("name", "")), *cells, tag("span", word, class_=f"state {state}")])
    columns = ["What", "Value", "Target", "Known optimum", "Target met"]
    return table("What was reached, against the target and the best possible", columns, rows, numbers=(1, 2, 3))


def _stages(stages: Sequence[Row], runs: Mapping[str, Recording | None]) -> Html:
    rows = []
    for stage in stages:
        run, seconds = runs[stage["name"]], stage.get("seconds")
        time = "–" if seconds is None else duration(seconds)
        result = headline(figures(run)) if run is not None and run.series else "–"
        rows.append([stage["name"], stage["status"], time, ", ".join(stage.get("parents", [])) or "–", result])
    return table("Stages in their order", ["Stage", "Status", "Time", "Made from", "Result"], rows, numbers=(2,))


def _stage(name: str, run: Recording) -> Html:
    """A stage's statements and plots; those of its result are open."""
    drawn = figures(run)
    body = [statements(verdict(run, drawn))]
    for section, group in by_section(drawn).items():
        inside = plots(group, f"{name}-")
        body.append(inside if section == "learning" else details(SECTIONS[section], inside))
    if distributions := histograms(run, f"{name}-"):
        body.append(details("Distributions", plots([], more=distributions)))
    return markup(*body, ancestry(run))


def _result_line(row: Row) -> Line:
    text = f"{row.get('name')}: {_shown(row.get('value'))}"
    for key, words, value in (
        ("target", "target", _target(row)),
        ("optimum", "best possible", _shown(row.get("optimum"))),
    ):
        text += f", {words} {value}" if row.get(key) is not None else ""
    return Line(STATES[row.get("met")][0], text)


def _target(row: Row) -> str:
    """A target with its direction."""
    words = {"lower": "at most ", "higher": "at least "}.get(str(row.get("better")), "")
    return f"{words}{_shown(row['target'])}" if row.get("target") is not None else _shown(None)


def _headline(results: Sequence[Row], stages: Sequence[Row], runs: Mapping[str, Recording | None]) -> str:
    if results:
        return f"{sum(row.get('met') is True for row in results)} of {len(results)} targets met."
    done = sum(run is not None and run.finished for run in runs.values())
    return f"{done} of {len(stages)} stages finished."


def _shown(value: Any) -> str:
    if value is None:
        return "–"
    return number(value) if isinstance(value, int | float) and not isinstance(value, bool) else plain(value)
