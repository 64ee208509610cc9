"""Carry out the stages of a lifecycle: here, one after the other, or as Slurm jobs that wait for one another."""

from __future__ import annotations

import json
import logging
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import rich.console
import torch
from rich.markup import escape

from trainer import report
from trainer.disk import read_json
from trainer.jobs.lifecycle import DONE, Lifecycle
from trainer.jobs.process import places, run_ranks
from trainer.jobs.recipe import ROOT, Stage
from trainer.report.lifecycle import RECORD
from trainer.tracking.tracker import PROGRESS

log = logging.getLogger(__name__)

QUIET = 15.0
"""Seconds between plain lines where there is no terminal."""
SAVE_SECONDS = 120.0
"""Seconds that a stage has to save and stop."""
SHOWN = ("loss", "objective/score", "eval/loss", "eval/accuracy", "eval/exact_match")
"""Metrics that are shown while a stage runs."""
JOB_ARGUMENTS = ("partition=", "account=", "qos=")
"""Arguments of a run's job that a script's job gets, too."""


def run_stages(life: Lifecycle, ranks: int) -> int:
    """Run the stages that are left, here, one after the other.

    Returns:
        The exit code: 0 if all stages are done and every target is met, else 1.
    """
    life.validate()
    started = time.monotonic()
    before = {name for name in life.stages if life.done(name)}
    for stage in (stage for stage in life.recipe.stages if stage.enabled):
        if stage.name in before:
            print(f"{stage.name}: done before, in {life.stages[stage.name]['run_dir']}", flush=True)
        elif not _run_stage(life, stage, ranks):
            return 1
    life.save()
    page = write_report(life)
    print("\n" + "\n".join(result_lines(life)))
    print(f"\n{page or life.recipe.folder / RECORD}  ({time.monotonic() - started:.0f} s)")
    return 0 if all(row.get("met", True) for row in life.record["results"]) else 1


def _run_stage(life: Lifecycle, stage: Stage, ranks: int) -> bool:
    """Run a stage, and record how it ended; False where it is not done."""
    if stage.run is not None:
        life.validate(stage)  # what was still to be written when all stages were validated is there by now
    life.begin(stage)
    status, started = "failed", time.monotonic()
    file = life.recipe.folder / "logs" / f"{stage.name}.log"
    arguments, folder = stage.command(life.places(stage.name)), Path(life.stages[stage.name]["run_dir"])
    print(f"{stage.name}: python {shlex.join(arguments)}", flush=True)
    try:
        with Display(stage.name, folder) as display, places(ranks if stage.run is not None else 1) as here:
            ended = run_ranks(
                arguments,
                here,
                lambda _: file,
                environment=stage_environment(ranks),
                while_running=display.update,
                save_seconds=SAVE_SECONDS,
            )
        if ended.signalled:
            status = "interrupted"
        elif ended.code == 0:
            # A run that was told to stop may end well without having come to its end.
            status = "done" if stage.run is None or life.exported(stage.name) else "interrupted"
    finally:
        life.end(stage, status, time.monotonic() - started)
        write_report(life)
    if status != "done":
        if status == "failed":
            print("\n".join(file.read_text(errors="replace").splitlines()[-25:]))
        print(f"{stage.name} {status}; its log is {file}; the same command goes on", file=sys.stderr)
        return False
    results = "; ".join(_result(row) for row in life.record["results"] if row["of"] == stage.name)
    print(f"{stage.name}: done in {time.monotonic() - started:.0f} s{results and f'; {results}'}", flush=True)
    return True


def stage_environment(ranks: int) -> Mapping[str, str]:
    """Several ranks share the machine's cores: one process of two threads is slower than two of one."""
    search = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, search))}
    if not torch.cuda.is_available():
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // ranks)))
    return environment


class Display:
    """How far the stage in ``folder`` is: a status line on a terminal, a line now and then elsewhere."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.folder = name, folder
        self._status = rich.console.Console(highlight=False).status(name)
        self._printed = time.monotonic()

    def __enter__(self) -> Self:
        if sys.stdout.isatty():
            self._status.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._status.stop()

    def update(self) -> None:
        """Show the progress anew."""
        if sys.stdout.isatty():
            self._status.update(escape(f"{self.name}: {progress(self.folder)}"))
        elif time.monotonic() - self._printed >= QUIET and (text := progress(self.folder)):
            self._printed = time.monotonic()
            print(f"{self.name}: {text}", flush=True)


def progress(folder: Path) -> str:
    """How far a run is: the step, and the newest loss and held-out figures; empty before its first step."""
    rows = _last_rows(folder / "metrics.jsonl")
    if not rows:
        return ""
    last = read_json(folder / PROGRESS).get("last")
    parts = [f"step {int(rows[-1]['step'])}" + (f" of {last}" if last else "")]
    for key in SHOWN:
        value = next((row[key] for row in reversed(rows) if key in row), None)
        parts += [] if value is None else [f"{key} {value:.4g}"]
    return "  ".join(parts)


def _last_rows(file: Path) -> list[dict[str, Any]]:
    """The rows at the end of a file that may be growing."""
    if not file.is_file():
        return []
    with file.open("rb") as stream:
        begin = max(0, file.stat().st_size - 50_000)
        stream.seek(begin)
        lines = stream.read().split(b"\n")
    # The last line is not finished, and the first may be cut.
    return [json.loads(line) for line in lines[1 if begin else 0 : -1]]


def submit_stages(life: Lifecycle, job: Sequence[str]) -> int:
    """Hand what is left to Slurm: a job a stage, each waiting for those that it starts from.

    Args:
        life: the lifecycle.
        job: arguments of ``submit``, such as ``nodes=2``.

    Returns:
        The exit code.
    """
    life.validate()
    jobs: dict[str, str] = {}
    for stage in life.waiting:
        life.begin(stage)
        parents = {name: jobs[name] for name in stage.parents if name in jobs}
        after = [f"dependency=afterok:{':'.join(parents.values())}"] if parents else []
        command = _submission(life, stage, job, after, list(parents))
        environment = {**os.environ, "PYTHONPATH": stage_environment(1)["PYTHONPATH"]}
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment)
        if done.returncode:
            life.end(stage, "failed")
            return done.returncode
        jobs[stage.name] = life.stages[stage.name]["job"] = done.stdout.split()[-1].partition(";")[0]
        life.end(stage, "submitted")
        print(f"{stage.name}: job {jobs[stage.name]}" + (f" after {', '.join(parents.values())}" if parents else ""))
    print(f"the same command shows the state of all stages: {life.recipe.folder / RECORD}")
    write_report(life)
    return 0


def _submission(
    life: Lifecycle, stage: Stage, job: Sequence[str], after: Sequence[str], parents: Sequence[str]
) -> list[str]:
    """The command that submits a stage: a run by ``submit``, a script by ``sbatch`` itself."""
    outputs = life.places(stage.name)
    command = stage.command(outputs)
    if stage.run is not None:
        overrides = command[command.index("train") + 1 :]
        later = [f"later={','.join(outputs[name] for name in parents)}"] if parents else []
        return [sys.executable, "-m", "trainer", "submit", *job, *after, *later, "--", *overrides]
    logs = life.recipe.folder / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    options = [f"--{a}" for a in job if a.startswith(JOB_ARGUMENTS)] + [f"--{a}" for a in after]
    script = f"{shlex.join([sys.executable, *command])} && touch {shlex.quote(outputs['out'])}/{DONE}"
    named = [f"--job-name={stage.name}", f"--output={logs / stage.name}.log"]
    return ["sbatch", "--parsable", *named, *options, "--wrap", script]


def write_report(life: Lifecycle) -> Path | None:
    """Write the folder's report; one that cannot be written ends nothing."""
    try:
        return report.write(life.recipe.folder)
    except Exception:
        log.exception("the report of %s could not be written", life.recipe.folder)
        return None


def result_lines(life: Lifecycle) -> Iterator[str]:
    """The results, a line a stage."""
    by_stage: dict[str, list[str]] = {}
    for row in life.record["results"]:
        by_stage.setdefault(str(row["of"]), []).append(_result(row))
    for name, texts in by_stage.items():
        yield f"{name:10} {'; '.join(texts)}"


def _result(row: Mapping[str, Any]) -> str:
    text = f"{row['name'].partition(': ')[2]} {row['value']:.4g}"
    if row.get("target") is not None:
        side = "at most" if row["better"] == "lower" else "at least"
        text += f" (target: {side} {row['target']:.4g}{'' if row['met'] else ', missed'})"
    return text + (f", best possible {row['optimum']:.4g}" if row.get("optimum") is not None else "")
