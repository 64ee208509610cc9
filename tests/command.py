"""The command line as users run it: real processes, one or several ranks, that can be killed."""

import atexit
import contextlib
import io
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.ranks import forkserver, free_port
from trainer import stopping
from trainer.cli import main

ROOT = Path(__file__).parent.parent

TINY = [
    "data.documents=400", "data.heldout=20", "batch.size=8", "batch.micro=4", "batch.length=64", "model.hidden_size=32",
    "model.intermediate_size=64", "model.num_hidden_layers=2", "model.num_attention_heads=2",
    "model.num_key_value_heads=1", "model.head_dim=16", "tracking.wandb.mode=disabled", "tracking.tensorboard=false",
    "evaluation.samples=0",
]  # fmt: skip
"""A pretraining run of tiny world that takes a few milliseconds a step."""


def environment(rank: int = 0, size: int = 1, port: int = 0) -> dict[str, str]:
    """As torchrun sets it, on one thread a rank: results must not depend on how many cores a machine has."""
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    env.update(OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT), WANDB_MODE="disabled", DS_ACCELERATOR="cpu")
    if size > 1:
        env.update(
            RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
        )
    return env


class Forked:
    """``python -m trainer ...`` in a process of its own that need not import anything: what takes the time of a small run.

    Used as `subprocess.Popen` is. Unlike fresh interpreters, all of one test worker order sets of strings alike.
    """

    def __init__(self, folder: Path, arguments: Sequence[str], env: Mapping[str, str]) -> None:
        self._output = tempfile.NamedTemporaryFile("r", encoding="utf-8", errors="replace")  # noqa: SIM115
        self._process = forkserver().Process(
            target=_as_a_program, args=(str(folder), list(arguments), dict(env), self._output.name)
        )
        self._process.start()
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        """The exit code, or the negative signal; None while it runs."""
        return self._process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.returncode is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout: float | None = None) -> tuple[str, None]:
        """Wait for the end; gives the output and the errors together."""
        self._process.join(timeout)
        self._output.seek(0)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(self._process.name, timeout or 0, self._output.read())
        return self._output.read(), None


def _as_a_program(folder: str, arguments: list[str], env: dict[str, str], output: str) -> None:
    """What an interpreter does before and after ``-m trainer``."""
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(env)
    for path, flags, numbers in ((os.devnull, os.O_RDONLY, (0,)), (output, os.O_WRONLY | os.O_APPEND, (1, 2))):
        opened = os.open(path, flags)
        for number in numbers:
            os.dup2(opened, number)
    sys.argv = ["trainer", *arguments]
    sys.path[:0] = [folder, *env["PYTHONPATH"].split(os.pathsep)]
    try:
        runpy.run_module("trainer", run_name="__main__", alter_sys=True)
    finally:
        atexit._run_exitfuncs()


class Command:
    """``python -m trainer ...`` on ``ranks`` ranks in ``folder``; ``fresh``: by an interpreter that imports everything."""

    def __init__(self, folder: Path, *overrides: str, ranks: int = 1, fresh: bool = False) -> None:
        port = free_port()
        start = _interpreter if fresh else Forked
        self.processes = [start(folder, overrides, environment(rank, ranks, port)) for rank in range(ranks)]

    def finish(self, timeout: float = 300) -> str:
        """Wait for every rank; all must succeed. Gives rank 0's output."""
        outputs = self.outputs(timeout)
        codes = [process.returncode for process in self.processes]
        assert codes == [0] * len(codes), f"exit codes {codes}:\n" + "\n".join(outputs)
        return outputs[0]

    def fail(self, timeout: float = 120) -> tuple[int, str]:
        """Wait for every rank; gives rank 0's exit code, which is not 0, and its output."""
        outputs = self.outputs(timeout)
        code = self.processes[0].returncode
        assert code not in (0, None), outputs[0]
        return code, outputs[0]

    def kill(self) -> None:
        """SIGKILL every rank, as the kernel would when memory runs out."""
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.communicate()

    def kill_one(self, run: Path) -> None:
        """SIGKILL the second of two ranks once they take steps; the first one must end by itself, and soon."""
        end = time.monotonic() + 90
        while not (run / "metrics.jsonl").exists() and time.monotonic() < end:
            time.sleep(0.02)
        self.processes[1].kill()
        died = time.monotonic()
        self.processes[0].communicate(timeout=60)
        assert self.processes[0].returncode not in (0, None)
        assert time.monotonic() - died < 30

    def outputs(self, timeout: float) -> list[str]:
        """Wait for every rank, however it ends; none is left running after ``timeout`` seconds."""
        try:
            return [process.communicate(timeout=timeout)[0] for process in self.processes]
        except subprocess.TimeoutExpired:
            self.kill()
            raise


def _interpreter(folder: Path, arguments: Sequence[str], env: Mapping[str, str]) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "trainer", *arguments], cwd=folder, env=env, text=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def onecurve(folder: Path, *arguments: str, stdin: str = "") -> tuple[int, str, str]:
    """``onecurve ...`` in ``folder`` and in this process; gives the exit code, the output and the errors."""
    out, errors = io.StringIO(), io.StringIO()
    before, sys.stdin = sys.stdin, io.StringIO(stdin)
    try:
        with contextlib.chdir(folder), contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
            code = main(arguments)
    except SystemExit as end:  # argparse: help or a wrong argument
        code = end.code if isinstance(end.code, int) else 1
    finally:
        sys.stdin = before
        stopping.forget()  # a verb listens to signals; this process is not its own
    return code, out.getvalue(), errors.getvalue()


def metrics(run: Path) -> list[dict]:
    """The lines of metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
