"""Recipes: stages that start from one another's outputs, what each is made of, and what changed since it was done."""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf

from trainer.checkpoint.run_folder import FREE_TO_CHANGE, differences
from trainer.compose import compose, compose_raw, config_folder
from trainer.config import ConfigError

REFERENCE = re.compile(r"\{(\w+)\}")
"""``{NAME}`` in an argument: what the stage NAME gives; ``{out}``: this stage's own folder; ``{folder}``: the recipe's."""
OWN = ("out", "folder")
STAGE_KEYS = ("run", "script", "enabled")
RECIPE_KEYS = ("name", "folder", "ranks", "all", "stages", "results")
RESULT_KEYS = ("of", "name", "metric", "optimum", "at_least", "at_most", "within", "halfway_from")
FREE = tuple(key for key in FREE_TO_CHANGE if key not in ("steps", "epochs", "imports", "export"))
"""Settings that do not make another model, so a stage that is done stays done when they change."""
SAMPLE = 1 << 16
"""Bytes read of the beginning and the end of a file to tell whether it changed."""


@dataclass(frozen=True)
class Stage:
    """A training run (``run``: its overrides) or a script (``script``: it and its arguments)."""

    name: str
    run: list[str] | None
    script: list[str] | None
    on: bool = True

    @property
    def arguments(self) -> list[str]:
        return self.run if self.run is not None else self.script or []

    @cached_property
    def parents(self) -> list[str]:
        """The stages whose output it needs, in the order in which they are named."""
        named = [name for argument in self.arguments for name in REFERENCE.findall(argument) if name not in OWN]
        return list(dict.fromkeys(named))

    def filled(self, places: Mapping[str, str]) -> list[str]:
        """Its arguments with paths for references."""
        return [REFERENCE.sub(lambda match: places[match[1]], argument) for argument in self.arguments]


@dataclass
class Recipe:
    """The life of a model. ``results``: the figures of the table, with what is known about them."""

    name: str
    folder: Path
    ranks: int
    stages: list[Stage]
    results: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def read(cls, named: str, overrides: Sequence[str] = (), folder: str | None = None) -> Recipe:
        """The recipe in ``configs/recipe/``, or in a file; ``overrides``: ``STAGE.key=value`` or ``all.key=value``.

        Raises:
            ConfigError: with everything that is wrong with it.
        """
        file = Path(named) if named.endswith((".yaml", ".yml")) else config_folder() / "recipe" / f"{named}.yaml"
        if not file.is_file():
            known = ", ".join(sorted(path.stem for path in (config_folder() / "recipe").glob("*.yaml")))
            raise ConfigError([f"recipe={named} does not exist; use {known}, or the path of a YAML file"])
        held = yaml.safe_load(file.read_text())
        problems = list(_problems(held))
        if problems:
            raise ConfigError([f"{file}: {problem}" for problem in problems])
        own = _overrides(overrides, held["stages"], problems)
        off = {name for name, stage in held["stages"].items() if not stage.get("enabled", True)}
        stages = []
        for name, stage in held["stages"].items():
            run, script = stage.get("run"), stage.get("script")
            if script is not None:
                if own[name]:
                    problems.append(f"{name}.{own[name][0]}: {name} is a script, which has no settings")
                script = [str(part) for part in script if not off & set(REFERENCE.findall(str(part)))]
            if run is not None:
                run = [*run, *held.get("all", []), *own["all"], *own[name]]
            stages.append(Stage(name, run, script, name not in off))
        for stage in (stage for stage in stages if stage.on):
            problems += [f"stages.{stage.name} needs {p}, which is off" for p in stage.parents if p in off]
        if problems:
            raise ConfigError(problems)
        place = Path(folder or held.get("folder") or f"runs/lifecycle/{held['name']}")
        return cls(held["name"], place, int(held.get("ranks", 1)), stages, held.get("results", []))


def _problems(held: Any) -> Iterator[str]:
    """What is wrong with the file."""
    if not isinstance(held, Mapping) or not isinstance(held.get("stages"), Mapping) or "name" not in held:
        yield "a recipe has a name and stages"
        return
    yield from _unknown("the recipe", held, RECIPE_KEYS)
    before: list[str] = []
    for name, stage in held["stages"].items():
        where = f"stages.{name}"
        if not re.fullmatch(r"\w+", str(name)) or name in (*OWN, "all", "slurm"):
            yield f"{where} is no name of a stage; use letters and digits, and none of {', '.join(OWN)}, all, slurm"
        if not isinstance(stage, Mapping) or sum(isinstance(stage.get(kind), list) for kind in ("run", "script")) != 1:
            yield f"{where} has neither run nor script, or both; give one of them, as a list of arguments"
            continue
        yield from _unknown(where, stage, STAGE_KEYS)
        arguments: list[Any] = stage.get("run") or stage.get("script") or []
        for reference in (r for argument in arguments for r in REFERENCE.findall(str(argument))):
            if reference not in (*OWN, *before):
                yield f"{where} names {{{reference}}}, which is no stage before it; there are {', '.join(before) or 'none'}"
        before.append(name)
    for number, result in enumerate(held.get("results", [])):
        yield from _unknown(f"results[{number}]", result, RESULT_KEYS)
        for key in ("metric", "halfway_from"):
            if key in result and str(result[key]).partition(":")[0] not in before:
                yield f"results[{number}].{key}={result[key]} names no stage; write STAGE:METRIC"


def _unknown(where: str, held: Mapping[str, Any], known: Sequence[str]) -> Iterator[str]:
    for key in held:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            yield f"{where} has no '{key}'; {f'did you mean {near[0]!r}?' if near else 'it has ' + ', '.join(known)}"


def _overrides(given: Sequence[str], stages: Mapping[str, Any], problems: list[str]) -> dict[str, list[str]]:
    """Overrides by stage, and those of ``all`` runs."""
    found: dict[str, list[str]] = {name: [] for name in (*stages, "all")}
    for override in given:
        name, _, rest = override.partition(".")
        if name not in found or "=" not in rest:
            problems.append(
                f"{override} is no override; write STAGE.setting=value, STAGE being all, {', '.join(stages)}"
            )
        else:
            found[name].append(rest)
    return found


def made_of(stage: Stage, recipe: Recipe, parents: Mapping[str, str]) -> dict[str, Any]:
    """What decides about a stage's output: its configuration, the files it reads, and the digests of its parents.

    Stages are called by name there, wherever their folders are.
    """
    names = {name: f"stages/{name}" for name in (s.name for s in recipe.stages)} | {"out": "out", "folder": "folder"}
    arguments = stage.filled(names)
    if stage.run is None:
        held: dict[str, Any] = {"script": arguments}
    else:
        held = _flat(compose_raw(arguments, name="stage"))
        held = {k: v for k, v in held.items() if not any(k == free or k.startswith(f"{free}.") for free in FREE)}
    # The script itself is no input: another release of it has not changed what is done.
    texts = set(arguments[1:]) if stage.run is None else set(_texts(held))
    inputs = {text: sampled(Path(text)) for text in sorted(texts) if _is_input(text)}
    return {"config": held, "inputs": inputs, "parents": {name: parents[name] for name in stage.parents}}


def digest(made: Mapping[str, Any]) -> str:
    """Of what a stage is made of."""
    return hashlib.sha256(json.dumps(made, sort_keys=True, default=str).encode()).hexdigest()[:16]


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What is different, a phrase each."""
    found = [f"{key} was {old!r} and is {new!r}" for key, old, new in differences(before["config"], now["config"])]
    found += [f"{key} is new" for key in now["config"].keys() - before["config"].keys() if key == "script"]
    found += [f"the file {key} changed" for key, _, _ in differences(before["inputs"], now["inputs"])]
    if before["parents"].keys() != now["parents"].keys():
        return [*found, f"its parents were {', '.join(before['parents'])} and are {', '.join(now['parents'])}"]
    return found + [
        f"its parent {name} changed" for name, value in before["parents"].items() if now["parents"][name] != value
    ]


def refusals(stage: Stage, places: Mapping[str, str], missing: Sequence[str]) -> list[str]:
    """What cannot work in a run's configuration; ``missing``: outputs of stages to come, which are not there yet."""
    if stage.run is None:
        return []
    try:
        compose(stage.filled(places), name="stage", later=missing)
    except ConfigError as error:
        return [f"{stage.name}: {problem}" for problem in error.problems]
    return []


def _flat(cfg: Any) -> dict[str, Any]:
    """Settings by full name; what cannot be resolved yet stays as it is written."""
    found: dict[str, Any] = {}

    def walk(node: Any, path: str) -> None:
        for key, value in node.items():
            name = f"{path}.{key}" if path else str(key)
            if isinstance(value, dict) and value:
                walk(value, name)
            else:
                found[name] = value

    walk(OmegaConf.to_container(cfg, resolve=False), "")
    return found


def _texts(node: Any) -> Iterator[str]:
    if isinstance(node, Mapping):
        for value in node.values():
            yield from _texts(value)
    elif isinstance(node, list):
        for value in node:
            yield from _texts(value)
    elif isinstance(node, str):
        yield node


def _is_input(text: str) -> bool:
    """Whether a setting is the path of a file or folder that comes from elsewhere."""
    looks = len(text) < 1024 and ("/" in text or Path(text).suffix != "")
    return looks and not text.startswith("stages/") and Path(text).exists()


def sampled(path: Path) -> str:
    """A fingerprint of names, sizes and samples of the content: whole corpora would take minutes to read."""
    whole = hashlib.sha256()
    for file in sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]:
        size = file.stat().st_size
        whole.update(f"{file.name}:{size}".encode())
        with file.open("rb") as stream:
            whole.update(stream.read(SAMPLE))
            stream.seek(max(0, size - SAMPLE))
            whole.update(stream.read(SAMPLE))
    return whole.hexdigest()[:16]
