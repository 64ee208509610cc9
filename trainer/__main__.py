"""``python -m trainer [overrides]``: compose, parse, run."""

from __future__ import annotations

from trainer import stopping

if __name__ == "__main__":
    # A scheduler's signal may come while torch is imported, and must not end the process then.
    stopping.listen()

import importlib
import itertools
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from trainer.config import ConfigError, parse
from trainer.jobs import sweep
from trainer.parallel import distributed
from trainer.parallel.environment import place

CONFIG_DIR = ("--config-dir", "-cd")
"""Flags before a folder of further YAML files."""


def main() -> None:
    """Run what the command line describes.

    Exit codes: 0 done, 1 the run failed, 2 the configuration cannot work, 75 stopped early and saved: run it again.
    """
    stopping.listen()
    arguments = sys.argv[1:]
    try:
        register(arguments)
    except ConfigError as error:
        raise SystemExit(refusal(error)) from None
    if "--help" in arguments or "-h" in arguments:
        from trainer.cli.help import help_text

        print(help_text(config_folder(), [a for a in arguments if not a.startswith("-")]))
        return
    sys.argv[1:] = [spelling_tolerant(argument) for argument in arguments]
    carry_out = hydra.main(version_base="1.3", config_path=str(config_folder()), config_name="train")
    if {"--multirun", "-m"} & set(arguments):
        points(carry_out, arguments)
    try:
        carry_out(task)()
    except SystemExit as end:
        if end.code == stopping.EXIT_CODE:
            leave(stopping.EXIT_CODE)
        raise
    leave()


def points(carry_out: Callable[[Callable[[DictConfig], Any]], Callable[[], Any]], arguments: Sequence[str]) -> NoReturn:
    """Run a sweep: Hydra composes its points, which are processes of their own, and the best come first in the summary.

    Exit codes: 0 at least one point is done, 1 none is, 2 it cannot work, 75 stopped early: the same command continues.
    """
    stopping.forget()  # signals are for the points
    logging.getLogger("alembic").setLevel(logging.WARNING)  # Optuna's storage greets with fifty lines
    if wrong := list(sweep.problems(arguments)):
        print(refusal(ConfigError(wrong)), file=sys.stderr)
        raise SystemExit(2)
    folders = [a.partition("=")[2] for a in arguments if a.startswith("hydra.sweep.dir=")] or [
        sweep.folder_of(arguments)
    ]
    sys.argv.append(f"hydra.sweep.dir={folders[-1]}")
    try:
        carry_out(sweep.point)()
    finally:
        done = sweep.summary(Path(folders[-1]), arguments)
    raise SystemExit(0 if done else 1)


def leave(code: int = 0) -> None:
    """End a process of several ranks at once.

    All files are closed by now. A gloo thread that lets go of a Python object while the interpreter shuts down aborts the
    process (seen in one of some fifty two-rank ZeRO-3 runs), and a launcher takes that for a failure of the run.
    """
    if distributed.ranks() > 1:
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    if code:
        raise SystemExit(code)


def task(cfg: DictConfig) -> Any:
    """What Hydra calls with the composed configuration, once a run; a sweep calls it for every point."""
    from trainer.models.load import Model
    from trainer.run import run

    try:
        typed = list(HydraConfig.get().overrides.task)
        if problems := list(Model.contradictions(typed)):
            raise ConfigError(problems)
        return run(parse(cfg))
    except ConfigError as error:
        print(refusal(error), file=sys.stderr)
        raise SystemExit(2) from None
    except stopping.Stopped as stop:
        if place().rank == 0:
            print(f"onecurve: {stop}", flush=True)
        raise SystemExit(stopping.EXIT_CODE) from None


def composed(arguments: Sequence[str], name: str | None = None, later: Sequence[str] = ()) -> Any:
    """The parsed configuration of a command line, for scripts that look at a run without starting it.

    ``arguments``: overrides, and ``--config-dir FOLDER``. ``name``: instead of the run's own. ``later``: as in
    `parse`.

    Raises:
        ConfigError: if it cannot work.
    """
    from trainer.models.load import Model

    register(list(arguments))
    overrides = [argument for argument in arguments if argument not in _folders_of(arguments) | {*CONFIG_DIR}]
    typed = [*([f"name={name}"] if name else []), *map(spelling_tolerant, overrides)]
    search = ",".join(f"file://{Path(folder).absolute()}" for folder in sorted(_folders_of(arguments)))
    with hydra.initialize_config_dir(str(config_folder()), version_base="1.3"):
        try:
            cfg = hydra.compose(
                "train",
                overrides=[*typed, *([f"hydra.searchpath=[{search}]"] if search else [])],
                return_hydra_config=True,
            )
        except HydraException as error:
            raise ConfigError([" ".join(str(error).partition("Config search path")[0].split())]) from None
    before = HydraConfig.instance().cfg
    HydraConfig.instance().set_config(cfg)
    try:
        problems = list(Model.contradictions(overrides))
        with read_write(cfg), open_dict(cfg):
            del cfg["hydra"]
        parsed = parse(cfg, later)
    except ConfigError as error:
        raise ConfigError(problems + error.problems) from None
    finally:
        HydraConfig.instance().cfg = before
    if problems:
        raise ConfigError(problems)
    return parsed


def refusal(error: ConfigError) -> str:
    """All problems of a configuration, one a line."""
    count = len(error.problems)
    head = "This configuration cannot work:" if count == 1 else f"This configuration cannot work, for {count} reasons:"
    return "\n".join([head, *(f"  - {problem}" for problem in error.problems)])


def config_folder() -> Path:
    """Where the YAML files are: inside an installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parent
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"


def register(arguments: Sequence[str]) -> None:
    """Import everything that registers a schema: ours, and the modules named by ``imports``.

    Raises:
        ConfigError: naming a module that cannot be imported.
    """
    importlib.import_module("trainer.run")
    problems = []
    for module in _imports(arguments):
        try:
            importlib.import_module(module)
        except ImportError as error:
            problems.append(f"imports={module} cannot be imported ({error}); is its folder on PYTHONPATH?")
    if problems:
        raise ConfigError(problems)


def _imports(arguments: Sequence[str]) -> Iterator[str]:
    """Modules named on the command line or in the experiment's file: their schemas must exist before Hydra composes."""
    folders = [config_folder(), *map(Path, _folders_of(arguments))]
    for argument in arguments:
        key, _, value = argument.lstrip("+").partition("=")
        if key == "imports":
            yield from DictConfig(OmegaConf.create(f"imports: {value}"))["imports"]
        if key == "experiment":
            for file in (folder / "experiment" / f"{value}.yaml" for folder in folders):
                if file.is_file():
                    yield from DictConfig(OmegaConf.load(file)).get("imports", [])


def _folders_of(arguments: Sequence[str]) -> set[str]:
    return {after for flag, after in itertools.pairwise(arguments) if flag in CONFIG_DIR}


def spelling_tolerant(argument: str) -> str:
    """Let an override of a root setting that does not exist reach `parse`, which knows what was meant."""
    from trainer.run import Run

    try:
        override = OverridesParser.create().parse_override(argument)
    except HydraException:
        return argument
    groups = {path.name for path in config_folder().iterdir() if path.is_dir()}
    root = str(override.key_or_group).partition(".")[0]
    known = root in Run.__dataclass_fields__ or root.partition("/")[0] in groups | {"hydra"}
    return argument if known or not override.type or argument.startswith(("+", "~")) else f"++{argument}"


if __name__ == "__main__":
    main()
