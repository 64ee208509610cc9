"""The session of ranks: who I am, and the few exchanges that the rest of the framework needs.

Every function works without a process group, as rank 0 of 1. Objects travel over gloo, whatever carries tensors.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import HashStore, PrefixStore
from torch.distributed.rendezvous import rendezvous

from trainer.metrics import Metrics
from trainer.parallel.environment import device_index, place, variables

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """This process's place: ``rank`` of ``size``, ``local_rank`` on its machine, and its ``device``."""

    rank: int
    size: int
    local_rank: int
    device: torch.device


_world = World(0, 1, 0, torch.device("cpu"))
_control: dist.ProcessGroup | None = None
_ended: list[dist.ProcessGroup | None] = []
"""Groups of sessions that ended. A gloo group that dies waits for its thread with the interpreter locked, and that thread may
just then need the lock to let go of a tensor: the rank hangs (2 of 60 two-rank runs with torch 2.13). So none dies."""


class RankError(RuntimeError):
    """At least one rank failed in something that all ranks do together; the message names each."""


def ranks() -> int:
    """How many ranks the launcher's environment says there are; known before they meet."""
    return place().size


@contextmanager
def session(timeout: float = 1800.0) -> Iterator[World]:
    """Join the other ranks for the length of a run. ``timeout``: seconds until a collective that hangs is an error."""
    global _world, _control
    # torch 2.13 gave some collectives and an option of DDP new names and says so at every call; 2.11 has only the old ones.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    warnings.filterwarnings("ignore", category=FutureWarning, message=".*broadcast_buffers")
    here = place()
    cuda = torch.cuda.is_available()
    device = torch.device("cpu")
    if cuda:
        device = torch.device("cuda", device_index(here.local_rank, torch.cuda.device_count()))
        torch.cuda.set_device(device)
    _world = World(here.rank, here.size, here.local_rank, device)
    try:
        if here.master is not None:
            os.environ.update(variables(here))
            wait = timedelta(seconds=timeout)
            store, _, _ = next(iter(rendezvous("env://", timeout=wait)))
            # torchrun's store outlives its workers: an attempt without its own names meets the addresses of the one before.
            attempt = PrefixStore(f"attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
            dist.init_process_group(
                backend(), store=attempt, rank=here.rank, world_size=here.size, timeout=wait,
                device_id=device if cuda else None,
            )  # fmt: skip
            _control = dist.new_group(backend="gloo", timeout=wait) if cuda else dist.group.WORLD
        yield _world
    finally:
        if dist.is_initialized():
            _ended.extend([dist.group.WORLD, _control])
            dist.destroy_process_group()
        _world, _control = World(0, 1, 0, torch.device("cpu")), None


def ensure_group() -> None:
    """Make a process group of one where there is none: DeepSpeed wants one even then."""
    if not dist.is_initialized():
        dist.init_process_group(backend(), store=HashStore(), rank=0, world_size=1)


def backend() -> str:
    """What carries tensors: NCCL between GPUs, else gloo."""
    return "nccl" if torch.cuda.is_available() else "gloo"


def world() -> World:
    """This process's place in the current session."""
    return _world


def all_sum(value: Tensor) -> Tensor:
    """The sum of ``value`` over all ranks, on this rank's device."""
    value = value.detach().clone().to(_world.device)
    if _world.size > 1:
        dist.all_reduce(value)
    return value


def reduce(metrics: Metrics) -> dict[str, Tensor]:
    """Combine every rank's numbers in one exchange; collective, with the same names on all ranks."""
    mine = metrics.packed().to(_world.device)
    if not len(mine):
        return {}
    if _world.size == 1:
        return metrics.reduced(mine[None])
    every = mine.new_empty(_world.size, *mine.shape)
    dist.all_gather_into_tensor(every.view(-1, mine.shape[-1]), mine)
    return metrics.reduced(every)


def gather(value: T) -> list[T]:
    """Every rank's ``value`` (any small Python object made of numbers, strings, lists and dicts), in rank order."""
    if _world.size == 1:
        return [value]
    every: list[T | None] = [None] * _world.size
    dist.all_gather_object(every, value, group=_control)
    return every  # type: ignore[return-value]


def barrier() -> None:
    """Wait until every rank is here."""
    gather(None)


def together(action: Callable[[], T]) -> list[T]:
    """Run ``action`` on every rank and return all results; where one rank fails, all raise instead of waiting for it.

    Raises:
        RankError: naming every rank that failed and why.
    """
    error: Exception | None = None
    try:
        mine: tuple[bool, T | str] = (True, action())
    except Exception as caught:
        error, mine = caught, (False, f"{type(caught).__name__}: {caught}")
    every = gather(mine)
    failed = [f"rank {rank}: {value}" for rank, (fine, value) in enumerate(every) if not fine]
    if failed:
        raise RankError("; ".join(failed)) from error
    return [value for _, value in every]  # type: ignore[misc]


def on_first_rank(action: Callable[[], T]) -> T:
    """Run ``action`` on rank 0 alone and give its result to all ranks; its failure is everyone's.

    Raises:
        RankError: if it failed on rank 0.
    """
    return together(lambda: action() if _world.rank == 0 else None)[0]  # type: ignore[return-value]
