"""The command line as users run it: real processes, one or several ranks, that can be killed."""

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

from tests.ranks import free_port
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


class Command:
    """``python -m trainer ...`` on ``ranks`` ranks in ``folder``."""

    def __init__(self, folder: Path, *overrides: str, ranks: int = 1) -> None:
        port = free_port()
        self.processes = [
            subprocess.Popen(
                [sys.executable, "-m", "trainer", *overrides],
                cwd=folder, env=environment(rank, ranks, port), text=True,
                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            )
            for rank in range(ranks)
        ]  # fmt: skip

    def finish(self, timeout: float = 300) -> str:
        """Wait for every rank; all must succeed. Gives rank 0's output."""
        outputs = [process.communicate(timeout=timeout)[0] for process in self.processes]
        codes = [process.returncode for process in self.processes]
        assert codes == [0] * len(codes), f"exit codes {codes}:\n" + "\n".join(outputs)
        return outputs[0]

    def fail(self, timeout: float = 120) -> tuple[int, str]:
        """Wait for every rank; gives rank 0's exit code, which is not 0, and its output."""
        outputs = [process.communicate(timeout=timeout)[0] for process in self.processes]
        code = self.processes[0].returncode
        assert code != 0, outputs[0]
        return code, outputs[0]

    def kill(self) -> None:
        """SIGKILL every rank, as the kernel would when memory runs out."""
        for process in self.processes:
            process.send_signal(signal.SIGKILL)
        for process in self.processes:
            process.communicate()


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
