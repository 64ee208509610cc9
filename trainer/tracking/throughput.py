"""How fast a run is: where its time goes, tokens per second, the part of the device's peak that is used, and memory."""

from __future__ import annotations

import math
import re
import resource
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import psutil
import torch

from trainer.models.architecture import Architecture
from trainer.models.sizes import multiplied_by
from trainer.parallel.distributed import World
from trainer.parallel.watchdog import Watchdog

PEAKS = {
    "GB300": (2500.0, 80.0),
    "GB200": (2500.0, 80.0),
    "B300": (2250.0, 75.0),
    "B200": (2250.0, 75.0),
    "GH200": (989.0, 67.0),
    "H200": (989.0, 67.0),
    "H200 NVL": (835.0, 60.0),
    "H100": (989.0, 67.0),
    "H100 NVL": (835.0, 60.0),
    "H100 PCIe": (756.0, 51.0),
    "H800": (989.0, 67.0),
    "H20": (148.0, 44.0),
    "A100": (312.0, 19.5),
    "A100 PCIe": (312.0, 19.5),
    "A40": (149.7, 37.4),
    "A30": (165.0, 10.3),
    "A10G": (70.0, 35.0),
    "A10": (125.0, 31.2),
    "L40S": (362.0, 91.6),
    "L40": (181.0, 90.5),
    "L4": (121.0, 30.3),
    "RTX 5090": (209.5, 104.8),
    "RTX 4090": (165.0, 82.6),
    "RTX 3090": (71.0, 35.6),
    "V100": (125.0, 15.7),
    "V100 PCIe": (112.0, 14.0),
    "T4": (65.0, 8.1),
    "MI300X": (1307.0, 163.4),
    "MI250X": (191.5, 23.9),  # torch sees each of its two dies as a device
}
"""Dense peaks in TFLOP/s (bf16 or fp16 with float32 accumulation, float32 without TF32), from the vendors' data sheets."""
FORM = re.compile(r"NVIDIA|AMD|Tesla|GeForce|Instinct|SXM\d?|OAM|\d+GB|HBM\d?e?", re.IGNORECASE)
"""Words in the names of devices that do not change their peaks."""
PRODUCT = {"cuda": 8192, "cpu": 1024}
"""Size of the matrices that measure a device: their product must take far longer than to launch it."""


class Stopwatch:
    """Seconds spent in named laps since they were last taken.

    On CUDA the work of a lap runs after the lap has returned, so its time is between two events on the device; they are read
    in `take`, when they have long passed.
    """

    def __init__(self, device: torch.device, watchdog: Watchdog | None = None) -> None:
        self._cuda = device.type == "cuda"
        self._guarded = watchdog.phase if watchdog else lambda *_: nullcontext()
        self._seconds: dict[str, float] = defaultdict(float)
        self._inner = 0.0
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def lap(self, name: str) -> Iterator[None]:
        """Time what happens inside under ``name``, watched for hanging; laps inside it are taken out of its own time."""
        with self._guarded(name):
            yield from self._timed(name)

    def unlimited(self, name: str) -> AbstractContextManager[None]:
        """A phase of the watchdog's that takes as long as it takes; it is not timed."""
        return self._guarded(name, math.inf)

    def _timed(self, name: str) -> Iterator[None]:
        if self._cuda and name in ("forward_backward", "optimizer"):
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            first.record()
            yield
            last.record()
            self._events.append((name, first, last))
            return
        before, self._inner = self._inner, 0.0
        started = time.perf_counter()
        yield
        spent = time.perf_counter() - started
        self._seconds[name] += spent - self._inner
        self._inner = before + spent

    def take(self) -> dict[str, float]:
        """Seconds by lap since the last call; laps that the device has not finished come with the next one."""
        later = []
        for name, first, last in self._events:
            if last.query():  # type: ignore[no-untyped-call]
                self._seconds[name] += first.elapsed_time(last) / 1000
            else:
                later.append((name, first, last))
        self._events = later
        taken, self._seconds = dict(self._seconds), defaultdict(float)
        return taken


def training_flops(a: Architecture, tokens: float, pairs: float) -> float:
    """Floating-point operations that a forward and a backward need, recomputation aside.

    6 for every weight that multiplies a token (all but the input embedding; a tied one counts once, as the projection), and
    12 * layers * heads * head_dim for every (query, key) ``pair`` inside a document: the count of PaLM (Chowdhery et al.
    2022, arXiv:2204.02311, appendix B), but with causal pairs only, so that a
    utilisation from it is the lower of the two usual ones. A token of a gated delta rule reads a matrix of each head twice
    and writes it once: 18 for each of its elements.
    """
    heads = a.num_attention_heads * a.head_dim
    attending = sum(not layer.delta for layer in a.layers)
    recurrent = (len(a.layers) - attending) * a.delta_value_heads * a.delta_key_size * a.delta_value_size
    return (6 * multiplied_by(a) + 18 * recurrent) * tokens + 12 * attending * heads * pairs


@cache
def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second of a device at best: from a table, or measured with a matrix product where it is not there."""
    known = known_peaks(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    if known is None:
        return measured_flops(device, dtype)
    return 1e12 * known[1 if dtype is torch.float32 else 0]


def known_peaks(name: str) -> tuple[float, float] | None:
    """`PEAKS` of a device by the name that its driver gives it; None for every variant that is not listed."""
    words = [word for word in re.split(r"[ -]", name) if not FORM.fullmatch(word)]
    return {key.lower(): peaks for key, peaks in PEAKS.items()}.get(" ".join(words).lower())


def measured_flops(device: torch.device, dtype: torch.dtype, size: int | None = None, seconds: float = 0.2) -> float:
    """Operations per second of a square matrix product of ``size``, by default `PRODUCT`, the best of several."""
    size = size or PRODUCT[device.type]
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    best = 0.0
    with torch.no_grad():
        a @ b
        end = time.perf_counter() + seconds
        while not best or time.perf_counter() < end:
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            started = time.perf_counter()
            a @ b
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            best = max(best, 2 * size**3 / (time.perf_counter() - started))
    return best


def peak_memory_gb(device: torch.device) -> float:
    """Most memory that this rank has held, GB: of its device, or of its process on CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return host_peak_bytes() / 1e9


def free_memory_gb() -> float:
    """Memory that is free, GB: on this rank's device, or on its machine; infinite where that does not say."""
    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()[0] / 1e9
    with suppress(OSError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024 / 1e9
    return math.inf


def device_bytes(ranks: int) -> float:
    """Memory that a rank can have, bytes: its device's, or on CPU its part of the machine's."""
    if torch.cuda.is_available():
        return float(torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory)
    return float(psutil.virtual_memory().total) / ranks


def host_peak_bytes() -> int:
    """Most memory that this process has held, bytes."""
    # Not ru_maxrss on Linux: a new process begins with its parent's.
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@dataclass(frozen=True)
class Timing:
    """The clock between two logged steps.

    Attributes:
        seconds: of training, without evaluations and checkpoints.
        laps: seconds by name.
        pairs: query-key pairs of one rank.
        memory_gb: peak of the run so far.
    """

    seconds: float
    laps: dict[str, float]
    attention_pairs: int
    memory_gb: float


class Speed:
    """Turns tokens and the clock into ``tokens_per_second``, ``mfu``, ``memory_gb`` and ``time/*``."""

    def __init__(self, watch: Stopwatch, a: Architecture, world: World, dtype: torch.dtype, tokens: float) -> None:
        self.watch, self.architecture, self.device, self.ranks = watch, a, world.device, world.devices
        # On other ranks nobody reads the figures, so nothing is measured there.
        self.peak = peak_flops(world.device, dtype) * world.devices if world.is_main else 1.0
        self._tokens, self._pairs = tokens, 0
        self._since = time.perf_counter()

    def count(self, attention_pairs: int) -> None:
        """Note the query-key pairs of a step of this rank."""
        self._pairs += attention_pairs

    def lap(self) -> Timing:
        """The clock since the last call; evaluations and checkpoints are left out of the seconds of training."""
        now, laps = time.perf_counter(), self.watch.take()
        seconds = max(1e-9, now - self._since - laps.get("evaluation", 0.0) - laps.get("checkpoint", 0.0))
        timing = Timing(seconds, laps, self._pairs, peak_memory_gb(self.device))
        self._since, self._pairs = now, 0
        return timing

    def figures(self, tokens: float, timing: Timing) -> dict[str, float]:
        """The metrics of the steps of ``timing``, at whose end ``tokens`` tokens had been seen; ``time/*`` of this rank."""
        learnt, self._tokens = tokens - self._tokens, tokens
        flops = training_flops(self.architecture, learnt, timing.attention_pairs * self.ranks)
        if self.device.type == "cpu":
            # A peak that was measured on a busy machine is too low: no step does more than the most that is possible.
            self.peak = max(self.peak, flops / timing.seconds)
        return {
            "tokens_per_second": learnt / timing.seconds,
            "mfu": flops / timing.seconds / self.peak,
            "memory_gb": timing.memory_gb,
            **{f"time/{name}": value for name, value in timing.laps.items()},
            "time/update": timing.laps.get("forward_backward", 0.0) + timing.laps.get("optimizer", 0.0),
        }
