"""What ranks find out about each other before they work together: sums, clocks, and the speed of every link."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist

from trainer.parallel import distributed

CLOCK_READINGS = 3


@dataclass(frozen=True)
class Link:
    """What went from one rank to another: gigabytes a second, and whether it arrived as it was sent."""

    source: int
    target: int
    speed: float
    intact: bool


def wrong_sums(elements: int = 1 << 16) -> list[int]:
    """Ranks at which a sum over all ranks did not come out; the numbers are whole, so it is exact. Collective."""
    world = distributed.world()
    place = torch.arange(elements, device=world.device, dtype=torch.float32) % 1021
    total = distributed.sum_over_data(place * (world.rank % 61 + 1))
    factor = sum(rank % 61 + 1 for rank in range(world.size))
    return [rank for rank, fine in enumerate(distributed.gather(bool((total == place * factor).all()))) if not fine]


def clock_offsets() -> list[float]:
    """Seconds by which every rank's clock is ahead of rank 0's, the smallest of a few readings. Collective.

    A reading is off by as much as the ranks leave a barrier apart: milliseconds, more on a busy machine.
    """
    readings = []
    for _ in range(CLOCK_READINGS):
        distributed.barrier()
        readings.append(time.time())
    every = distributed.gather(readings)
    return [min((a - b for a, b in zip(mine, every[0], strict=True)), key=abs) for mine in every]


def all_reduce_speed(megabytes: float = 64, times: int = 3) -> float:
    """Gigabytes a second that a rank moves in a ring all-reduce, the best of several. Collective.

    2 (W - 1) / W times the size of the tensor pass through every rank (Patarasuk and Yuan 2009).
    """
    world = distributed.world()
    tensor = torch.ones(int(megabytes * 1e6 / 4), device=world.device)
    best = 0.0
    for _ in range(times + 1):  # the first opens connections
        distributed.barrier()
        seconds = _timed(lambda: dist.all_reduce(tensor))
        best = max(best, 2 * (world.size - 1) / world.size * tensor.nbytes / seconds / 1e9)
        tensor.fill_(1.0)
    return best if world.size > 1 else 0.0


def links(megabytes: float = 16) -> list[Link]:
    """Send between ranks 1, 2, 4, ... apart, all at the same time, so that every rank has several links. Collective."""
    world = distributed.world()
    mine = [link for apart in distances(world.size) for link in _to_and_from(apart, megabytes)]
    return [
        Link(*values) for part in distributed.gather([tuple(vars(link).values()) for link in mine]) for values in part
    ]


def distances(ranks: int) -> list[int]:
    """1, 2, 4, ... below the number of ranks."""
    return [1 << n for n in range(ranks.bit_length()) if 1 << n < ranks]


def _to_and_from(apart: int, megabytes: float) -> Iterator[Link]:
    """Send to the rank so far behind and take from the one so far before; twice, since the first opens a connection."""
    world = distributed.world()
    target, source = (world.rank + apart) % world.size, (world.rank - apart) % world.size
    size = int(megabytes * 1e6 / 4)
    sent = torch.arange(size, device=world.device, dtype=torch.float32) % 1021 + world.rank
    seconds = 0.0
    received = torch.empty_like(sent)
    for _ in range(2):
        received.zero_()
        distributed.barrier()

        def exchange() -> None:
            operations = [dist.P2POp(dist.isend, sent, target), dist.P2POp(dist.irecv, received, source)]
            for work in dist.batch_isend_irecv(operations):
                work.wait()

        seconds = _timed(exchange)
    intact = bool((received == torch.arange(size, device=world.device, dtype=torch.float32) % 1021 + source).all())
    yield Link(source, world.rank, sent.nbytes / seconds / 1e9, intact)


def _timed(action) -> float:  # type: ignore[no-untyped-def]
    device = distributed.world().device
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    action()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began
