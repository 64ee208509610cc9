"""Time of a step by the operations and the exchanges that it takes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from trainer.diagnostics.layout import Layout, portions
from trainer.diagnostics.links import Exchange, Links
from trainer.diagnostics.traffic import exchanges
from trainer.models.architecture import Architecture
from trainer.models.recompute import Recompute
from trainer.tracking.throughput import training_flops

AGAIN = {Recompute.none: 1.0, Recompute.selective: 1.05, Recompute.full: 4 / 3}
"""Operations of a step with what the backward computes again, of those without."""


def seconds_per_step(a: Architecture, layout: Layout, tokens: float, peak: float, utilisation: float) -> float:
    """Time of computing ``tokens`` tokens over all ranks, at the part ``utilisation`` of ``peak`` operations a second.

    Of a pipeline that of its slowest stage: the one with most layers, or the last, which has the head.
    """
    flops = training_flops(a, tokens, tokens * (layout.length + 1) / 2)
    if layout.pipeline > 1:
        head = 6.0 * a.vocab_size * a.hidden_size * tokens
        stages = ((p.layers / a.num_hidden_layers * (flops - head) + head * p.last) for p in portions(a, layout))
        flops = layout.pipeline * max(stages)
    return flops * AGAIN[layout.recompute] / (layout.ranks * peak * utilisation)


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step.

    Args:
        compute: Of operations, on the slowest rank.
        exposed: Of exchanges that nothing hides, by axis.
        bubble: That a rank of a pipeline waits for the others.
    """

    compute: float
    exposed: Mapping[str, float]
    bubble: float

    @property
    def total(self) -> float:
        """All of them."""
        return self.compute + sum(self.exposed.values()) + self.bubble

    @property
    def parts(self) -> dict[str, float]:
        """Each by its name."""
        return {"computing": self.compute, **self.exposed, "bubble": self.bubble}


def step_time(a: Architecture, layout: Layout, *, peak: float, utilisation: float, links: Links) -> StepTime:
    """Time of a step of ``layout.micro_batches`` forwards on every replica.

    What is exchanged during a forward or backward is hidden as far as computing lasts; the rest waits. A pipeline's ranks
    are idle for (stages - 1) micro-batches (Narayanan et al. 2021, arXiv:2104.04473, section 2.2).
    """
    m = layout.micro_batches
    compute = seconds_per_step(a, layout, m * layout.micro * layout.length * layout.data, peak, utilisation)
    of_step = list(exchanges(a, layout, links.per_node))
    exposed = exposed_seconds(of_step, compute / m, AGAIN[layout.recompute], links)
    # What happens once a step, at its ends, the other ranks of a pipeline do not wait for in turn.
    of_micro_batches = [e for e in of_step if e.times > 1 or m == 1]
    busy = compute + sum(exposed_seconds(of_micro_batches, compute / m, AGAIN[layout.recompute], links).values())
    return StepTime(compute, exposed, busy * (layout.pipeline - 1) / m)


def exposed_seconds(every: Iterable[Exchange], compute: float, again: float, links: Links) -> dict[str, float]:
    """Seconds of a step's exchanges that computing does not hide, by axis.

    ``compute``: seconds of a micro-batch, of which the forward is a third of what nothing is computed again for.
    """
    forward = compute / (3 * again)
    windows = {"forward": forward, "backward": compute - forward}
    hidden: dict[tuple[str, str, int], float] = defaultdict(float)
    exposed: dict[str, float] = defaultdict(float)
    for exchange in every:
        if exchange.during:
            hidden[exchange.axis, exchange.during, exchange.times] += exchange.seconds(links) / exchange.times
        else:
            exposed[exchange.axis] += exchange.seconds(links)
    for (axis, during, times), seconds in hidden.items():
        exposed[axis] += times * max(0.0, seconds - windows[during])
    return dict(exposed)
