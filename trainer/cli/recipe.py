"""Carry out a recipe, the whole life of a model: each stage a process that starts from an earlier one's output.

    onecurve recipe tinyworld
    onecurve recipe tinyworld ranks=2 all.strategy=zero3 sft.optimizer.lr=0.002 folder=runs/mine
    onecurve recipe mine.yaml launcher=slurm slurm.nodes=4 slurm.gpus_per_node=8 slurm.time=600

    NAME                 configs/recipe/NAME.yaml, or the path of a file
    folder=DIR           where everything goes; default: what the recipe says
    launcher=local       local: here, on ranks=N processes; slurm: every stage a job that waits for those it starts from,
                         with slurm.*=... for 'onecurve submit'
    redo=true            do again what changed, and what depends on it, in fresh folders; nothing is overwritten
    STAGE.key=value      a setting of a stage; all.key=value of every run

The same command again skips what is finished and continues what was interrupted. A stage whose configuration changed, or that
of a stage before it, is refused, unless redo=true. lifecycle.json and report.html in the folder show the state.
"""

from __future__ import annotations

from collections.abc import Sequence

from filelock import FileLock, Timeout

from trainer.config import ConfigError, InputError
from trainer.jobs.lifecycle import Lifecycle
from trainer.jobs.recipe import Recipe
from trainer.jobs.stages import run_stages, submit_stages

OPTIONS = {"folder": "", "launcher": "local", "ranks": "", "redo": "false"}
CHOICES = {"launcher": ("local", "slurm"), "redo": ("true", "false")}


def main(arguments: Sequence[str]) -> int:
    """Do what is left to do; 0 if all of it is done and every target is met."""
    if {"-h", "--help"} & set(arguments):
        print(__doc__)
        return 0
    options, job, overrides = parse(arguments)
    recipe = Recipe.read(options["name"], overrides, options["folder"] or None)
    life = Lifecycle.open(recipe)
    recipe.folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(recipe.folder / ".lock", timeout=0):
            life.plan(redo=options["redo"] == "true")
            if options["launcher"] == "slurm":
                return submit_stages(life, job)
            return run_stages(life, int(options["ranks"] or recipe.ranks))
    except Timeout:
        raise InputError(
            f"folder={recipe.folder} is in use by another recipe; wait for it, or use another folder"
        ) from None


def parse(arguments: Sequence[str]) -> tuple[dict[str, str], list[str], list[str]]:
    """Options, arguments of Slurm jobs, and overrides of stages.

    Raises:
        ConfigError: with all that are wrong.
    """
    options, job, overrides, problems = {"name": "", **OPTIONS}, list[str](), list[str](), list[str]()
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if key.startswith("slurm."):
            job.append(argument.removeprefix("slurm."))
        elif not equals and not options["name"]:
            options["name"] = argument
        elif "." in key and equals:
            overrides.append(argument)
        elif key in OPTIONS and equals:
            options[key] = value
        else:
            problems.append(
                f"onecurve recipe has no argument {argument!r}; it has {', '.join(OPTIONS)} and STAGE.setting=value"
            )
    if not options["name"]:
        problems.append("a recipe is required: its name, such as tinyworld, or the path of its file")
    for key, choices in CHOICES.items():
        if options[key] not in choices:
            problems.append(f"{key}={options[key]} is not known; use {' or '.join(choices)}")
    if options["ranks"] and not (options["ranks"].isdigit() and int(options["ranks"])):
        problems.append(f"ranks={options['ranks']} is not a number of at least 1")
    if problems:
        raise ConfigError(problems, "This recipe")
    return options, job, overrides
