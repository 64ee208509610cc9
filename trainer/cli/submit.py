"""Submit a run to Slurm: ``onecurve submit [argument=value ...] [--dry-run] -- [overrides of the run]``.

    onecurve submit nodes=4 gpus_per_node=8 time=1440 partition=main -- experiment=7b data.train=[corpus.jsonl.gz]
    onecurve submit nodes=2 tasks_per_node=4 time=60 --dry-run -- experiment=tinyworld batch.size=64

Arguments
{arguments}

Everything wrong with the arguments and with the configuration is said at once, before anything is submitted. The script, the
configuration, the commit and what differs from it are kept in ``RUN_DIR/submissions/``; logs come to ``RUN_DIR/logs/``, a
folder an attempt and a file a rank. The last line of the standard output is the job's number.
"""

from __future__ import annotations

import difflib
import json
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from trainer.checkpoint.record import plain
from trainer.compose import compose
from trainer.config import ConfigError, InputError, setting
from trainer.disk import write_text
from trainer.parallel.environment import imagined
from trainer.run import Run
from trainer.secrets import without_password, written_passwords

ROOT = Path(__file__).resolve().parents[2]
PASSED = (
    "partition", "account", "qos", "constraint", "exclude", "nodelist", "dependency", "reservation", "mem", "cpus_per_task",
    "time",
)  # fmt: skip
"""Arguments that sbatch takes under the same name."""
TIME = re.compile(r"\d+|\d+:[0-5]\d(:[0-5]\d)?|\d+-\d+(:[0-5]\d){0,2}", re.ASCII)
NUMBER = re.compile(r"\d{1,9}", re.ASCII)
UNWRITABLE = re.compile(r"[\x00-\x1f\x7f\x85\u2028\u2029\"\\]")
"""What a line that sbatch reads cannot hold in a value: line ends, and what ends or escapes a quotation."""


@dataclass
class Job:
    """What is asked of Slurm."""

    nodes: str = setting("1", "machines")
    gpus_per_node: str = setting("0", "GPUs of a machine; a rank each")
    tasks_per_node: str = setting("", "ranks of a machine without GPUs")
    time: str = setting("", "limit, in minutes or as [days-]hours:minutes:seconds")
    partition: str = setting("", "as sbatch takes it, like the next nine")
    account: str = setting("", "")
    qos: str = setting("", "")
    constraint: str = setting("", "")
    exclude: str = setting("", "")
    nodelist: str = setting("", "")
    dependency: str = setting("", "")
    reservation: str = setting("", "")
    mem: str = setting("", "")
    cpus_per_task: str = setting("", "")
    mail: str = setting("", "address to write to when the job ends, fails or is requeued")
    container: str = setting("", "image that srun starts the ranks in (pyxis: --container-image)")
    container_mounts: str = setting("", "folders to see in it (pyxis: --container-mounts)")
    launcher: str = setting(
        "srun", "srun: a task a rank; torchrun or deepspeed: a task a machine, which starts its ranks"
    )
    signal: str = setting("120", "seconds before the time limit at which Slurm tells the ranks to save and stop")
    requeue: str = setting("true", "whether a job that stopped early or failed is queued again")
    restarts: str = setting("3", "failures in a row without a new checkpoint after which it is not")
    later: str = setting(
        "", "paths, with commas, that jobs of `dependency` are yet to write; they are not looked for now"
    )
    python: str = setting(sys.executable, "the interpreter of the ranks")
    sbatch: str = setting("", "further arguments of sbatch, such as '--gres=gpu:a100:8 --exclusive'")

    @property
    def ranks_per_node(self) -> int:
        return int(self.gpus_per_node) or int(self.tasks_per_node or 1)

    @property
    def ranks(self) -> int:
        return int(self.nodes) * self.ranks_per_node

    @property
    def seconds(self) -> int:
        """The time limit; 0 where none is given."""
        days, dash, rest = self.time.rpartition("-")
        parts = [int(part) for part in rest.split(":")] if rest else [0]
        units = (3600, 60, 1) if dash else {1: (60,), 2: (60, 1), 3: (3600, 60, 1)}[len(parts)]
        return int(days or 0) * 86400 + sum(part * unit for part, unit in zip(parts, units))

    def problems(self) -> Iterator[str]:
        """Everything that cannot work, a sentence each."""
        yield from self._wrong_numbers()
        yield from self._wrong_times()
        for name in (*PASSED, "mail"):
            yield from unwritable(name, getattr(self, name))
        try:
            for word in shlex.split(self.sbatch):
                yield from unwritable("sbatch", word)
        except ValueError as error:
            yield f"sbatch={self.sbatch} cannot be cut into arguments ({error}); close its quotation"
        if self.tasks_per_node and self.gpus_per_node not in ("0", self.tasks_per_node):
            yield (
                f"tasks_per_node={self.tasks_per_node} and gpus_per_node={self.gpus_per_node} differ, and a GPU has one "
                "rank; give gpus_per_node alone"
            )
        if self.launcher not in ("srun", "torchrun", "deepspeed"):
            yield f"launcher={self.launcher} is not known; use srun, torchrun or deepspeed"
        if self.requeue not in ("true", "false"):
            yield f"requeue={self.requeue} is neither true nor false"
        if self.container_mounts and not self.container:
            yield f"container_mounts={self.container_mounts} needs a container"
        if self.mail and "@" not in self.mail:
            yield f"mail={self.mail} is not an address"

    def _wrong_numbers(self) -> Iterator[str]:
        for name, least in (("nodes", 1), ("gpus_per_node", 0), ("signal", 0), ("restarts", 0)):
            if not NUMBER.fullmatch(getattr(self, name)) or int(getattr(self, name)) < least:
                yield f"{name}={getattr(self, name)} is not a number of at least {least}"
        for name in ("tasks_per_node", "cpus_per_task"):
            text = getattr(self, name)
            if text and (not NUMBER.fullmatch(text) or not int(text)):
                yield f"{name}={text} is not a number of at least 1"

    def _wrong_times(self) -> Iterator[str]:
        if self.time and not TIME.fullmatch(self.time):
            yield f"time={self.time} is not a time limit; give minutes, or [days-]hours:minutes:seconds"
        elif self.time and NUMBER.fullmatch(self.signal) and self.seconds <= int(self.signal):
            yield (
                f"signal={self.signal} seconds before a limit of time={self.time} is before the job begins; use a longer "
                f"time, or signal={self.seconds // 4}"
            )

    def directives(self, name: str, run_dir: Path) -> list[str]:
        """What sbatch is told."""
        tasks = self.ranks_per_node if self.launcher == "srun" else 1
        asked = {
            "job-name": name, "nodes": self.nodes, "ntasks-per-node": str(tasks),
            "gpus-per-node": self.gpus_per_node if self.gpus_per_node != "0" else "",
            **{key.replace("_", "-"): getattr(self, key) for key in PASSED},
            "mail-user": self.mail, "mail-type": "END,FAIL,REQUEUE" if self.mail else "",
            "signal": f"USR2@{self.signal}" if self.signal != "0" else "",
            "output": f"{run_dir / 'logs'}/".replace("%", "%%") + "%j.log", "open-mode": "append",
        }  # fmt: skip
        if self.launcher != "srun" and self.cpus_per_task:
            asked["cpus-per-task"] = str(int(self.cpus_per_task) * self.ranks_per_node)
        words = [f"--{key}={value}" for key, value in asked.items() if value]
        words += ["--requeue" if self.requeue == "true" else "--no-requeue", *shlex.split(self.sbatch)]
        return [f"#SBATCH {quoted(word)}" for word in words]

    def settings(self, run_dir: Path, overrides: Sequence[str], save_seconds: int) -> list[str]:
        """What the script is told: assignments of its variables."""
        container = [f"--container-image={self.container}"] if self.container else []
        container += [f"--container-mounts={self.container_mounts}"] if self.container_mounts else []
        variables = {
            "run_dir": str(run_dir), "python": self.python, "launcher": self.launcher, "restarts": self.restarts,
            "ranks_per_node": str(self.ranks_per_node),
            "ranks_per_task": "1" if self.launcher == "srun" else str(self.ranks_per_node),
            "may_requeue": "yes" if self.requeue == "true" else "no", "save_seconds": str(save_seconds),
        }  # fmt: skip
        return [
            f"cd {shlex.quote(str(Path.cwd()))} || exit 1",
            *(f"{name}={shlex.quote(value)}" for name, value in variables.items()),
            f"container=({shlex.join(container)})",
            "overrides=(",
            *(f"  {shlex.quote(override)}" for override in overrides),
            ")",
        ]


def unwritable(name: str, value: str) -> Iterator[str]:
    """What keeps a value from being written on a line that sbatch reads."""
    if match := UNWRITABLE.search(value):
        yield f"{name}={value!r} holds {match[0]!r}, which a line of a batch script cannot; use another {name}"


def quoted(word: str) -> str:
    """A word of a line that sbatch reads, which cuts lines at spaces and comments but not inside a quotation."""
    return f'"{word}"' if re.search(r"[\s#']", word) else word


def main(arguments: Sequence[str]) -> int:
    """Submit, or show what would be; gives the exit code."""
    if {"--help", "-h"} & set(arguments[: _split(arguments)]) or not arguments:
        print(help_text())
        return 0
    mine, overrides = list(arguments[: _split(arguments)]), list(arguments[_split(arguments) + 1 :])
    dry = "--dry-run" in mine
    job, cfg = parse_job([argument for argument in mine if argument != "--dry-run"], overrides)
    run_dir = Path(cfg.run_dir).absolute()
    script = render(job, cfg, run_dir, overrides)
    if dry:
        print(script, end="")
        print(f"nothing was submitted (--dry-run): {job.ranks} ranks, run_dir={cfg.run_dir}", file=sys.stderr)
        return 0
    if shutil.which("sbatch") is None:
        raise InputError("sbatch is not on this machine, so nothing was submitted; --dry-run shows the script")
    (run_dir / "logs").mkdir(parents=True, exist_ok=True)
    folder = snapshot(run_dir, script, cfg, arguments)
    done = subprocess.run(["sbatch", "--parsable", str(folder / "job.sbatch")], capture_output=True, text=True)
    if done.returncode:
        print(
            f"sbatch refused the job: {done.stderr.strip()}\n(the script is {folder / 'job.sbatch'})", file=sys.stderr
        )
        return 1
    number = done.stdout.strip().partition(";")[0]
    write_text(folder / "job", f"{number}\n")
    print(f"{job.ranks} ranks on {job.nodes} nodes, run_dir={cfg.run_dir}, logs in {run_dir / 'logs'}", file=sys.stderr)
    print(number)
    return 0


def parse_job(mine: Sequence[str], overrides: Sequence[str]) -> tuple[Job, Run]:
    """The job and the run that the arguments describe.

    Raises:
        ConfigError: with everything that is wrong with either.
    """
    known = [field.name for field in fields(Job)]
    given: dict[str, str] = {}
    problems = []
    for argument in mine:
        key, equals, value = argument.partition("=")
        near = difflib.get_close_matches(key, known, n=1)
        hint = f"; did you mean '{near[0]}'?" if near else "; overrides of trainer come after --"
        if key not in known or not equals:
            problems.append(f"onecurve submit has no argument '{argument}'{hint}")
        elif key in given:
            problems.append(f"{key} is given twice: {given[key]} and {value}")
        else:
            given[key] = value
    job = Job(**given)
    wrong = list(job.problems())
    problems += wrong
    ranks = 1
    if not any(problem.startswith(("nodes", "gpus_per_node", "tasks_per_node")) for problem in wrong):
        ranks = job.ranks
    try:
        with imagined(ranks):
            cfg = compose(overrides, later=[path for path in job.later.split(",") if path])
    except ConfigError as error:
        raise ConfigError(problems + error.problems, "This job") from None
    before = cfg.checkpoint.before_deadline
    if not any(problem.startswith("time") for problem in wrong) and 0 < job.seconds <= before:
        problems.append(
            f"checkpoint.before_deadline={before:g} seconds is not less than time={job.time}, so that every attempt would "
            f"stop after one step; use a longer time, or checkpoint.before_deadline={job.seconds // 4}"
        )
    if cfg.resume != "auto" and job.requeue == "true":
        problems.append(
            f"resume={cfg.resume} does not let a requeued job continue; leave it at auto and give another run_dir, or "
            "requeue=false"
        )
    problems += written_passwords([*mine, *overrides], "job.sbatch")
    problems += [*unwritable("name", cfg.name), *unwritable("run_dir", str(Path(cfg.run_dir).absolute()))]
    if problems:
        raise ConfigError(problems, "This job")
    return job, cfg


def render(job: Job, cfg: Run, run_dir: Path, overrides: Sequence[str]) -> str:
    """The batch script: slurm.sbatch with its gaps filled in."""
    save_seconds = max(int(job.signal), int(cfg.checkpoint.before_deadline), 30)
    filled = {
        "#@DIRECTIVES@": job.directives(cfg.name, run_dir),
        "#@SETTINGS@": job.settings(run_dir, overrides, save_seconds),
    }
    lines = Path(__file__).with_name("slurm.sbatch").read_text().splitlines()
    return "\n".join(line for gap in lines for line in filled.get(gap, [gap])) + "\n"


def snapshot(run_dir: Path, script: str, cfg: Run, arguments: Sequence[str]) -> Path:
    """Keep what is submitted, and the state of the code, in a folder of the run; gives it."""
    stamp = time.strftime("%Y%m%d-%H%M%S", time.gmtime())
    names = (stamp if n == 1 else f"{stamp}-{n}" for n in range(1, 1000))
    folder = next(path for name in names if not (path := run_dir / "submissions" / name).exists())
    folder.mkdir(parents=True)
    write_text(folder / "job.sbatch", script)
    write_text(folder / "config.yaml", yaml.safe_dump(plain(cfg), sort_keys=False, allow_unicode=True))
    state: dict[str, Any] = {
        "command": without_password(shlex.join(["onecurve", "submit", *arguments])),
        "folder": str(Path.cwd()),
        "code": {},
    }
    for repository in dict.fromkeys(filter(None, (_top(Path.cwd()), _top(ROOT)))):
        diff = _git(repository, "diff", "HEAD", "--binary")
        name = f"changes-{len(state['code'])}.diff"
        write_text(folder / name, shown := without_password(diff))
        if shown != diff:
            print(f"{folder / name} has *** in place of passwords, so it may not apply as it is", file=sys.stderr)
        state["code"][str(repository)] = {
            "commit": _git(repository, "rev-parse", "HEAD").strip(), "changes": name,
            "untracked": _git(repository, "ls-files", "--others", "--exclude-standard").splitlines(),
        }  # fmt: skip
    write_text(folder / "state.json", json.dumps(state, indent=1) + "\n")
    return folder


def help_text() -> str:
    """The module's text, with every argument."""
    lines = [
        f"  {field.name + '=' + str(field.default or ''):<26} {field.metadata['doc']}".rstrip()
        if field.name != "python"
        else f"  {'python=':<26} {field.metadata['doc']} (default: the one that runs this)"
        for field in fields(Job)
    ]
    return textwrap.dedent(__doc__ or "").replace("{arguments}", "\n".join(lines)).strip()


def _split(arguments: Sequence[str]) -> int:
    return list(arguments).index("--") if "--" in arguments else len(arguments)


def _top(folder: Path) -> Path | None:
    top = _git(folder, "rev-parse", "--show-toplevel").strip()
    return Path(top) if top else None


def _git(folder: Path, *arguments: str) -> str:
    try:
        done = subprocess.run(["git", "-C", folder, *arguments], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""
