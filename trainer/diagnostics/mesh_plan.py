"""Which of many layouts is the one to run: what fits, what is fastest by the estimate, and why the others are not."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from trainer.diagnostics.layout import Layout
from trainer.diagnostics.links import Links
from trainer.diagnostics.memory import USABLE, memory
from trainer.diagnostics.step_time import StepTime, step_time
from trainer.diagnostics.traffic import exchanges
from trainer.models.architecture import Architecture
from trainer.models.recompute import Recompute
from trainer.tracking.throughput import training_flops

AXES = ("tensor", "sequence", "expert", "pipeline")
MARGIN = 0.03
"""Part of a step's time that an axis more must save: the estimate is no better, and every axis can go wrong."""


@dataclass(frozen=True)
class Cluster:
    """What a plan is for.

    Args:
        nodes: How many.
        device: Its name in `PEAKS`.
        peak: Operations a second of a device at best.
        utilisation: The part of it that computing reaches; exchanges and bubbles are counted on their own.
        limit: Bytes of a device, of which `USABLE` are planned with.
        links: Between devices; ``links.per_node`` are on a node.
    """

    nodes: int
    device: str
    peak: float
    utilisation: float
    limit: float
    links: Links

    @property
    def ranks(self) -> int:
        """Devices of all nodes."""
        return self.nodes * self.links.per_node


@dataclass(frozen=True)
class Choice:
    """A way to run.

    Args:
        strategy: Its name, and its settings other than the sizes of axes.
        layout: How the model is spread and computed.
        memory: Bytes of a rank.
        time: Of a step.
    """

    strategy: str
    layout: Layout
    memory: float
    time: StepTime

    @property
    def mesh(self) -> tuple[str, tuple[int, ...]]:
        """What it has in common with the same mesh in other micro-batches."""
        return self.strategy, tuple(getattr(self.layout, axis) for axis in AXES)

    @property
    def overrides(self) -> str:
        """What to add to the command line."""
        sizes = [f"strategy.{a}={getattr(self.layout, a)}" for a in AXES if getattr(self.layout, a) > 1]
        rest = [f"batch.micro={self.layout.micro}", f"model.activation_checkpointing={self.layout.recompute.value}"]
        return " ".join([self.strategy, *sizes, *rest])

    @property
    def burden(self) -> tuple[int, int, int]:
        """What is simpler comes first: fewer axes, a smaller replica, less that is computed again."""
        sizes = [getattr(self.layout, axis) for axis in AXES]
        again = list(Recompute).index(self.layout.recompute)
        return sum(size > 1 for size in sizes), self.layout.ranks // self.layout.data, again


def choices(
    a: Architecture, layouts: Iterable[tuple[str, Layout]], cluster: Cluster, recompute: Sequence[Recompute]
) -> tuple[list[Choice], list[Choice]]:
    """Of ``layouts`` by strategy the best of each mesh that fits, fastest first; and of the others what is nearest to it.

    ``recompute``: what a backward may compute again, the least first; the first of them that fits is taken.
    """
    fitting: dict[Any, list[Choice]] = defaultdict(list)
    larger: dict[Any, list[Choice]] = defaultdict(list)
    for strategy, layout in layouts:
        need = 0.0
        for again in recompute:
            spread = dataclasses.replace(layout, recompute=again)
            need = memory(a, spread).total
            if need <= USABLE * cluster.limit:
                break
        fits = need <= USABLE * cluster.limit
        choice = Choice(strategy, spread, need, _time(a, spread, cluster) if fits else StepTime(0.0, {}, 0.0))
        (fitting if fits else larger)[choice.mesh].append(choice)
    least = (min(same, key=lambda c: c.memory) for mesh, same in larger.items() if mesh not in fitting)
    quickest = (_longest_of_equal(same) for same in fitting.values())
    return sorted(quickest, key=lambda c: c.time.total), sorted(least, key=lambda c: (c.burden, c.memory))


def _longest_of_equal(same: Sequence[Choice]) -> Choice:
    """Of one mesh the fastest; of as fast ones that with most rows at once, which keep a device's kernels longest."""
    limit = 1.01 * min(choice.time.total for choice in same)
    return max((choice for choice in same if choice.time.total <= limit), key=lambda choice: choice.layout.micro)


def _time(a: Architecture, layout: Layout, cluster: Cluster) -> StepTime:
    return step_time(a, layout, peak=cluster.peak, utilisation=cluster.utilisation, links=cluster.links)


def best_of(fitting: Sequence[Choice]) -> Choice:
    """The simplest of those that are as fast as the fastest, within `MARGIN`."""
    limit = (1 + MARGIN) * fitting[0].time.total
    return min((c for c in fitting if c.time.total <= limit), key=lambda c: (c.burden, c.time.total))


def utilisation(a: Architecture, choice: Choice, cluster: Cluster) -> float:
    """The part of the devices' peak that a model's own operations take of a step (MFU)."""
    spread = choice.layout
    tokens = spread.micro_batches * spread.micro * spread.length * spread.data
    flops = training_flops(a, tokens, tokens * (spread.length + 1) / 2)
    return flops / (cluster.ranks * cluster.peak * choice.time.total)


def why_not(choice: Choice, best: Choice, cluster: Cluster) -> str:
    """Why a choice loses against the best one."""
    if not choice.time.compute:
        return f"needs {choice.memory / 1e9:,.0f} GB of {USABLE * cluster.limit / 1e9:.0f}"
    slower = choice.time.total / best.time.total - 1
    if slower <= MARGIN:
        return f"as fast ({slower:+.1%}){_more(choice, best)}"
    more = {name: seconds - best.time.parts.get(name, 0.0) for name, seconds in choice.time.parts.items()}
    name = max(more, key=lambda part: more[part])
    again = choice.layout.recompute
    what = {"computing": f"computing again ({again.value})", "bubble": "bubble"}.get(name, f"exchanges of {name}")
    if name == "computing" and again is best.layout.recompute:
        what = "a slowest stage"
    return f"{slower:+.0%}: {more[name]:.2f} s more for {what}"


def _more(choice: Choice, best: Choice) -> str:
    words = (", with more axes", ", in a larger replica", ", and more is computed again")
    pairs = zip(words, choice.burden, best.burden, strict=True)
    return next((word for word, own, other in pairs if own > other), "")


def table(a: Architecture, rows: Sequence[Choice], best: Choice, cluster: Cluster) -> Iterator[str]:
    """A line a choice, the best one first."""
    heads = ("strategy", *AXES, "data", "batch.micro", "recompute", "memory", "step", "MFU", "")
    yield f"| {' | '.join(heads)} |"
    yield f"| --- {'| ---: ' * 6}| --- {'| ---: ' * 3}| --- |"
    for choice in rows:
        spread, timed = choice.layout, choice.time.compute > 0
        sizes = [str(getattr(spread, axis)) for axis in AXES]
        cells = [
            choice.strategy.replace("strategy=", "").replace("strategy.", ""), *sizes, str(spread.data), str(spread.micro),
            spread.recompute.value, f"{choice.memory / 1e9:,.0f} GB", f"{choice.time.total:.2f} s" if timed else "-",
            f"{utilisation(a, choice, cluster):.0%}" if timed else "-",
            "best" if choice is best else why_not(choice, best, cluster),
        ]  # fmt: skip
        yield f"| {' | '.join(cells)} |"


def shown(fitting: Sequence[Choice], larger: Sequence[Choice], best: Choice, count: int = 5) -> list[Choice]:
    """What a table shows: the best, the fastest others, and whatever has no axis, whether it fits or not."""
    others = [choice for choice in fitting if choice is not best]
    return [best, *others[:count], *(choice for choice in [*others[count:], *larger] if choice.burden[0] == 0)]


def account(a: Architecture, choice: Choice, cluster: Cluster) -> Iterator[str]:
    """Where the time of a step goes, and what a rank sends along each axis."""
    parts = (f"{name} {seconds:.2f} s" for name, seconds in choice.time.parts.items() if seconds >= 0.005)
    yield f"a step: {', '.join(parts)} (exchanges: what computing does not hide)"
    sent: dict[str, float] = {}
    for exchange in exchanges(a, choice.layout, cluster.links.per_node):
        sent[exchange.axis] = sent.get(exchange.axis, 0.0) + exchange.sent
    if sent:
        yield f"a rank sends {', '.join(f'{size / 1e9:,.1f} GB ({axis})' for axis, size in sent.items())} a step"
