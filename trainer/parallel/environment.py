"""Who am I among the ranks: one mapping from what launchers set in the environment."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from trainer.config import InputError


class LaunchError(InputError):
    """The environment describes ranks that cannot work together; the message says what to change."""


@dataclass(frozen=True)
class Place:
    """``rank`` of ``size``, ``local_rank`` on its machine; ``master``: host and port of rank 0, None for a single rank."""

    rank: int
    size: int
    local_rank: int
    master: tuple[str, int] | None


def place(environment: Mapping[str, str] = os.environ) -> Place:
    """This process's place: as torchrun or the deepspeed launcher set it, else as an srun step did, else alone.

    SLURM's variables count only inside a step: the shell of a batch script has them too, and is one rank. submitit's jobs on
    SLURM are such steps; its local jobs have names of their own.

    Raises:
        LaunchError: naming a variable that is missing or is not a number.
    """
    if "RANK" in environment and "WORLD_SIZE" in environment:
        rank, size = _number(environment, "RANK"), _number(environment, "WORLD_SIZE")
        local = _number(environment, "LOCAL_RANK") if "LOCAL_RANK" in environment else rank
        if size == 1:
            return Place(rank, size, local, None)
        return Place(rank, size, local, (_text(environment, "MASTER_ADDR"), _number(environment, "MASTER_PORT")))
    if "SLURM_STEP_ID" in environment and "SLURM_PROCID" in environment:
        rank, size = _number(environment, "SLURM_PROCID"), _number(environment, "SLURM_STEP_NUM_TASKS")
        master = None if size == 1 else (_first_host(environment), _port(environment))
        return Place(rank, size, _number(environment, "SLURM_LOCALID"), master)
    if environment.get("SUBMITIT_EXECUTOR") == "local":
        rank, size = _number(environment, "SUBMITIT_LOCAL_GLOBALID"), _number(environment, "SUBMITIT_LOCAL_NTASKS")
        port = 20000 + _number(environment, "SUBMITIT_LOCAL_JOB_ID") % 10000
        return Place(
            rank, size, _number(environment, "SUBMITIT_LOCAL_LOCALID"), None if size == 1 else ("127.0.0.1", port)
        )
    return Place(0, 1, 0, None)


def variables(where: Place) -> dict[str, str]:
    """What tells a process its place, in the names that torch and DeepSpeed read."""
    named = {"RANK": str(where.rank), "WORLD_SIZE": str(where.size), "LOCAL_RANK": str(where.local_rank)}
    host, port = where.master or ("", 0)
    return {**named, "MASTER_ADDR": host, "MASTER_PORT": str(port)} if host else named


@contextmanager
def imagined(ranks: int) -> Iterator[None]:
    """Let `place` answer as on the first of ``ranks`` ranks: what will run on them is checked before they exist."""
    changed = variables(Place(0, ranks, 0, ("nowhere", 0)))
    before = {name: os.environ.get(name) for name in changed}
    os.environ.update(changed)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            os.environ.update({name: value} if value is not None else {})


def device_index(local_rank: int, devices: int, environment: Mapping[str, str] = os.environ) -> int:
    """Which of the visible GPUs is this rank's; where a task sees only its own (``--gpus-per-task=1``), that one.

    Raises:
        LaunchError: if more ranks share this machine than it has devices.
    """
    here = environment.get("LOCAL_WORLD_SIZE") or environment.get("SLURM_NTASKS_PER_NODE", "")
    if devices == 1 and "LOCAL_WORLD_SIZE" not in environment:
        return 0
    if local_rank >= devices:
        ranks = f"{here} ranks" if here else f"local rank {local_rank}"
        raise LaunchError(f"{ranks} on this machine, which has {devices} GPUs; start at most {devices} a machine")
    return local_rank


def _number(environment: Mapping[str, str], name: str) -> int:
    text = _text(environment, name)
    if not text.isdigit():
        raise LaunchError(f"{name}={text} is not a number; start with torchrun, deepspeed or srun")
    return int(text)


def _text(environment: Mapping[str, str], name: str) -> str:
    if name not in environment:
        raise LaunchError(f"{name} is not set, and several ranks need it; start with torchrun, deepspeed or srun")
    return environment[name]


def _first_host(environment: Mapping[str, str]) -> str:
    nodes = environment.get("SLURM_STEP_NODELIST") or _text(environment, "SLURM_JOB_NODELIST")
    done = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True)
    return done.stdout.split()[0]


def _port(environment: Mapping[str, str]) -> int:
    """A port that all ranks of a step agree on and that other jobs and steps on the machine are unlikely to have."""
    job, step = _number(environment, "SLURM_JOB_ID"), _number(environment, "SLURM_STEP_ID")
    return 20000 + (job * 31 + step) % 10000
