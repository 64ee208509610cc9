"""What a checkpoint and a start take, beside what a step exchanges, and how all of it grows with the number of GPUs.

Formulas and their sources: docs/traffic.md; those of a step are trainer/diagnostics/traffic.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from trainer.diagnostics.layout import Layout
from trainer.diagnostics.links import Links
from trainer.diagnostics.memory import STATE, memory
from trainer.diagnostics.step_time import seconds_per_step
from trainer.diagnostics.traffic import exchanges
from trainer.models.architecture import Architecture
from trainer.models.sizes import parameters_of

FRAGMENT = 110
"""Bytes of a manifest for each fragment (measured on small and large names)."""


@dataclass(frozen=True)
class Cluster:
    """Speeds in bytes a second, and times in seconds.

    ``storage``: what all nodes share, of which one gets ``node_storage`` at most. ``start``: imports and whatever else comes
    before the ranks meet.
    """

    links: Links = Links()
    storage: float = 100e9
    node_storage: float = 10e9
    start: float = 20.0


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
    ranks, total = layout.ranks, parameters_of(a)
    learnt = layout.adapters or total
    layout = dataclasses.replace(layout, micro_batches=max(1, size // (layout.micro * layout.data)))
    size = layout.micro_batches * layout.micro * layout.data
    of_step = list(exchanges(a, layout, cluster.links.per_node))
    compute = seconds_per_step(a, layout, size * layout.length, peak, utilisation)
    saved, nodes = float(STATE * learnt), cluster.links.ranks(ranks).nodes
    disk = min(cluster.storage, nodes * cluster.node_storage)
    # Whoever holds whole weights reads them whole, once a node; what is verified and sharded is read once.
    weights = (2 if layout.low_precision_weights else 4) * total * (nodes if layout.stage < 3 else 1)
    state = STATE * learnt * (1 + (nodes if layout.stage == 0 else 1))
    fragments = 3 * tensors * (ranks if layout.stage == 3 else 1) + 3 * ranks
    start = cluster.start + ranks * 1e-3 + weights / disk
    return Outlook(
        layout, size, compute,
        sum(e.seconds(cluster.links) for e in of_step), sum(e.sent for e in of_step),
        memory(a, layout).total, saved, saved / disk, start, start + state / disk, float(FRAGMENT * fragments),
    )  # fmt: skip


def plan(
    a: Architecture, layouts: Mapping[str, Layout], counts: Sequence[int], size: int, peak: float, utilisation: float,
    cluster: Cluster, tensors: int,
) -> Iterator[tuple[str, Outlook]]:  # fmt: skip
    """The outlook for every number of GPUs and every strategy."""
    for ranks in counts:
        for name, layout in layouts.items():
            spread = dataclasses.replace(layout, ranks=ranks)
            yield name, outlook(a, spread, size, peak, utilisation, cluster, tensors)


def table(outlooks: Iterable[tuple[str, Outlook]], limit: float) -> Iterator[str]:
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
    for name, o in outlooks:
        low, high = o.efficiency
        cells = [
            f"{o.layout.ranks:,}", name,
            f"{o.memory / 1e9:.0f} GB{'' if o.memory <= limit else ' (too much)'}", f"{o.size:,}",
            f"{o.compute:.2f} s", f"{o.sent / 1e9:.1f} GB", f"{o.exchange:.2f} s", f"{low:.0%} .. {high:.0%}",
            f"{o.saved / 1e9:.0f} GB + {o.manifest / 1e6:.1f} MB, {o.save:.1f} s", f"{o.start:.0f} s, {o.resume:.0f} s",
        ]  # fmt: skip
        yield f"| {' | '.join(cells)} |"
