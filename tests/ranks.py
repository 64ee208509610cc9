"""Real ranks for tests: processes that join a gloo group, run one function each, and hand back what it returned."""

import os
import queue
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from multiprocessing import forkserver as server
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp

from trainer.jobs.process import reserved_port
from trainer.parallel import distributed

_reserved: deque[ExitStack] = deque(maxlen=256)
"""So that a port is nobody else's, however long its ranks take to start."""


def free_port() -> int:
    """A port that nobody else is given until 256 more were asked for."""
    if len(_reserved) == _reserved.maxlen:
        _reserved[0].close()
    _reserved.append(ExitStack())
    return _reserved[-1].enter_context(reserved_port())


_ports: list[int] = []
"""For sessions to come."""


def to_another_port() -> None:
    """Before another session of ranks that had one: a rank that is early would find the store of that."""
    os.environ["MASTER_PORT"] = str(_ports.pop())


@contextmanager
def session_of(replica: int = 1) -> Iterator[distributed.World]:
    """A session of ranks that have not joined one, or had others before; ``replica``: ranks that read the same data."""
    to_another_port()
    with distributed.session(timeout=120, replica=replica) as world:
        yield world


def _rank(
    rank: int,
    size: int,
    ports: list[int],
    joined: bool,
    function: Callable[..., Any],
    args: tuple[Any, ...],
    results: Any,
    finished: Any,
) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(ports[0])
    )
    _ports[:] = ports[1:]
    torch.set_num_threads(1)
    try:
        with distributed.session(timeout=120) if joined else nullcontext():
            results.put((rank, True, function(*args)))
            # The store lives and dies with rank 0: others may still be making a group by it.
            finished.wait(timeout=120)
    except BaseException:
        results.put((rank, False, traceback.format_exc()))
        raise


SESSIONS = 12
"""That ranks which start without one can have, one behind the other."""
PRELOADED = [
    "pytest", "tests.command", "trainer.cli.train", "trainer.compose", "trainer.run", "deepspeed", __name__,
    # What DeepSpeed imports once it is initialised, torch's compiler with it: more than a second.
    "torch._inductor.compile_fx", "deepspeed.module_inject.auto_ep_layer", "deepspeed.runtime.zero.muon.muon_optimizer",
    "deepspeed.runtime.superoffload.superoffload_stage3",
]  # fmt: skip


def forkserver() -> Any:
    """Starts processes from one that has imported everything and computed nothing: imports take longer than most tests."""
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("OMP_NUM_THREADS", "1")  # read when torch is imported
        server.ensure_running()
    return context


def on_ranks(
    size: int, function: Callable[..., Any], *args: Any, timeout: float = 300, joined: bool = True
) -> list[Any]:
    """What ``function(*args)`` returns on each of ``size`` ranks; it must be importable, its results plain or arrays.

    ``joined``: whether the ranks are in a session already, or know their places only (`session_of`).
    """
    context = forkserver()
    results, finished = context.Queue(), context.Event()
    ports = [free_port() for _ in range(1 if joined else 1 + SESSIONS)]
    processes = [
        context.Process(target=_rank, args=(rank, size, ports, joined, function, args, results, finished))
        for rank in range(size)
    ]
    for process in processes:
        process.start()
    gathered: dict[int, Any] = {}
    end = time.monotonic() + timeout
    try:
        while len(gathered) < size:
            try:
                rank, fine, value = results.get(timeout=1)
            except queue.Empty:
                dead = [p.pid for p in processes if p.exitcode not in (None, 0)]
                assert not dead, f"a rank died without a word: {dead}"
                assert time.monotonic() < end, f"only ranks {sorted(gathered)} of {size} finished in {timeout} s"
                continue
            assert fine, f"rank {rank} failed:\n{value}"
            gathered[rank] = value
    finally:
        finished.set()
        for process in processes:
            process.join(timeout=20)
            process.kill()
    return [gathered[rank] for rank in range(size)]
