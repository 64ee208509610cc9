"""The session of ranks: who I am, and the few exchanges that the rest of the framework needs.

Every function works without a process group, as rank 0 of 1. Values travel as JSON over gloo, whatever carries tensors:
floats arrive exactly, and nothing that a rank receives is unpickled.
"""

from __future__ import annotations

import json
import os
import time
import uuid
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import HashStore, PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from trainer.batch import copy_to
from trainer.config import InputError, RunError
from trainer.disk import disk_error
from trainer.parallel.determinism import deterministic
from trainer.parallel.environment import device_index, place, variables
from trainer.parallel.flash_attention import fastest_attention

T = TypeVar("T")
PAUSE = 0.5
"""Seconds between two looks at whether the main rank is done."""
Json = TypeVar("Json", bound="str | float | bool | list[Any] | dict[str, Any] | None")
"""What JSON can say: no tuples, no other objects, and only strings as keys."""


@dataclass(frozen=True)
class Ranks:
    """This process's place in a group of ranks.

    Args:
        rank: Its number in the group, from 0.
        size: Ranks in the group.
    """

    rank: int
    size: int

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """What this rank takes of ``items``: every ``size``-th from its own number on."""
        return items[self.rank :: self.size]

    def block(self, first: int, count: int) -> range:
        """The ``count`` consecutive numbers of this rank where the ranks' blocks follow each other from ``first`` on."""
        return range(first + self.rank * count, first + (self.rank + 1) * count)


@dataclass(frozen=True)
class World(Ranks):
    """This process's place among all ranks. Outside `trainer.parallel` ask for what is meant, never for rank and size.

    Args:
        local_rank: Its number on its machine.
        device: What it computes on.
        attention: A line about the kernels that attention takes, where there is a choice.
        replica: Ranks that divide one copy of the model among them, neighbours in number: they read the same data.
    """

    local_rank: int
    device: torch.device
    attention: str | None = None
    replica: int = 1

    @property
    def data(self) -> Ranks:
        """The replicas, which read different data."""
        return Ranks(self.rank // self.replica, self.size // self.replica)

    @property
    def leads(self) -> bool:
        """Whether this rank speaks for its replica, whose ranks all know the same: each replica counts once."""
        return self.rank % self.replica == 0

    @property
    def is_main(self) -> bool:
        """Whether this rank writes what is written once: the log, the report, the export."""
        return self.rank == 0

    @property
    def devices(self) -> int:
        """Devices at work, one a rank: what throughput, estimates and records count."""
        return self.size

    @property
    def name(self) -> str:
        """What files of this rank alone are called."""
        return f"rank-{self.rank:05d}"


_world = World(0, 1, 0, torch.device("cpu"))
_control: dist.ProcessGroup | None = None
_store: Store | None = None
_wait: timedelta | None = None
_long = 0
"""How often this session waited for something long of its main rank."""
_ended: list[dist.ProcessGroup | None] = []
"""Groups of sessions that ended. A gloo group that dies waits for its thread with the interpreter locked, and that thread may
just then need the lock to let go of a tensor: the rank hangs (2 of 60 two-rank runs with torch 2.13). So none dies."""


class RankError(RuntimeError):
    """At least one rank failed in something that all ranks do together, by a fault of the program; it names each."""


def ranks() -> int:
    """How many ranks the launcher's environment says there are; known before they meet."""
    return place().size


@contextmanager
def session(timeout: float = 1800.0, *, same_bytes: bool = False, replica: int = 1) -> Iterator[World]:
    """Join the other ranks for the length of a run.

    ``timeout``: seconds until a collective that hangs is an error. ``same_bytes``: compute the same bytes again on GPUs, too.
    ``replica``: ranks that read the same data together.

    Raises:
        InputError: if the ranks cannot be divided into replicas.
    """
    global _world, _control, _store, _long, _wait
    # torch 2.13 gave some collectives and an option of DDP new names and says so at every call; 2.11 has only the old ones.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    warnings.filterwarnings("ignore", category=FutureWarning, message=".*broadcast_buffers")
    here = place()
    if here.size % replica:
        raise InputError(f"world size {here.size} is not a multiple of the {replica} ranks of a replica; start more")
    cuda = torch.cuda.is_available()
    device = torch.device("cpu")
    if cuda:
        device = torch.device("cuda", device_index(here.local_rank, torch.cuda.device_count()))
        torch.cuda.set_device(device)
    _world = World(here.rank, here.size, here.local_rank, device, replica=replica)
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
            _store, _long, _wait = attempt, 0, wait
        with deterministic(same_bytes), fastest_attention(device, same_bytes=same_bytes) as attention:
            _world = replace(_world, attention=attention)
            yield _world
    finally:
        if dist.is_initialized():
            _ended.extend([dist.group.WORLD, _control])
            dist.destroy_process_group()
        _world, _control, _store = World(0, 1, 0, torch.device("cpu")), None, None


def ensure_group() -> None:
    """Make a process group of one where there is none: DeepSpeed wants one even then."""
    if not dist.is_initialized():
        dist.init_process_group(backend(), store=HashStore(), rank=0, world_size=1)


def backend() -> str:
    """What carries tensors: NCCL between GPUs, else gloo."""
    return "nccl" if _world.device.type == "cuda" else "gloo"


def world() -> World:
    """This process's place in the current session."""
    return _world


def group_of(members: Sequence[int], *, on_host: bool = False) -> dist.ProcessGroup:
    """A group of ranks, of which every rank makes the one that it is in at the same time; it carries tensors of this device.

    ``on_host``: tensors of the CPU instead.
    """
    # Its members alone take part: otherwise every rank would make every group of a thousand.
    group: dist.ProcessGroup = dist.new_group(
        list(members), backend="gloo" if on_host else None, timeout=_wait, use_local_synchronization=True
    )
    _ended.append(group)
    return group


def sum_over_ranks(value: Tensor) -> Tensor:
    """The sum of a tensor of this rank's device over all ranks; bitwise the same everywhere."""
    value = value.clone()
    if _world.size > 1:
        dist.all_reduce(value)
    return value


def sum_over_data(value: Tensor) -> Tensor:
    """The sum of ``value`` over the data ranks, on this rank's device; bitwise the same everywhere."""
    [value] = copy_to(_world.device, [value.detach().clone()])
    sum_in_place(value)
    return value


def sum_in_place(value: Tensor) -> None:
    """Sum a tensor of this rank's device over the data ranks: of all ranks, those that lead their replicas."""
    if not _world.leads:
        value.zero_()
    if _world.size > 1:
        dist.all_reduce(value)


def stack_over_data(value: Tensor) -> Tensor:
    """``value`` ``(...)`` of every data rank, ``(D, ...)``, on this rank's device; of one shape everywhere."""
    return stack(value)[:: _world.replica]


def stack(value: Tensor) -> Tensor:
    """``value`` ``(...)`` of every rank, ``(W, ...)``, on this rank's device; of one shape everywhere."""
    [value] = copy_to(_world.device, [value.detach()])
    if _world.size == 1 or not value.numel():
        return value[None].expand(_world.size, *value.shape)
    every = value.new_empty(_world.size, *value.shape)
    dist.all_gather_into_tensor(every.view(-1, *value.shape[1:]), value)
    return every


def gather_over_data(value: Json) -> list[Json]:
    """Every data rank's ``value``, in the order of the ranks."""
    return gather(value)[:: _world.replica]


def gather(value: Json) -> list[Json]:
    """Every rank's ``value``, in the order of the ranks.

    Raises:
        TypeError: if JSON cannot say it.
    """
    if _world.size == 1:
        return [value]
    mine = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(_world.size)]
    dist.all_gather(sizes, torch.tensor([len(mine)]), group=_control)
    longest = int(max(sizes))
    every = [torch.empty(longest, dtype=torch.uint8) for _ in range(_world.size)]
    dist.all_gather(every, torch.nn.functional.pad(mine, (0, longest - len(mine))), group=_control)
    return [json.loads(text[: int(size)].numpy().tobytes()) for text, size in zip(every, sizes, strict=True)]


def barrier() -> None:
    """Wait until every rank is here."""
    gather(None)


def run_on_all_ranks(action: Callable[[], Json]) -> list[Json]:
    """Run ``action`` on every rank and return all results; where one rank fails, all raise instead of waiting for it.

    Raises:
        InputError: where each of them failed because of something that the user gave.
        RunError: where each failed because of that, or of something that may be well at another attempt.
        RankError: naming every rank that failed and why.
    """
    error: Exception | None = None
    try:
        outcome: list[Any] = [True, action(), ""]
    except Exception as caught:
        error = disk_error(caught) or caught
        kind = "input" if isinstance(error, InputError) else "run" if isinstance(error, RunError) else ""
        outcome = [False, str(error) if kind else f"{type(error).__name__}: {error}", kind]
    every = gather(outcome)
    failed = {rank: each for rank, each in enumerate(every) if not each[0]}
    kinds, texts = {kind for *_, kind in failed.values()}, dict.fromkeys(text for _, text, _ in failed.values())
    if kinds == {"input"}:
        raise InputError("\n".join(texts)) from error
    if failed and "" not in kinds:
        raise RunError("\n".join(texts)) from error
    if failed:
        raise RankError("; ".join(f"rank {rank}: {what}" for rank, (_, what, _) in failed.items())) from error
    return [value for _, value, _ in every]


def run_on_main(action: Callable[[], Json]) -> Json:
    """Run ``action`` on the main rank alone and give its result to all ranks; its failure is everyone's.

    Raises:
        InputError, RunError, RankError: as `run_on_all_ranks`, if it failed there.
    """
    return run_on_all_ranks(lambda: action() if _world.is_main else None)[0]  # type: ignore[return-value]


def run_long_on_main(action: Callable[[], Json]) -> Json:
    """As `run_on_main`, of what may take longer than a collective may: the others look now and then whether it is done.

    Raises:
        InputError, RunError, RankError: as `run_on_all_ranks`, if it failed there.
    """
    global _long
    if _store is None:
        return run_on_main(action)
    _long += 1
    outcome: Any = None
    error: Exception | None = None
    if _world.is_main:
        try:
            outcome = action()
        except Exception as caught:
            error = caught
        finally:
            _store.set(f"long-{_long}", "done")
    while not _store.check([f"long-{_long}"]):
        time.sleep(PAUSE)

    def result() -> Json:
        if error is not None:
            raise error
        return outcome  # type: ignore[no-any-return]

    return run_on_main(result)


def sees_files_of_main(folder: Path) -> bool:
    """Whether this rank sees what the main rank writes to ``folder``, which is made if need be. Collective.

    Raises:
        RunError: if the main rank cannot write there.
    """

    def leave() -> str:
        folder.mkdir(parents=True, exist_ok=True)
        token = folder.resolve() / f".shared-{uuid.uuid4().hex}"
        token.touch()
        return str(token)

    token = Path(run_on_main(leave))
    seen = token.is_file()
    barrier()
    run_on_main(token.unlink)
    return seen
