"""Train a model, from its configuration to an exported Hugging Face folder.

    onecurve train experiment=tinyworld
    torchrun --nproc-per-node 2 -m trainer experiment=tinyworld strategy=zero2

The same command again continues an interrupted run.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from pathlib import Path

import hydra

from trainer import stopping
from trainer.cli.help import help_text
from trainer.compose import compose, compose_raw, config_folder, register_imports, spelling_tolerant
from trainer.config import ConfigError
from trainer.jobs import sweep
from trainer.parallel.environment import place
from trainer.run import run


def main(arguments: Sequence[str]) -> int:
    """Run what the command line describes."""
    if not arguments:
        print(__doc__, "\n'onecurve train --help' lists every setting; configs/experiment/ has complete runs.", sep="")
        return 0
    config_dirs, rest = split_config_dirs(arguments)
    overrides = [argument for argument in rest if not argument.startswith("-")]
    if {"-h", "--help"} & set(rest):
        print(help_text(overrides, config_dirs))
        return 0
    if overrides != rest:
        register_imports(overrides, config_dirs)
        sys.argv = ["onecurve", *map(spelling_tolerant, arguments)]
        if {"--multirun", "-m"} & set(rest):
            return run_sweep(arguments)
        settings = [word for word in overrides if "=" in word or word.startswith("~")]  # not the values of flags
        compose_raw(settings, config_dirs=config_dirs)  # Hydra's own message would have no remedy
        hydra_app()  # --cfg, --info and the like: Hydra shows what it composes and runs nothing
        return 0
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    try:
        run(compose(overrides, config_dirs=config_dirs))
    except stopping.Stopped as stop:
        if place().rank == 0:
            print(f"onecurve: {stop}", flush=True)
        return stopping.EXIT_CODE
    return 0


def split_config_dirs(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """The folders after ``--config-dir``, and the other arguments."""
    folders, rest, words = [], [], iter(arguments)
    for word in words:
        flag, equals, value = word.partition("=")
        if flag in ("--config-dir", "-cd"):
            folders.append(value if equals else next(words, ""))
        else:
            rest.append(word)
    return folders, rest


hydra_app = hydra.main(version_base="1.3", config_path=str(config_folder()), config_name="train")(sweep.point)


def run_sweep(arguments: Sequence[str]) -> int:
    """Run a sweep: Hydra composes its points, which are processes of their own, and the best come first in the summary.

    Returns:
        The exit code: 0 at least one point is done, 1 none is.
    """
    stopping.forget()  # signals are for the points
    logging.getLogger("alembic").setLevel(logging.WARNING)  # Optuna's storage greets with fifty lines
    if problems := list(sweep.problems(arguments)):
        raise ConfigError(problems)
    given = [argument.partition("=")[2] for argument in arguments if argument.startswith("hydra.sweep.dir=")]
    folder = given[-1] if given else sweep.folder_of(arguments)
    sys.argv.append(f"hydra.sweep.dir={folder}")
    try:
        hydra_app()
    finally:
        done = sweep.summary(Path(folder), arguments)
    return 0 if done else 1
