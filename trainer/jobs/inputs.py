"""What decides about a stage's output, and what of it changed since the stage was done."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from trainer.checkpoint.run_folder import FREE_TO_CHANGE, differences
from trainer.compose import compose, compose_raw
from trainer.config import ConfigError
from trainer.jobs.recipe import Recipe, Stage
from trainer.report.recording import flat

FREE = tuple(key for key in FREE_TO_CHANGE if key not in ("steps", "epochs", "imports", "export"))
"""Settings that do not make another model, so a stage that is done stays done when they change."""
SAMPLE = 1 << 16
"""Bytes read of the beginning and the end of a file to tell whether it changed."""


def made_of(stage: Stage, recipe: Recipe, parents: Mapping[str, str]) -> dict[str, Any]:
    """The configuration of a stage, the files that it reads, and the digests of its parents.

    Stages are called by name there, wherever their folders are.

    Raises:
        ConfigError: if its configuration cannot be composed.
    """
    arguments = stage.filled({s.name: f"stages/{s.name}" for s in recipe.stages} | {"out": "out", "folder": "folder"})
    if stage.run is None:
        config: dict[str, Any] = {"script": arguments}
        # The script itself is no input: another release of it has not changed what is done.
        texts = set(arguments[1:])
    else:
        # What cannot be resolved yet stays as it is written.
        tree: Any = OmegaConf.to_container(compose_raw(arguments, name="stage"), resolve=False)
        config = {key: value for key, value in flat(tree) if not any(f"{key}.".startswith(f"{free}.") for free in FREE)}
        texts = set(_texts(config))
    inputs = {text: fingerprint(Path(text)) for text in sorted(texts) if _is_input(text)}
    return {"config": config, "inputs": inputs, "parents": {name: parents[name] for name in stage.parents}}


def digest(made: Mapping[str, Any]) -> str:
    """Of what a stage is made of."""
    return hashlib.sha256(json.dumps(made, sort_keys=True, default=str).encode()).hexdigest()[:16]


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What is different, a phrase each."""
    phrases = [f"{key} was {old!r} and is {new!r}" for key, old, new in differences(before["config"], now["config"])]
    phrases += [f"{key} is new" for key in now["config"].keys() - before["config"].keys() if key == "script"]
    phrases += [f"the file {key} changed" for key, _, _ in differences(before["inputs"], now["inputs"])]
    old, new = before["parents"], now["parents"]
    if old.keys() != new.keys():
        return [*phrases, f"its parents were {', '.join(old)} and are {', '.join(new)}"]
    return phrases + [f"its parent {name} changed" for name in old if new[name] != old[name]]


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
    """Of names, sizes and samples of the content: corpora would take minutes to read."""
    content = hashlib.sha256()
    for file in sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]:
        size = file.stat().st_size
        content.update(f"{file.name}:{size}".encode())
        with file.open("rb") as stream:
            content.update(stream.read(SAMPLE))
            stream.seek(max(0, size - SAMPLE))
            content.update(stream.read(SAMPLE))
    return content.hexdigest()[:16]


def _texts(node: Any) -> Iterator[str]:
    if isinstance(node, Mapping | list):
        for value in node.values() if isinstance(node, Mapping) else node:
            yield from _texts(value)
    elif isinstance(node, str):
        yield node


def _is_input(text: str) -> bool:
    """Whether a setting is the path of a file or folder that comes from elsewhere."""
    is_path = len(text) < 1024 and ("/" in text or Path(text).suffix != "")
    return is_path and not text.startswith("stages/") and Path(text).exists()
