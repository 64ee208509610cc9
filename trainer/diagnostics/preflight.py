"""What several ranks compare before they work together; for `onecurve preflight` also how fast each of them is."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import shutil
import socket
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import torch

from trainer.config import RunError
from trainer.diagnostics.layout import Layout
from trainer.diagnostics.memory import STATE, memory
from trainer.export.lineage import PACKAGES, device_name, source_digest, version
from trainer.models.architecture import Architecture
from trainer.models.sizes import parameters_of
from trainer.parallel import distributed
from trainer.tracking.throughput import free_memory_gb, measured_flops

log = logging.getLogger(__name__)

Facts = Mapping[str, Any]
MUST_BE_EQUAL = {
    **dict.fromkeys(("python", "code", *PACKAGES), "install the same everywhere"),
    "configuration": "start all ranks with the same overrides",
}
SHOULD_BE_EQUAL = {"device": "all wait for the slowest", "number of GPUs": "look for one that fell out"}
MEASURED = {
    "compute": "TFLOP/s of a matrix product",
    "all_reduce": "GB/s through a rank in an all-reduce",
    "write": "MB/s to the disk, while all ranks write",
    "memory": "GB of memory free",
    "disk": "GB of disk free",
}
SHOULD_BE_FAST = {"compute": "look at its clock and its temperature", "write": "look at its mount"}
SLOW = 0.6
"""Part of the median below which a device or a disk is called slow."""
CLOCK_SKEW = 1.0
"""Seconds by which a clock may differ: beyond it file times, logs and leases no longer agree."""


class PreflightError(RunError):
    """Ranks that would not work together; the message names the nodes."""


def quick(folder: Path, settings: Mapping[str, Any], a: Architecture, layout: Layout) -> dict[int, str]:
    """Check in a fraction of a second that the ranks of a run can work together; gives every rank's host. Collective.

    Raises:
        PreflightError: naming the nodes that differ.
    """
    every = distributed.gather(facts(folder, {key: value for key, value in settings.items() if key != "run_dir"}))
    if wrong := list(problems(every)):
        raise PreflightError("; ".join(wrong))
    needed, saved = memory(a, layout).total, STATE * (layout.adapters or parameters_of(a))
    for warning in warnings(every, needed / 1e9, saved / 1e9) if distributed.world().is_main else ():
        log.warning("preflight: %s", warning)
    return {rank: each["host"] for rank, each in enumerate(every)}


def facts(folder: Path, settings: Any = None) -> dict[str, Any]:
    """What this rank compares with the others: of ``settings`` a digest, of ``folder`` the disk that it is on. Collective."""
    world = distributed.world()
    total = distributed.sum_over_data(summand(world.data.rank, world.device))
    exact = bool((total == summand(0, world.device) * sum(rank % 7 + 1 for rank in range(world.data.size))).all())
    distributed.barrier()
    return {
        "clock": time.time(),
        "host": socket.gethostname(),
        **{package: version(package) or "not installed" for package in PACKAGES},
        "python": ".".join(platform.python_version_tuple()[:2]),
        "code": source_digest(),
        "configuration": hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[:12],
        "device": device_name(),
        "number of GPUs": torch.cuda.device_count(),
        "memory": free_memory_gb(),
        "disk": shutil.disk_usage(next(p for p in (folder, *folder.resolve().parents) if p.is_dir())).free / 1e9,
        "exact": exact,
    }


def summand(rank: int, device: torch.device) -> torch.Tensor:
    """What a rank adds to a sum that comes out exactly: integers, and in float64, so that no number of ranks rounds."""
    return torch.arange(1 << 16, device=device, dtype=torch.float64) % 251 * (rank % 7 + 1)


def speeds(folder: Path, megabytes: int) -> dict[str, Any]:
    """What a longer look adds to `facts`: the first three of `MEASURED`, and whether ``folder`` is shared. Collective."""
    world = distributed.world()
    shared = distributed.sees_files_of_main(folder)
    dtype = torch.bfloat16 if world.device.type == "cuda" else torch.float32
    compute = measured_flops(world.device, dtype, seconds=0.5) / 1e12
    tensor, seconds = torch.ones(megabytes * 250_000, device=world.device), []
    for _ in range(4):  # the first opens connections
        distributed.barrier()
        began = time.perf_counter()
        distributed.sum_in_place(tensor)
        tensor[0].item()  # waits for the device
        seconds.append(time.perf_counter() - began)
    # 2 (W - 1) / W times a tensor's size pass through every rank of a ring (Patarasuk and Yuan 2009).
    all_reduce = 2 * (world.devices - 1) / world.devices * megabytes / 1e3 / min(seconds)
    folder.mkdir(parents=True, exist_ok=True)  # a node that does not share it has none
    with NamedTemporaryFile(dir=folder, buffering=0) as file:
        data, began = os.urandom(megabytes * 1_000_000), time.perf_counter()
        file.write(data)
        os.fsync(file.fileno())
        write = megabytes / (time.perf_counter() - began)
    return {"compute": compute, "all_reduce": all_reduce, "write": write, "shared": shared}


def problems(every: Sequence[Facts]) -> Iterator[str]:
    """What cannot work, or would give wrong results, with ranks of these `facts`."""
    for name, remedy in MUST_BE_EQUAL.items():
        yield from _differing(every, name, remedy)
    if wrong := _hosts(every, "exact", False):
        yield f"sums over all ranks come out wrong on {', '.join(wrong)}; take it out and run onecurve preflight"
    if blind := _hosts(every, "shared", False):
        yield f"{', '.join(blind)} do not see --folder of {every[0]['host']}; use one that all nodes share"


def warnings(every: Sequence[Facts], needed: float = 0, saved: float = 0) -> Iterator[str]:
    """What will be slow, or may fail later, where a rank takes ``needed`` GB of memory and a checkpoint ``saved`` GB."""
    for name, remedy in SHOULD_BE_EQUAL.items():
        yield from _differing(every, name, remedy)
    for name, remedy in SHOULD_BE_FAST.items():
        usual = statistics.median(each.get(name, 0) for each in every)
        for rank, each in enumerate(every):
            if usual and each[name] < SLOW * usual:
                yield f"rank {rank} ({each['host']}): {each[name]:,.1f} {MEASURED[name]}, others {usual:,.1f}; {remedy}"
    now = statistics.median(each["clock"] for each in every)
    for host in dict.fromkeys(each["host"] for each in every):
        ranks = [each for each in every if each["host"] == host]
        if abs(ahead := ranks[0]["clock"] - now) > CLOCK_SKEW:
            yield f"the clock of {host} is {ahead:+.1f} s from the others'; let it follow a time server"
        # Ranks of a node share its memory where they have no device of their own.
        demand = needed * (1 if ranks[0]["number of GPUs"] else len(ranks))
        if demand > (free := min(each["memory"] for each in ranks)):
            yield f"{host} has {free:.1f} GB of memory, and the run needs about {demand:.1f}; see onecurve estimate"
        if 2 * saved > (free := min(each["disk"] for each in ranks)):
            yield f"{host} has {free:.1f} GB of disk, and two checkpoints take {2 * saved:.1f}; free some at run_dir"


def _differing(every: Sequence[Facts], name: str, remedy: str) -> Iterator[str]:
    """A sentence about the nodes whose value is not that of most."""
    values = [each.get(name) for each in every]
    usual = statistics.mode(values)
    for value in dict.fromkeys(values):
        if value != usual:
            nodes = ", ".join(_hosts(every, name, value))
            yield f"{name} is {value} on {nodes} and {usual} on {_hosts(every, name, usual)[0]}; {remedy}"


def _hosts(every: Sequence[Facts], name: str, value: Any) -> list[str]:
    return list(dict.fromkeys(each["host"] for each in every if each.get(name) == value))
