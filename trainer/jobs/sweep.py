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
import shutil
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import rich.console
import rich.markup
import rich.table
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from trainer import stopping
from trainer.checkpoint import run_folder
from trainer.compose import other_length
from trainer.config import ConfigError, parse
from trainer.disk import read_objects, write_text
from trainer.jobs.process import places, run_ranks
from trainer.parallel.environment import place
from trainer.secrets import written_passwords

WORST = 1e30
"""What an optimiser is told of a point without a value: large, but finite, or the search would end."""
PLUGINS = {
    "hydra/launcher=slurm": "hydra_plugins.hydra_submitit_launcher",
    "hydra/launcher=jobs": "hydra_plugins.hydra_submitit_launcher",
    "hydra/sweeper=search": "hydra_plugins.hydra_optuna_sweeper",
    "hydra/sweeper=optuna": "hydra_plugins.hydra_optuna_sweeper",
}
"""What a choice needs that is not part of Hydra."""


@dataclass
class Point:
    """The result of a point.

    Attributes:
        number: of the point, as Hydra counts.
        overrides: its settings.
        status: running, done, stopped, refused, failed, lost, or why it has no value.
        value: the last value of the metric.
        metric: what points are compared by.
        direction: minimize or maximize.
        run_dir: the folder of the run.
        seconds: of the last attempt.
        finished: the run came to its end, so that the same command again skips it.
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
    yield from written_passwords(arguments, "the record of every point")
    for argument in arguments:
        key = argument.lstrip("+~").partition("=")[0]
        if key in ("run_dir", "resume"):
            yield f"{argument}: every point of a sweep has a run_dir of its own under hydra.sweep.dir; leave {key} out"
        plugin = PLUGINS.get(argument)
        if plugin is not None and not _installed(plugin):
            yield f"{argument} needs packages that are not installed; pip install 'onecurve[sweep]'"
        elif argument == "hydra/launcher=slurm" and shutil.which("srun") is None:
            yield f"{argument}: srun is not on this machine; start it where Slurm is, or use hydra/launcher=jobs"


def _installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # the package that it lies in is not there
        return False


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
    run_dir, logs = sweep / name, sweep / "logs" / name
    if record.is_file() and (before := json.loads(record.read_text()))["finished"] and _unchanged(run_dir, cfg):
        return worst if before["value"] is None else float(before["value"])
    for folder in (record.parent, logs):
        folder.mkdir(parents=True, exist_ok=True)
    result = Point(int(here.job.num), overrides, "running", None, str(cfg.sweep.metric), direction, str(run_dir))
    _write(record, result)
    arguments = ["-m", "trainer", "train", *_folders(here), *overrides, f"run_dir={run_dir}"]
    if not any(override.startswith("tracking.wandb.group=") for override in overrides):
        arguments.append(f"tracking.wandb.group={sweep.name}")
    started = time.monotonic()
    code = _run(arguments, logs, int(cfg.sweep.ranks))
    result.seconds = round(time.monotonic() - started, 1)
    marker = run_dir / run_folder.STOPPED
    if code == stopping.EXIT_CODE and marker.is_file():
        result.status = "stopped"
        _write(record, result)
        _continue_later(json.loads(marker.read_text())["reason"])
    result.finished = code == 0
    result.status, result.value = _outcome(code, run_dir / "metrics.jsonl", result.metric)
    _write(record, result)
    shown = "" if result.value is None else f", {result.metric} {result.value:.6g}"
    if place().rank == 0:
        see = "" if result.status == "done" else f"; see {logs}"
        print(f"point {result.number}: {result.status}{shown} ({result.seconds:.0f} s){see}", flush=True)
    return worst if result.value is None else result.value


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
    write_text(folder / "sweep.json", json.dumps({**facts, "points": [asdict(p) for p in points]}, indent=1) + "\n")
    shared = set.intersection(*(set(p.overrides) for p in points)) if len(points) > 1 else set()
    title = rich.markup.escape(f"{folder}: {direction} {metric}")
    table = rich.table.Table("point", "overrides", "status", metric, "run_dir", title=title)
    for p in points:
        own = " ".join(override for override in p.overrides if override not in shared)
        cells = (str(p.number), own, p.status, "" if p.value is None else f"{p.value:.6g}", p.run_dir)
        table.add_row(*map(rich.markup.escape, cells))  # [/path] in a setting is no markup
    console = rich.console.Console(highlight=False)
    # A log file has no width, and a folder's name that is cut is of no use.
    console = console if console.is_terminal else rich.console.Console(highlight=False, width=200)
    console.print(table)
    return sum(p.status == "done" for p in points)


def _run(arguments: Sequence[str], logs: Path, ranks: int) -> int:
    """The exit code of a point: of this task's rank where it is a job of several, else of ``ranks`` that are started here."""
    job = os.environ.get("SLURM_JOB_ID", os.environ.get("SUBMITIT_LOCAL_JOB_ID", str(os.getpid())))
    failed = logs / f"failed-{job}-{os.environ.get('SLURM_RESTART_COUNT', '0')}"
    with places(ranks) as here:
        code = run_ranks(
            arguments, here, lambda where: logs / f"rank{where.rank}.log", failed_elsewhere=failed.exists
        ).code
    if place().size > 1 and code not in (0, stopping.EXIT_CODE):
        failed.touch()  # the ranks that wait for this one are in other tasks
    return code


def _continue_later(reason: str) -> None:
    """End a point that is saved: in a job of submitit's by its own way of requeueing, else together with the sweep."""
    if "SUBMITIT_EXECUTOR" not in os.environ:
        raise SystemExit(stopping.EXIT_CODE)
    requeue = signal.getsignal(signal.SIGUSR2)
    # SIGTERM comes from whoever cancels the job, or requeues it himself.
    if reason != "SIGTERM" and callable(requeue):
        requeue(signal.SIGUSR2, None)  # on the first task alone it does something, and then does not return
    time.sleep(3600)  # until the job is ended: a task that returned would count as finished


def _unchanged(run_dir: Path, cfg: DictConfig) -> bool:
    """Whether a finished point has the settings that its overrides mean now: files of the configuration may have changed."""
    with read_write(cfg), open_dict(cfg):
        cfg.update(other_length([str(override) for override in HydraConfig.get().overrides.task]))
    try:
        run_folder.refuse_changes(run_dir, parse(cfg))
    except ConfigError:
        return False  # the run refuses it, and says what differs
    return True


def _outcome(code: int, metrics: Path, metric: str) -> tuple[str, float | None]:
    """Status and value of a point whose processes ended with ``code``."""
    if code:
        return "refused" if code == 2 else f"failed ({signal.Signals(-code).name if code < 0 else code})", None
    for values in reversed(read_objects(metrics)):
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


def _write(record: Path, result: Point) -> None:
    if place().rank == 0:
        write_text(record, json.dumps(asdict(result)) + "\n")
