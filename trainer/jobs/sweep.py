"""Sweeps: every point is a run in processes of its own, with a folder, a port and a log of its own.

Hydra composes the points and calls `point` for each: one after the other here, or on every task of a job of its own. A point
that fails is reported and counts as the worst; it does not end the sweep. The same command again skips what is done.

    runs/sweeps/<digest of the command>/
      sweep.json            a line of facts for every point: overrides, status, value, run_dir
      <digest>/             the run of a point; the digest is that of its overrides
      logs/<digest>/        rank<n>.log
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import rich.console
import rich.table
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from trainer import stopping
from trainer.checkpoint import run_folder
from trainer.parallel.environment import Place, place, variables

WORST = 1e30
"""What an optimiser is told of a point without a value: large, but finite, or the search would end."""
GRACE = 15.0
"""Seconds in which the other ranks of a point that failed may say what they saw."""
PLUGINS = {
    "hydra/launcher=slurm": "hydra_plugins.hydra_submitit_launcher",
    "hydra/launcher=jobs": "hydra_plugins.hydra_submitit_launcher",
    "hydra/sweeper=search": "hydra_plugins.hydra_optuna_sweeper",
    "hydra/sweeper=optuna": "hydra_plugins.hydra_optuna_sweeper",
}
"""What a choice needs that is not part of Hydra."""


@dataclass
class Point:
    """What became of a point.

    ``status``: running, done, stopped, refused, failed, lost, or why it has no value. ``finished``: the run came to its
    end, so that the same command again skips it.
    """

    number: int
    overrides: list[str]
    status: str
    value: float | None
    metric: str
    direction: str
    run_dir: str
    seconds: float = 0.0
    finished: bool = False


def problems(arguments: Sequence[str]) -> Iterator[str]:
    """What cannot work in a sweep, a sentence each; ``arguments`` are those of the command line."""
    if place().size > 1:
        yield (
            f"--multirun on {place().size} ranks would run every point on each; start it as one process, with sweep.ranks=N "
            "or hydra/launcher=slurm hydra.launcher.tasks_per_node=N"
        )
    for argument in arguments:
        key = argument.lstrip("+~").partition("=")[0]
        if key in ("run_dir", "resume"):
            yield f"{argument}: every point of a sweep has a run_dir of its own under hydra.sweep.dir; leave {key} out"
        plugin = PLUGINS.get(argument)
        if plugin is not None and importlib.util.find_spec(plugin) is None:
            yield f"{argument} needs packages that are not installed; pip install 'onecurve[sweep]'"


def folder_of(arguments: Sequence[str]) -> str:
    """Where a sweep lies that says nothing about it: a digest of the command, whatever carries it out."""
    return f"runs/sweeps/{digest([argument for argument in arguments if not argument.startswith(('hydra', '-'))])}"


def digest(overrides: Sequence[str]) -> str:
    """A short name for a set of overrides."""
    return hashlib.sha256("\n".join(sorted(overrides)).encode()).hexdigest()[:10]


def point(cfg: DictConfig) -> float:
    """Carry out one point in processes of its own; gives its value of the metric, or the worst where it has none.

    Hydra calls it, in a job of several tasks on each of them.
    """
    here = HydraConfig.get()
    overrides = [str(override) for override in here.overrides.task]
    sweep = Path(here.sweep.dir)
    name, direction = digest(overrides), _direction(here, cfg)
    worst = WORST if direction == "minimize" else -WORST
    record = sweep / "points" / f"{name}.json"
    if record.is_file() and (held := json.loads(record.read_text()))["finished"]:
        return worst if held["value"] is None else float(held["value"])
    run_dir, logs = sweep / name, sweep / "logs" / name
    for folder in (record.parent, logs):
        folder.mkdir(parents=True, exist_ok=True)
    found = Point(int(here.job.num), overrides, "running", None, str(cfg.sweep.metric), direction, str(run_dir))
    _note(record, found)
    command = [sys.executable, "-m", "trainer", *_folders(here), *overrides, f"run_dir={run_dir}"]
    if not any(override.startswith("tracking.wandb.group=") for override in overrides):
        command.append(f"tracking.wandb.group={sweep.name}")
    started = time.monotonic()
    code = _run(command, logs, int(cfg.sweep.ranks))
    found.seconds = round(time.monotonic() - started, 1)
    marker = run_dir / run_folder.STOPPED
    if code == stopping.EXIT_CODE and marker.is_file():
        found.status = "stopped"
        _note(record, found)
        _continue_later(json.loads(marker.read_text())["reason"])
    found.finished = code == 0
    found.status, found.value = _outcome(code, run_dir / "metrics.jsonl", found.metric)
    _note(record, found)
    shown = "" if found.value is None else f", {found.metric} {found.value:.6g}"
    if place().rank == 0:
        see = "" if found.status == "done" else f"; see {logs}"
        print(f"point {found.number}: {found.status}{shown} ({found.seconds:.0f} s){see}", flush=True)
    return worst if found.value is None else found.value


def summary(folder: Path, command: Sequence[str]) -> int:
    """Write ``sweep.json`` and show the points, the best first; gives how many are done."""
    points = [Point(**json.loads(file.read_text())) for file in sorted((folder / "points").glob("*.json"))]
    if not points:
        return 0
    metric, direction = points[0].metric, points[0].direction
    sign = 1 if direction == "minimize" else -1
    points.sort(key=lambda p: (p.value is None, sign * (p.value or 0.0), p.number))
    for lost in (p for p in points if p.status == "running"):
        lost.status = "lost"  # whoever ran it ended without a word
    facts = {"sweep": folder.name, "command": shlex.join(command), "metric": metric, "direction": direction}
    unfinished = folder / "sweep.json.partial"
    unfinished.write_text(json.dumps({**facts, "points": [asdict(p) for p in points]}, indent=1) + "\n")
    unfinished.replace(folder / "sweep.json")
    shared = set.intersection(*(set(p.overrides) for p in points)) if len(points) > 1 else set()
    table = rich.table.Table("point", "overrides", "status", metric, "run_dir", title=f"{folder}: {direction} {metric}")
    for p in points:
        own = " ".join(override for override in p.overrides if override not in shared)
        table.add_row(str(p.number), own, p.status, "" if p.value is None else f"{p.value:.6g}", p.run_dir)
    console = rich.console.Console(highlight=False)
    # A log file has no width, and a folder's name that is cut is of no use.
    console = console if console.is_terminal else rich.console.Console(highlight=False, width=200)
    console.print(table)
    return sum(p.status == "done" for p in points)


def _run(command: Sequence[str], logs: Path, ranks: int) -> int:
    """The exit code of a point: of this task's rank where it is a job of several, else of ``ranks`` that are started here."""
    mine = place()
    places = [mine]
    if mine.size == 1 and ranks > 1:
        port = _free_port()
        places = [Place(rank, ranks, rank, ("127.0.0.1", port)) for rank in range(ranks)]
    job = os.environ.get("SLURM_JOB_ID", os.environ.get("SUBMITIT_LOCAL_JOB_ID", str(os.getpid())))
    failed = logs / f"failed-{job}-{os.environ.get('SLURM_RESTART_COUNT', '0')}"
    running = []
    for where in places:
        own = variables(where) if where is not mine else {}
        with (logs / f"rank{where.rank}.log").open("ab") as log:
            running.append(
                subprocess.Popen(
                    command, env={**os.environ, **own}, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
                )
            )
    with _passing_on(running):
        since = math.inf
        while any(process.poll() is None for process in running):
            time.sleep(0.1)
            if since == math.inf and (failed.exists() or any(_is_failure(p.poll()) for p in running)):
                since = time.monotonic()
            if time.monotonic() - since > GRACE:
                for process in running:
                    process.kill()
    codes = [process.wait() for process in running]
    bad = [code for code in codes if _is_failure(code)]
    if mine.size > 1 and bad:
        failed.touch()  # the ranks that wait for this one are in other tasks
    return bad[0] if bad else max(codes)


def _is_failure(code: int | None) -> bool:
    return code not in (None, 0, stopping.EXIT_CODE)


@contextmanager
def _passing_on(running: Sequence[subprocess.Popen[bytes]]) -> Iterator[None]:
    """Meanwhile signals are for the processes of the point, which save and stop."""

    def pass_on(number: int, frame: FrameType | None) -> None:
        for process in running:
            if process.poll() is None:
                process.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in stopping.SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _continue_later(reason: str) -> None:
    """End a point that is saved: in a job of submitit's by its own way of requeueing, else together with the sweep."""
    if "SUBMITIT_EXECUTOR" not in os.environ:
        raise SystemExit(stopping.EXIT_CODE)
    requeue = signal.getsignal(signal.SIGUSR2)
    # SIGTERM comes from whoever cancels the job, or requeues it himself.
    if reason != "SIGTERM" and callable(requeue):
        requeue(signal.SIGUSR2, None)  # on the first task alone it does something, and then does not return
    time.sleep(3600)  # until the job is ended: a task that returned would count as finished


def _outcome(code: int, metrics: Path, metric: str) -> tuple[str, float | None]:
    """Status and value of a point whose processes ended with ``code``."""
    if code:
        return "refused" if code == 2 else f"failed ({signal.Signals(-code).name if code < 0 else code})", None
    for line in reversed(metrics.read_text().splitlines()):
        values = json.loads(line)
        if metric in values:
            value = float(values[metric])
            return ("done", value) if math.isfinite(value) else ("not finite", None)
    return f"no metric {metric}", None


def _direction(here: Any, cfg: DictConfig) -> str:
    """As the sweeper has it, else as the configuration."""
    given = OmegaConf.select(here, "sweeper.direction")
    return str(cfg.sweep.direction) if given is None else str(getattr(given, "name", given))


def _folders(here: Any) -> list[str]:
    """The folders of further YAML files, as the point's own command line has them."""
    own = [source.path for source in here.runtime.config_sources if source.provider == "command-line"]
    return [word for path in own for word in ("--config-dir", path)]


def _note(record: Path, found: Point) -> None:
    if place().rank == 0:
        unfinished = record.with_suffix(".partial")
        unfinished.write_text(json.dumps(asdict(found)) + "\n")
        unfinished.replace(record)


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("", 0))
        return int(s.getsockname()[1])
