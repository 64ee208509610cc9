"""What ranks exchange in a step, what a checkpoint and a start take, and how all of it grows with the number of GPUs.

Formulas and their sources: docs/traffic.md. Bytes are exact (tests/distributed/test_scaling.py counts them), times are a
model's.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass

from trainer.diagnostics.layout import Layout
from trainer.diagnostics.memory import STATE, memory, seconds_per_step
from trainer.models.architecture import Architecture
from trainer.models.sizes import parameters_of
from trainer.parallel.zero import BUCKET

DDP_BUCKET = 25 * 2**20
"""Bytes of a gradient bucket of DDP."""
LIVE = 2 * BUCKET
"""Elements that ZeRO-3 keeps gathered: a model below is gathered once a step."""
FRAGMENT = 110
"""Bytes of a manifest for each fragment (measured on small and large names)."""


@dataclass(frozen=True)
class Cluster:
    """Speeds in bytes a second, and times in seconds.

    ``within``, ``between``: of one GPU to others of its node, and to other nodes, one direction. ``reached``: the part of
    them that exchanges get. ``storage``: what all nodes share, of which one gets ``node_storage`` at most. ``hop``: until a
    message has reached the next node; ``step``: the next GPU inside one. ``start``: imports and whatever else comes before
    the ranks meet.
    """

    per_node: int = 8
    within: float = 450e9
    between: float = 50e9
    storage: float = 100e9
    node_storage: float = 10e9
    reached: float = 0.8
    hop: float = 10e-6
    step: float = 2e-6
    start: float = 20.0

    def nodes(self, ranks: int) -> int:
        """Nodes that so many ranks take."""
        return -(-ranks // self.per_node)

    def speed(self, ranks: int) -> float:
        """Bytes a second that pass through a rank in a ring over all ranks.

        Rings leave a node through all of its network cards, each with a part of the data, so that the node's cards together
        or a GPU's inner links are the limit.
        """
        if self.nodes(ranks) == 1:
            return self.within * self.reached
        return min(self.within, self.between * min(self.per_node, ranks)) * self.reached

    def latency(self, ranks: int, kind: str) -> float:
        """Seconds that a collective takes without any data: once round a ring; an all-reduce twice, or up and down a tree."""
        nodes = self.nodes(ranks)
        ring = (ranks - nodes) * self.step + (nodes if nodes > 1 else 0) * self.hop
        tree = math.log2(nodes) * self.hop + (min(ranks, self.per_node) - 1) * self.step
        return 2 * min(ring, tree) if kind == "all_reduce" else ring


@dataclass(frozen=True)
class Exchange:
    """A collective over all ranks: ``bytes`` of the whole tensor, ``times`` a step, in so many ``pieces`` each time."""

    kind: str
    what: str
    bytes: float
    times: int
    pieces: int

    def through(self, ranks: int) -> float:
        """Bytes that a rank sends in a step (and receives as many).

        A ring's reduce-scatter and all-gather pass (W - 1) / W of the tensor through every rank, its all-reduce is both
        (Patarasuk and Yuan 2009, https://doi.org/10.1016/j.jpdc.2008.09.002): no algorithm sends less.
        """
        return (2 if self.kind == "all_reduce" else 1) * (ranks - 1) / ranks * self.bytes * self.times

    def seconds(self, ranks: int, cluster: Cluster) -> float:
        """Time of a step's exchanges of this kind, if nothing is computed meanwhile."""
        waits = self.times * self.pieces * cluster.latency(ranks, self.kind)
        return self.through(ranks) / cluster.speed(ranks) + waits


def exchanges(learnt: float, held: float, layers: int, layout: Layout, micro_batches: int) -> Iterator[Exchange]:
    """What a step of ``micro_batches`` exchanges. ``learnt``: trained elements; ``held``: all, frozen ones too.

    As DeepSpeed 0.19 does it: ZeRO-2 reduces whole buckets on all ranks, and both stages 2 and 3 do so for every micro-batch.
    """
    gradient, working = (2 if layout.low_precision_weights else 4), (2 if layout.low_precision_weights else 4)
    buckets = max(1, round(learnt / BUCKET))
    if layout.stage == 0:
        yield Exchange("all_reduce", "gradients", 4 * learnt, 1, max(1, round(4 * learnt / DDP_BUCKET)))
        return
    if layout.stage < 3:
        yield Exchange("all_reduce", "gradients", gradient * learnt, micro_batches if layout.stage == 2 else 1, buckets)
        yield Exchange("all_gather", "updated weights", working * learnt, 1, buckets)
        return
    yield Exchange("reduce_scatter", "gradients", gradient * learnt, micro_batches, buckets)
    gathers = 1 if held <= LIVE else 2 * micro_batches
    yield Exchange("all_gather", "weights of a layer", working * held, gathers, layers + 2)


@dataclass(frozen=True)
class Outlook:
    """A run on so many ranks. Seconds of a step's computing and exchanging; bytes sent by a rank; of checkpoint and start."""

    layout: Layout
    size: int
    compute: float
    exchange: float
    sent: float
    memory: float
    saved: float
    save: float
    start: float
    resume: float
    manifest: float

    @property
    def efficiency(self) -> tuple[float, float]:
        """The part of a step in which something is computed: if nothing overlaps, and if everything does."""
        return self.compute / (self.compute + self.exchange), self.compute / max(self.compute, self.exchange)


def outlook(
    a: Architecture, layout: Layout, size: int, peak: float, utilisation: float, cluster: Cluster, tensors: int
) -> Outlook:
    """How a run of ``size`` rows a step (more, where each rank would have none) does on ``layout.ranks`` ranks."""
    ranks, held = layout.ranks, parameters_of(a)
    learnt = layout.adapters or held
    micro_batches = max(1, size // (layout.micro * ranks))
    size = micro_batches * layout.micro * ranks
    found = list(exchanges(learnt, held, a.num_hidden_layers, layout, micro_batches))
    compute = seconds_per_step(a, layout, size * layout.length, peak, utilisation)
    saved, nodes = float(STATE * learnt), cluster.nodes(ranks)
    disk = min(cluster.storage, nodes * cluster.node_storage)
    # Whoever holds whole weights reads them whole, once a node; what is verified and sharded is read once.
    weights = (2 if layout.low_precision_weights else 4) * held * (nodes if layout.stage < 3 else 1)
    state = STATE * learnt * (1 + (nodes if layout.stage == 0 else 1))
    fragments = 3 * tensors * (ranks if layout.stage == 3 else 1) + 3 * ranks
    start = cluster.start + ranks * 1e-3 + weights / disk
    return Outlook(
        layout, size, compute,
        sum(e.seconds(ranks, cluster) for e in found) if ranks > 1 else 0.0,
        sum(e.through(ranks) for e in found) if ranks > 1 else 0.0,
        memory(a, layout).total, saved, saved / disk, start, start + state / disk, float(FRAGMENT * fragments),
    )  # fmt: skip


def plan(
    a: Architecture, layout: Layout, low: bool, stages: list[int], counts: list[int], size: int, peak: float,
    utilisation: float, cluster: Cluster, tensors: int,
) -> list[Outlook]:  # fmt: skip
    """The outlook for every number of GPUs and every stage; ``low``: ZeRO's working copy is bfloat16."""
    return [
        outlook(
            a, dataclasses.replace(layout, stage=stage, ranks=ranks, low_precision_weights=low and stage > 0),
            size, peak, utilisation,
            cluster, tensors,
        )
        for ranks in counts
        for stage in stages
    ]  # fmt: skip


def table(found: list[Outlook], limit: float) -> Iterator[str]:
    """A line an outlook; ``limit``: bytes of a device."""
    heads = [
        "GPUs",
        "strategy",
        "memory",
        "rows a step",
        "computing",
        "a GPU sends",
        "exchanging",
        "efficiency",
        "save",
    ]
    yield f"| {' | '.join([*heads, 'start, resume'])} |"
    yield "| ---: | --- " + "| ---: " * 8 + "|"
    for o in found:
        name = "ddp" if o.layout.stage == 0 else f"zero{o.layout.stage}"
        low, high = o.efficiency
        cells = [
            f"{o.layout.ranks:,}", name,
            f"{o.memory / 1e9:.0f} GB{'' if o.memory <= limit else ' (too much)'}", f"{o.size:,}",
            f"{o.compute:.2f} s", f"{o.sent / 1e9:.1f} GB", f"{o.exchange:.2f} s", f"{low:.0%} .. {high:.0%}",
            f"{o.saved / 1e9:.0f} GB + {o.manifest / 1e6:.1f} MB, {o.save:.1f} s", f"{o.start:.0f} s, {o.resume:.0f} s",
        ]  # fmt: skip
        yield f"| {' | '.join(cells)} |"
