"""Recipes: the stages of a model's life, which start from one another's outputs."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from trainer.compose import config_folder
from trainer.config import ConfigError
from trainer.disk import read_text

REFERENCE = re.compile(r"\{(\w+)\}")
"""``{NAME}`` in an argument: what the stage NAME gives; ``{out}``: this stage's own folder; ``{folder}``: the recipe's."""
OWN = ("out", "folder")
RESERVED = (*OWN, "all", "slurm")
"""Names that a stage cannot have."""
STAGE_KEYS = ("run", "script", "enabled")
RECIPE_KEYS = ("name", "folder", "ranks", "all", "stages", "results")
RESULT_KEYS = ("of", "name", "metric", "optimum", "at_least", "at_most", "within", "halfway_from")
ROOT = Path(__file__).resolve().parents[2]
"""The folder that the package lies in."""


@dataclass(frozen=True)
class Stage:
    """A training run, or a script.

    Attributes:
        name: unique in the recipe.
        run: overrides of a run, else None.
        script: a verb of ``onecurve``, a dotted module or a ``.py`` file, and its arguments; None for a run.
        enabled: False leaves it out.
    """

    name: str
    run: list[str] | None
    script: list[str] | None
    enabled: bool = True

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

    def command(self, places: Mapping[str, str]) -> list[str]:
        """The arguments of the interpreter that carries it out."""
        arguments = self.filled(places)
        if self.run is not None:
            return ["-m", "trainer", "train", *arguments, f"run_dir={places['out']}", f"name={self.name}"]
        program, *rest = arguments
        if program.endswith(".py"):
            return [program if Path(program).is_file() else str(ROOT / program), *rest]
        return ["-m", program, *rest] if "." in program else ["-m", "trainer", program, *rest]


@dataclass
class Recipe:
    """The life of a model.

    Attributes:
        name: of the recipe.
        folder: where everything goes.
        ranks: processes of a run on this machine.
        stages: in their order.
        results: the figures to report, with targets and known optima.
    """

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
        content = _load(named)
        entries = content["stages"]
        off = {name for name, entry in entries.items() if not entry.get("enabled", True)}
        own, problems = _by_stage(overrides, entries)
        stages = []
        for name, entry in entries.items():
            run, script = entry.get("run"), entry.get("script")
            if run is not None:
                run = [*run, *content.get("all", []), *own["all"], *own[name]]
            elif own[name]:
                problems.append(f"{name}.{own[name][0]}: {name} is a script, which has no settings")
            if script is not None:  # a comparison leaves out the models of stages that are off
                script = [str(part) for part in script if not off & set(REFERENCE.findall(str(part)))]
            stages.append(Stage(name, run, script, name not in off))
        enabled = [stage for stage in stages if stage.enabled]
        problems += [
            f"stages.{s.name} needs {parent}, which is off" for s in enabled for parent in s.parents if parent in off
        ]
        if problems:
            raise ConfigError(problems)
        place = Path(folder or content.get("folder") or f"runs/lifecycle/{content['name']}")
        return cls(content["name"], place, int(content.get("ranks", 1)), stages, content.get("results", []))


def _load(named: str) -> dict[str, Any]:
    """The content of a recipe's file, validated."""
    folder = config_folder() / "recipe"
    file = Path(named) if named.endswith((".yaml", ".yml")) else folder / f"{named}.yaml"
    if not file.is_file():
        known = ", ".join(sorted(path.stem for path in folder.glob("*.yaml")))
        raise ConfigError([f"recipe={named} does not exist; use {known}, or the path of a YAML file"])
    content = yaml.safe_load(read_text(file))
    if not isinstance(content, dict) or not isinstance(content.get("stages"), Mapping) or "name" not in content:
        raise ConfigError([f"{file}: a recipe has a name and stages"])
    problems = list(_unknown_keys("the recipe", content, RECIPE_KEYS))
    before: list[str] = []
    for name, entry in content["stages"].items():
        problems += _stage_problems(f"stages.{name}", str(name), entry, before)
        before.append(name)
    for number, result in enumerate(content.get("results", [])):
        problems += _result_problems(f"results[{number}]", result, before)
    if problems:
        raise ConfigError([f"{file}: {problem}" for problem in problems])
    return content


def _stage_problems(where: str, name: str, entry: Any, before: Sequence[str]) -> Iterator[str]:
    if not re.fullmatch(r"\w+", name) or name in RESERVED:
        yield f"{where} is not a valid name; use letters and digits, and none of {', '.join(RESERVED)}"
    if not isinstance(entry, Mapping) or sum(isinstance(entry.get(kind), list) for kind in ("run", "script")) != 1:
        yield f"{where} has neither run nor script, or both; give one of them, as a list of arguments"
        return
    yield from _unknown_keys(where, entry, STAGE_KEYS)
    for argument in entry.get("run") or entry.get("script") or []:
        for reference in REFERENCE.findall(str(argument)):
            if reference not in (*OWN, *before):
                there_are = ", ".join(before) or "none"
                yield f"{where} names {{{reference}}}, which is no stage before it; there are {there_are}"


def _result_problems(where: str, result: Mapping[str, Any], stages: Sequence[str]) -> Iterator[str]:
    yield from _unknown_keys(where, result, RESULT_KEYS)
    for key in ("metric", "halfway_from"):
        if key in result and str(result[key]).partition(":")[0] not in stages:
            yield f"{where}.{key}={result[key]} names no stage; write STAGE:METRIC"


def _unknown_keys(where: str, entry: Mapping[str, Any], known: Sequence[str]) -> Iterator[str]:
    for key in entry:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            yield f"{where} has no '{key}'; {f'did you mean {near[0]!r}?' if near else 'it has ' + ', '.join(known)}"


def _by_stage(overrides: Sequence[str], stages: Mapping[str, Any]) -> tuple[dict[str, list[str]], list[str]]:
    """Overrides by stage, and those of ``all`` runs; and what is wrong with the others."""
    by_stage: dict[str, list[str]] = {name: [] for name in (*stages, "all")}
    problems = []
    for override in overrides:
        name, _, rest = override.partition(".")
        if name in by_stage and "=" in rest:
            by_stage[name].append(rest)
        else:
            expected = f"STAGE.setting=value, STAGE being all, {', '.join(stages)}"
            problems.append(f"{override} is not a valid override; expected {expected}")
    return by_stage, problems
