"""Carry out a recipe, the whole life of a model: each stage a process that starts from an earlier one's output.

    python scripts/lifecycle.py recipe=tinyworld
    python scripts/lifecycle.py recipe=tinyworld ranks=2 all.strategy=zero3 sft.optimizer.lr=0.002 folder=runs/mine
    python scripts/lifecycle.py recipe=mine.yaml launcher=slurm slurm.nodes=4 slurm.gpus_per_node=8 slurm.time=600

    recipe=NAME          configs/recipe/NAME.yaml, or the path of a file
    folder=DIR           where everything goes; default: what the recipe says
    launcher=local       local: here, on ranks=N processes; slurm: every stage a job that waits for those it starts from,
                         with slurm.*=... for launch/submit.py
    redo=true            do again what changed, and what depends on it, in fresh folders; nothing is overwritten
    STAGE.key=value      a setting of a stage; all.key=value of every run

The same command again skips what is finished and continues what was interrupted. A stage whose configuration changed, or that
of a stage before it, is refused, unless redo=true. `lifecycle.json` and `report.html` in the folder say how it stands.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from filelock import FileLock, Timeout

from trainer.cli import refusal
from trainer.config import ConfigError
from trainer.jobs.launching import Interrupted, Local, Overview
from trainer.jobs.lifecycle import Lifecycle
from trainer.jobs.recipe import Recipe

ROOT = Path(__file__).resolve().parent.parent
STOPPED = 75
"""Exit code of a run that was told to stop, and saved."""
OWN = {"recipe": "tinyworld", "folder": "", "launcher": "local", "ranks": "", "redo": "false"}


@dataclass
class Command:
    """What the command line says."""

    own: dict[str, str] = field(default_factory=lambda: dict(OWN))
    slurm: list[str] = field(default_factory=list)
    overrides: list[str] = field(default_factory=list)

    @classmethod
    def read(cls, arguments: Sequence[str]) -> Command:
        """Sort the arguments.

        Raises:
            ConfigError: with all that are wrong.
        """
        found, problems = cls(), list[str]()
        for argument in arguments:
            key, equals, value = argument.partition("=")
            if key.startswith("slurm."):
                found.slurm.append(argument.removeprefix("slurm."))
            elif "." in key and equals:
                found.overrides.append(argument)
            elif key in OWN and equals:
                found.own[key] = value
            else:
                problems.append(
                    f"lifecycle.py has no argument {argument!r}; it has {', '.join(OWN)} and STAGE.setting=value"
                )
        choices = {"launcher": ("local", "slurm"), "redo": ("true", "false")}
        for key, known in choices.items():
            if found.own[key] not in known:
                problems.append(f"{key}={found.own[key]} is not known; use {' or '.join(known)}")
        if found.own["ranks"] and not (found.own["ranks"].isdigit() and int(found.own["ranks"])):
            problems.append(f"ranks={found.own['ranks']} is not a number of at least 1")
        if problems:
            raise ConfigError(problems)
        return found


def main(arguments: Sequence[str]) -> int:
    """Do what is left to do; 0 if all of it is done and every target is met."""
    if {"-h", "--help"} & set(arguments):
        print(__doc__)
        return 0
    started = time.monotonic()
    try:
        command = Command.read(arguments)
        recipe = Recipe.read(command.own["recipe"], command.overrides, command.own["folder"] or None)
        ranks = int(command.own["ranks"] or recipe.ranks)
        life = Lifecycle.open(recipe)
        recipe.folder.mkdir(parents=True, exist_ok=True)
        with FileLock(recipe.folder / ".lock", timeout=0):
            life.plan(redo=command.own["redo"] == "true")
            if command.own["launcher"] == "slurm":
                return submit(life, command)
            return carry_out(life, ranks, started)
    except ConfigError as error:
        print(refusal(error), file=sys.stderr)
        return 2
    except Timeout:
        print(
            f"folder={recipe.folder} is in use by another lifecycle; wait for it, or use another folder",
            file=sys.stderr,
        )
        return 2


def carry_out(life: Lifecycle, ranks: int, started: float) -> int:
    """Run the stages that are left, here, one after the other."""
    life.check()
    checked = {name for name in life.stages if life.done(name)}
    launcher = Local(ranks, life.recipe.folder / "logs")
    with Overview(life) as overview:
        for stage in (stage for stage in life.recipe.stages if stage.on):
            if life.done(stage.name):
                if stage.name in checked:
                    overview.say(f"{stage.name}: done before, in {life.stages[stage.name]['run_dir']}")
                continue
            if stage.run is not None:
                # What was still to be written when all stages were looked at is there by now.
                life.check(stage)
            life.begin(stage)
            began, places = time.monotonic(), life.places(stage.name)
            status = "failed"
            try:
                code = launcher.start(stage, stage.filled(places), places["out"], overview)
                # A run that was told to stop may end well without having come to its end.
                status = (
                    "failed" if code else "done" if stage.run is None or life.exported(stage.name) else "interrupted"
                )
            except Interrupted:
                status = "interrupted"
            finally:
                life.end(stage, status, time.monotonic() - began)
                report(life)
            if status != "done":
                overview.say(launcher.tail(stage.name) if status == "failed" else "")
                print(
                    f"{stage.name} {status}; its log is {launcher.log(stage.name)}; the same command goes on",
                    file=sys.stderr,
                )
                return 1
            overview.say(f"{stage.name}: done in {time.monotonic() - began:.0f} s")
    life.save()
    page = report(life)
    print("\n" + "\n".join(said(life)))
    print(f"\n{page or life.recipe.folder / 'lifecycle.json'}  ({time.monotonic() - started:.0f} s)")
    return 0 if all(row.get("met", True) for row in life.record["results"]) else 1


def submit(life: Lifecycle, command: Command) -> int:
    """Hand what is left to Slurm: a job a stage, each waiting for those that it starts from."""
    life.check()
    jobs: dict[str, str] = {}
    for stage in (stage for stage in life.recipe.stages if stage.on and not life.done(stage.name)):
        life.begin(stage)
        places = life.places(stage.name)
        waits = [jobs[name] for name in stage.parents if name in jobs]
        after = [f"dependency=afterok:{':'.join(waits)}"] if waits else []
        if stage.run is not None:
            later = [f"later={','.join(places[name] for name in stage.parents if name in jobs)}"] if waits else []
            overrides = [*stage.filled(places), f"run_dir={places['out']}", f"name={stage.name}"]
            line = [sys.executable, ROOT / "launch" / "submit.py", *command.slurm, *after, *later, "--", *overrides]
        else:
            script = shlex.join([sys.executable, str(ROOT / stage.filled(places)[0]), *stage.filled(places)[1:]])
            logs = life.recipe.folder / "logs"
            logs.mkdir(parents=True, exist_ok=True)
            known = [f"--{a}" for a in command.slurm if a.startswith(("partition=", "account=", "qos="))]
            line = ["sbatch", "--parsable", f"--job-name={stage.name}", f"--output={logs / stage.name}.log", *known]
            line += [*(f"--{a}" for a in after), "--wrap", f"{script} && touch {shlex.quote(places['out'])}/.done"]
        done = subprocess.run(
            [*map(str, line)], stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
        )
        if done.returncode:
            life.end(stage, "failed", 0)
            return done.returncode
        jobs[stage.name] = done.stdout.split()[-1].partition(";")[0]
        life.stages[stage.name]["job"] = jobs[stage.name]
        life.end(stage, "submitted", 0)
        print(f"{stage.name}: job {jobs[stage.name]}" + (f" after {', '.join(waits)}" if waits else ""))
    print(f"the same command says how it stands: {life.recipe.folder / 'lifecycle.json'}")
    report(life)
    return 0


def report(life: Lifecycle) -> Path | None:
    """Write the report of the folder, where there is a script for that."""
    script = ROOT / "scripts" / "report.py"
    if not script.is_file():
        return None
    done = subprocess.run([sys.executable, script, life.recipe.folder], capture_output=True, text=True)
    if done.returncode:
        print(
            f"the report could not be written: {(done.stderr or done.stdout).strip().splitlines()[-1]}", file=sys.stderr
        )
        return None
    return life.recipe.folder / "report.html"


def said(life: Lifecycle) -> Iterator[str]:
    """What the results say, a line a stage."""
    by_stage: dict[str, list[Mapping[str, object]]] = {}
    for row in life.record["results"]:
        by_stage.setdefault(str(row["of"]), []).append(row)
    for name, rows in by_stage.items():
        yield f"{name:10} " + "; ".join(map(_said, rows))


def _said(row: Mapping[str, object]) -> str:
    text = f"{str(row['name']).partition(': ')[2]} {row['value']:.4g}"
    if row.get("target") is not None:
        side = "at most" if row["better"] == "lower" else "at least"
        text += f" (wanted {side} {row['target']:.4g}{'' if row['met'] else ': missed'})"
    return text + (f", best possible {row['optimum']:.4g}" if row.get("optimum") is not None else "")


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
