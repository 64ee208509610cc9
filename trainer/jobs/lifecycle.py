"""The state of a lifecycle: ``lifecycle.json``, which stages are done, in which folders, and what their results are."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainer.checkpoint.record import read_record
from trainer.config import ConfigError
from trainer.disk import read_objects, write_text
from trainer.export.lineage import RECORD as PROVENANCE
from trainer.export.lineage import git_commit
from trainer.jobs.inputs import Made, made_of, stage_problems
from trainer.jobs.recipe import Recipe, Stage
from trainer.report.lifecycle import RECORD

DONE = ".done"
"""Left in the folder of a script that succeeded; a run leaves its export."""
SHOWN = 12
"""Prompts whose answers are kept in ``lifecycle.json``."""


@dataclass
class Lifecycle:
    """A recipe together with what has been done of it in its folder."""

    recipe: Recipe
    record: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def open(cls, recipe: Recipe) -> Lifecycle:
        """With the record in the folder; nothing is written.

        Raises:
            ConfigError: if the folder holds something else.
        """
        file = recipe.folder / RECORD
        if file.is_file():
            return cls(recipe, json.loads(file.read_text()))
        if recipe.folder.is_dir() and any(p.name != ".lock" for p in recipe.folder.iterdir()):
            raise ConfigError([f"folder={recipe.folder} is not empty and not of a lifecycle; use another folder"])
        return cls(recipe, {"name": recipe.name, "stages": {}})

    def plan(self, *, redo: bool) -> None:
        """Compare every stage with what was done, and give each its folder.

        Raises:
            ConfigError: naming what changed since a stage was begun, unless ``redo``.
        """
        problems, digests = list[str](), dict[str, str]()
        for stage in self.recipe.stages:
            entry = self.stages.setdefault(stage.name, {"status": "waiting"})
            if not stage.enabled:
                entry["status"] = "off" if entry["status"] in ("waiting", "off") else entry["status"]
                continue
            made = self._made_of(stage, digests)
            changed = made.changes(entry["made_of"]) if "made_of" in entry else []
            if "made_of" in entry and not changed:
                # A setting that came with a later release gives another digest, and changes nothing.
                digests[stage.name] = entry["digest"]
                continue
            if entry["status"] != "waiting":
                problems += [f"{stage.name}: {change}" for change in changed]
            digests[stage.name] = made.digest()
            self.stages[stage.name] = {
                "status": "waiting",
                "kind": "script" if stage.run is None else "run",
                "run_dir": str(self._free_folder(stage.name)),
                "parents": stage.parents,
                "digest": digests[stage.name],
                "made_of": made.as_json(),
            }
        if problems and not redo:
            remedy = "set it back, or use redo=true: what changed is then done again in fresh folders"
            raise ConfigError([*problems, remedy])
        self.record["stages"] = {s.name: self.stages[s.name] for s in self.recipe.stages}

    def _made_of(self, stage: Stage, digests: Mapping[str, str]) -> Made:
        try:
            return made_of(stage, self.recipe, digests)
        except ConfigError as error:
            raise ConfigError([f"{stage.name}: {problem}" for problem in error.problems]) from None

    @property
    def waiting(self) -> list[Stage]:
        """Stages that are still to be done."""
        return [stage for stage in self.recipe.stages if stage.enabled and not self.done(stage.name)]

    def validate(self, only: Stage | None = None) -> None:
        """Refuse runs that cannot work, before any of them starts; or ``only`` one, whose parents are done by now.

        Raises:
            ConfigError: with the problems of all of them.
        """
        missing = [str(self.out(stage.name)) for stage in self.waiting]
        # What a script is yet to write is validated when it is there.
        scripts = {stage.name for stage in self.waiting if stage.run is None}
        ready = [only] if only else [stage for stage in self.waiting if not scripts & set(stage.parents)]
        if problems := [p for stage in ready for p in stage_problems(stage, self.places(stage.name), missing)]:
            raise ConfigError(problems)

    @property
    def stages(self) -> dict[str, dict[str, Any]]:
        return self.record["stages"]  # type: ignore[no-any-return]

    def done(self, name: str) -> bool:
        """Whether a stage is finished and its output there."""
        entry = self.stages[name]
        if entry["status"] not in ("done", "submitted"):
            return False
        return self.exported(name) if entry["kind"] == "run" else (Path(entry["run_dir"]) / DONE).is_file()

    def exported(self, name: str) -> bool:
        """Whether a run has come to its end."""
        return (self.out(name) / PROVENANCE).is_file()

    def out(self, name: str) -> Path:
        """What a stage gives: a run its export, a script its folder."""
        place = Path(self.stages[name]["run_dir"])
        return place / "export" if self.stages[name]["kind"] == "run" else place

    def places(self, name: str) -> dict[str, str]:
        """The paths that a stage's references stand for."""
        outputs = {n: str(self.out(n)) for n, entry in self.stages.items() if "run_dir" in entry}
        return {**outputs, "out": self.stages[name]["run_dir"], "folder": str(self.recipe.folder)}

    def begin(self, stage: Stage) -> None:
        """A stage starts, or goes on; a script that was interrupted starts afresh, in another folder."""
        entry = self.stages[stage.name]
        if entry["kind"] == "script" and Path(entry["run_dir"]).exists():
            entry["run_dir"] = str(self._free_folder(stage.name))
        entry.setdefault("began", time.time())
        entry["status"] = "running"
        self.save()

    def end(self, stage: Stage, status: str, seconds: float = 0.0) -> None:
        """A stage is ``done``, ``failed``, ``interrupted`` or ``submitted``; ``seconds``: of this attempt."""
        entry = self.stages[stage.name]
        entry["status"], entry["seconds"] = status, round(entry.get("seconds", 0.0) + seconds, 1)
        if status == "done" and entry["kind"] == "script":
            (Path(entry["run_dir"]) / DONE).touch()
        self.save()

    def save(self) -> None:
        """Write ``lifecycle.json``, with what is known by now."""
        self.record |= {"results": list(self.results()), "samples": self.samples(), "git": git_commit(Path.cwd())}
        self.recipe.folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(self.record, indent=1, ensure_ascii=False, default=str)
        write_text(self.recipe.folder / RECORD, f"{text}\n")

    def results(self) -> Iterator[dict[str, Any]]:
        """The table: value, target and known optimum of every result whose stage is done."""
        for result in self.recipe.results:
            stage, _, metric = result["metric"].partition(":")
            of, value = result.get("of", stage), self.value(result["metric"])
            if value is None:
                continue
            optimum = result.get("optimum")
            if optimum == "floor":
                optimum = self._floor(stage, metric)
            target, better = self._target(result, optimum)
            row = {"name": f"{of}: {result.get('name', metric)}", "of": of, "value": value, "optimum": optimum}
            if target is not None:
                met = value <= target if better == "lower" else value >= target
                row |= {"target": target, "better": better, "met": met}
            yield row

    def value(self, named: str) -> float | None:
        """The last value of ``STAGE:METRIC``; None as long as there is none."""
        stage, _, metric = named.partition(":")
        entry = self.stages.get(stage, {})
        if entry.get("status") != "done":
            return None
        if entry["kind"] == "run":
            rows = read_objects(Path(entry["run_dir"]) / "metrics.jsonl")
            return next((float(row[metric]) for row in reversed(rows) if metric in row), None)
        file = Path(entry["run_dir"]) / "metrics.json"
        node: Any = json.loads(file.read_text()) if file.is_file() else {}
        for key in metric.split("/"):
            node = node.get(key) if isinstance(node, Mapping) else None
        return None if node is None else float(node)

    def samples(self) -> list[dict[str, Any]]:
        """The first prompts with every model's answer, out of whichever script left ``answers.jsonl``."""
        for entry in self.stages.values():
            file = Path(entry.get("run_dir", "")) / "answers.jsonl"
            if entry["status"] == "done" and file.is_file():
                return read_objects(file)[:SHOWN]
        return []

    def _target(self, result: Mapping[str, Any], optimum: Any) -> tuple[float | None, str]:
        """The value to reach, and which side of it is better."""
        if "halfway_from" in result:
            start = self.value(result["halfway_from"])
            return (None if start is None else (start + optimum) / 2), "higher"
        if "within" in result:
            return (None if optimum is None else optimum * (1 + result["within"])), "lower"
        if "at_most" in result:
            return result["at_most"], "lower"
        return result.get("at_least"), "higher"

    def _floor(self, stage: str, metric: str) -> float | None:
        facts = read_record(Path(self.stages[stage]["run_dir"]) / "config.yaml")["facts"]
        return facts.get("floors", {}).get(metric)  # type: ignore[no-any-return]

    def _free_folder(self, name: str) -> Path:
        """A folder for a stage that does not exist yet."""
        taken = {entry.get("run_dir") for entry in self.stages.values()}
        names = (self.recipe.folder / (name if n == 1 else f"{name}-{n}") for n in range(1, 1_000_000))
        return next(place for place in names if not place.exists() and str(place) not in taken)
