"""What is checked before several ranks begin: the same software, right sums, clocks, room on disk and in memory.

Quiet when all is well. `onecurve preflight` looks longer: at the speed of devices, disks and links.
"""

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
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch

from trainer.diagnostics.memory import STATE, Layout, memory, parameters_of
from trainer.export.lineage import PACKAGES, version
from trainer.models.architecture import Architecture
from trainer.parallel import distributed
from trainer.parallel import links as preflight
from trainer.parallel.links import Link

log = logging.getLogger(__name__)

SKEW = 1.0
"""Seconds between clocks from which on somebody is told: file times, logs and leases no longer agree."""
SLOW = 0.6
"""Part of the median below which a link, a disk or a device is called slow."""


class PreflightError(RuntimeError):
    """Ranks that would not work together; the message names the nodes."""


@dataclass
class Findings:
    """``problems``: what cannot work, or would give wrong results. ``warnings``: what will be slow, or may fail later."""

    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def software() -> dict[str, str]:
    """What has to be equal on all ranks."""
    versions = {package: found for package in PACKAGES if (found := version(package)) is not None}
    return {"python": ".".join(platform.python_version_tuple()[:2]), **versions, "code": code()}


@cache
def code() -> str:
    """A digest of the package's own source files."""
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parents[1].rglob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


def facts(folder: Path, settings: Any) -> dict[str, Any]:
    """What a rank tells the others. ``folder``: what the run writes to. ``settings``: of the run, as plain values."""
    cuda = torch.cuda.is_available()
    return {
        "host": socket.gethostname(),
        "software": software(),
        "settings": hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[:12],
        "device": torch.cuda.get_device_name() if cuda else f"{platform.machine()} CPU",
        "devices": torch.cuda.device_count() if cuda else 0,
        "memory": _memory(cuda),
        "disk": shutil.disk_usage(_existing(folder)).free,
    }


def quick(folder: Path, settings: Mapping[str, Any], a: Architecture, layout: Layout) -> dict[int, str]:
    """Check in a fraction of a second that the ranks of a run can work together; gives every rank's host. Collective.

    Raises:
        PreflightError: naming the nodes that differ.
    """
    shared = {key: value for key, value in settings.items() if key != "run_dir"}
    every = distributed.gather(facts(folder, shared))
    found = compare(every, memory(a, layout).total, float(STATE * (layout.adapters or parameters_of(a))))
    found.problems += wrong([each["host"] for each in every], preflight.wrong_sums())
    found.warnings += skewed([each["host"] for each in every], preflight.clock_offsets())
    settle(found)
    return {rank: each["host"] for rank, each in enumerate(every)}


def settle(found: Findings) -> None:
    """Warn on the first rank, and refuse to go on where there is a problem.

    Raises:
        PreflightError: with all problems.
    """
    for warning in found.warnings if distributed.world().is_main else ():
        log.warning("preflight: %s", warning)
    if found.problems:
        raise PreflightError("; ".join(found.problems))


def compare(every: Sequence[Mapping[str, Any]], needed: float, saved: float) -> Findings:
    """What is wrong with ranks that say these `facts` of themselves."""
    found, hosts = Findings(), [each["host"] for each in every]
    for name in dict.fromkeys(name for each in every for name in each["software"]):
        installed = [each["software"].get(name, "not installed") for each in every]
        found.problems += _unequal(name, hosts, installed, "install the same everywhere")
    settings, devices, counts = ([str(each[key]) for each in every] for key in ("settings", "device", "devices"))
    found.problems += _unequal("the configuration", hosts, settings, "start all ranks with the same overrides")
    found.warnings += _unequal("the device", hosts, devices, "all wait for the slowest")
    found.warnings += _unequal("the number of devices", hosts, counts, "look for one that fell out")
    for host in dict.fromkeys(hosts):
        mine = [each for each in every if each["host"] == host]
        # Ranks of a node share its memory where they have no device of their own.
        wanted = needed * (1 if mine[0]["devices"] else len(mine))
        if wanted > (room := min(each["memory"] for each in mine)):
            found.warnings.append(
                f"{host} has {room / 1e9:.1f} GB of memory and the run is estimated to take {wanted / 1e9:.1f}; "
                "onecurve estimate says what fits"
            )
        if 2 * saved > (free := min(each["disk"] for each in mine)):
            found.warnings.append(
                f"{host} sees {free / 1e9:.1f} GB free where run_dir is, and a checkpoint takes {saved / 1e9:.1f} twice over "
                "while the next one is written; free space or set checkpoint.keep"
            )
    return found


def skewed(hosts: Sequence[str], offsets: Sequence[float]) -> list[str]:
    """A sentence for every node whose clock is off."""
    middle = statistics.median(offsets)
    off = {host: offset - middle for host, offset in zip(hosts, offsets, strict=True) if abs(offset - middle) > SKEW}
    return [
        f"the clock of {host} is {abs(by):.1f} s {'ahead' if by > 0 else 'behind'}; let it follow a time server"
        for host, by in off.items()
    ]


def slow_links(hosts: Sequence[str], found: Sequence[Link]) -> Findings:
    """What links say: damaged transfers, and ranks most of whose links of a kind are slow."""
    said = Findings()
    for link in found:
        if not link.intact:
            said.problems.append(
                f"what rank {link.source} ({hosts[link.source]}) sends to rank {link.target} ({hosts[link.target]}) "
                "arrives damaged; take one of them out"
            )
    for near in (True, False):
        kind = [link for link in found if (hosts[link.source] == hosts[link.target]) is near]
        if len(kind) < 4:
            continue
        usual = statistics.median(link.speed for link in kind)
        speeds: dict[str, list[float]] = defaultdict(list)
        for link in kind:
            for rank in {link.source, link.target}:
                speeds[f"rank {rank}" if near else hosts[rank]].append(link.speed)
        for name, measured in speeds.items():
            slow = statistics.median(measured)
            if slow < SLOW * usual:
                where = "within its node" if near else "to other nodes"
                said.warnings.append(
                    f"{name} moves {slow:.2f} GB/s {where}, the others {usual:.2f}; look at its cables"
                )
    return said


def slower(what: str, unit: str, names: Sequence[str], values: Sequence[float], remedy: str) -> list[str]:
    """A sentence for every name whose value is well below the median."""
    usual = statistics.median(values)
    slow = {n: v for n, v in zip(names, values, strict=True) if v < SLOW * usual}
    return [
        f"{what} of {name} reaches {value:,.1f} {unit}, the others {usual:,.1f}; {remedy}"
        for name, value in slow.items()
    ]


def write_speed(folder: Path, megabytes: int = 64) -> float:
    """Megabytes a second that reach the disk itself under ``folder``, with fsync."""
    file = _existing(folder) / f".preflight-{socket.gethostname()}-{os.getpid()}"
    block = os.urandom(1 << 20)
    began = time.perf_counter()
    try:
        with file.open("wb") as stream:
            for _ in range(megabytes):
                stream.write(block)
            stream.flush()
            os.fsync(stream.fileno())
        return megabytes * (1 << 20) / 1e6 / (time.perf_counter() - began)
    finally:
        file.unlink(missing_ok=True)


def wrong(hosts: Sequence[str], ranks: Sequence[int]) -> list[str]:
    """A sentence about the nodes of ``ranks`` at which sums do not come out."""
    names = ", ".join(dict.fromkeys(hosts[rank] for rank in ranks))
    return [f"sums over all ranks come out wrong on {names}; take it out and run onecurve preflight"] if ranks else []


def _unequal(what: str, hosts: Sequence[str], values: Sequence[str], remedy: str) -> list[str]:
    """A sentence about the nodes whose value is not that of most."""
    usual = statistics.mode(values)
    at: dict[str, list[str]] = defaultdict(list)
    for host, value in zip(hosts, values, strict=True):
        if host not in at[value]:
            at[value].append(host)
    return [
        f"{what} is {value} on {', '.join(at[value])} and {usual} on {at[usual][0]}; {remedy}"
        for value in at
        if value != usual
    ]


def _memory(cuda: bool) -> int:
    """Bytes that are free: of this rank's device, or of its node."""
    if cuda:
        return int(torch.cuda.mem_get_info()[0])
    for line in Path("/proc/meminfo").read_text().splitlines() if Path("/proc/meminfo").exists() else ():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 1 << 62


def _existing(folder: Path) -> Path:
    """The nearest folder above that exists."""
    return next(path for path in (folder, *folder.resolve().parents) if path.is_dir())
