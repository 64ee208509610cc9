"""What decides about a stage's output, and what of it changed since the stage was done."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.checkpoint.record import FREE_TO_CHANGE, Setting, differences, is_free, plain, settings
from trainer.compose import compose, compose_raw
from trainer.config import ConfigError
from trainer.data.lost_texts import leaves
from trainer.disk import digest
from trainer.jobs.recipe import Recipe, Stage

FREE = tuple(key for key in FREE_TO_CHANGE if key not in ("steps", "epochs", "imports", "export"))
"""Settings that do not make another model, so a stage that is done stays done when they change."""
DIGITS = 24
"""Of a file's digest. Releases before 0.2 wrote 16, of samples, which are not compared."""


@dataclass(frozen=True)
class Made:
    """What decides about a stage's output.

    settings: its configuration, without what is free; a script's arguments
    inputs: digests of the files that it reads, by path
    parents: digests of the stages that it starts from, by name
    """

    settings: list[Setting]
    inputs: dict[str, str]
    parents: dict[str, str]

    def as_json(self) -> dict[str, Any]:
        """As ``lifecycle.json`` has it."""
        config = {setting.name: setting.value for setting in self.settings}
        return {"config": config, "inputs": self.inputs, "parents": self.parents}

    def digest(self) -> str:
        """Of all of it."""
        return hashlib.sha256(json.dumps(self.as_json(), sort_keys=True, default=str).encode()).hexdigest()[:16]

    def changes(self, before: Mapping[str, Any]) -> list[str]:
        """What is different from what ``lifecycle.json`` has, a phrase each."""
        every = differences(before["config"], self.settings)
        phrases = [f"{key} was {old!r} and is {new!r}" for key, old, new in every]
        for path in sorted(before["inputs"].keys() | self.inputs.keys()):
            old, new = before["inputs"].get(path), self.inputs.get(path)
            how = "is new" if old is None else "is no longer read" if new is None else "changed"
            phrases += [f"the file {path} {how}"] if old != new and len(old or new or "") == DIGITS else []
        if before["parents"].keys() != self.parents.keys():
            return [*phrases, f"its parents were {', '.join(before['parents'])} and are {', '.join(self.parents)}"]
        before_by_name = before["parents"]
        return phrases + [f"its parent {name} changed" for name, p in self.parents.items() if before_by_name[name] != p]


def made_of(stage: Stage, recipe: Recipe, parents: Mapping[str, str]) -> Made:
    """What a stage is made of: its configuration, the files that it reads, and the digests of its parents.

    Stages are called by name there, wherever their folders are.

    Raises:
        ConfigError: if its configuration cannot be composed.
    """
    arguments = stage.filled({s.name: f"stages/{s.name}" for s in recipe.stages} | {"out": "out", "folder": "folder"})
    if stage.run is None:
        # The script itself is no input: another release of it has not changed what is done.
        every, texts = [Setting("script", plain(arguments), arguments, is_default=False)], set(arguments[1:])
    else:
        # What cannot be resolved yet stays as it is written.
        every = [one for one in settings(compose_raw(arguments, name="stage")) if not is_free(one.name, FREE)]
        texts = {leaf for one in every for leaf in leaves(one.used) if isinstance(leaf, str)}
    inputs = {text: fingerprint(Path(text)) for text in sorted(texts) if _is_input(text)}
    return Made(every, inputs, {name: parents[name] for name in stage.parents})


def stage_problems(stage: Stage, places: Mapping[str, str], later: Sequence[str]) -> list[str]:
    """What cannot work in a run's configuration; ``later``: outputs of stages to come, which are not there yet."""
    if stage.run is None:
        return []
    try:
        compose(stage.filled(places), name="stage", later=later)
    except ConfigError as error:
        return [f"{stage.name}: {problem}" for problem in error.problems]
    return []


def fingerprint(path: Path) -> str:
    """Of the names and all of the content of a file, or of the files in a folder."""
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    return hashlib.sha256(json.dumps([[file.name, digest(file)] for file in files]).encode()).hexdigest()[:DIGITS]


def _is_input(text: str) -> bool:
    """Whether a setting is the path of a file or folder that comes from elsewhere."""
    is_path = len(text) < 1024 and ("/" in text or Path(text).suffix != "")
    return is_path and not text.startswith("stages/") and Path(text).exists()
