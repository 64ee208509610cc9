"""What a step exchanges along each axis of the mesh. Formulas and their sources: docs/traffic.md.

Bytes are exact (tests/distributed/test_scaling.py counts them).
"""

from __future__ import annotations

from collections.abc import Iterator

from trainer.diagnostics.activations import routed_width
from trainer.diagnostics.layout import Layout, Portion, portions
from trainer.diagnostics.links import Exchange, Group
from trainer.diagnostics.memory import learnt_elements
from trainer.models.architecture import Architecture
from trainer.models.recompute import Recompute
from trainer.parallel.zero import BUCKET, live_parameters

DDP_BUCKET = 25 * 2**20
"""Bytes of a gradient bucket of DDP."""


def groups(layout: Layout, per_node: int) -> dict[str, Group]:
    """Who exchanges along each axis.

    Ranks are numbered data x pipeline x sequence x tensor, tensor innermost, and nodes take them in turn.
    """

    def near(size: int, inside: int) -> int:
        return min(size, max(1, per_node // inside))

    tensor, sequence, pipeline = layout.tensor, layout.sequence, layout.pipeline
    shards = min(layout.shards, near(sequence, tensor) * near(layout.data, tensor * sequence * pipeline))
    own = layout.shards // layout.expert
    return {
        "tensor": Group(tensor, near(tensor, 1)),
        "sequence": Group(sequence, near(sequence, tensor)),
        "pipeline": Group(pipeline, near(pipeline, tensor * sequence)),
        "data": Group(layout.shards, shards),
        "expert": Group(layout.expert, min(layout.expert, shards)),
        "expert data": Group(own, min(own, max(1, shards // layout.expert))),
    }


def exchanges(a: Architecture, layout: Layout, per_node: int) -> Iterator[Exchange]:
    """What a step of ``layout.micro_batches`` exchanges, of a pipeline's ranks the one that has most weights."""
    portion, who = max(portions(a, layout), key=lambda p: p.elements), groups(layout, per_node)
    learnt = learnt_elements(a, layout, portion)
    every = (
        *weight_exchanges(portion, learnt, layout, who),
        *_tensor(a, layout, portion, who["tensor"]),
        *_sequence(a, layout, portion, who["sequence"]),
        *_expert(a, layout, portion, who["expert"]),
        *_pipeline(a, layout, portion, who["pipeline"]),
    )
    yield from (exchange for exchange in every if exchange.group.size > 1)


def weight_exchanges(portion: Portion, learnt: float, layout: Layout, who: dict[str, Group]) -> Iterator[Exchange]:
    """Gradients and weights; ``learnt``: trained elements of the portion.

    As DeepSpeed 0.19 does it: ZeRO-2 reduces whole buckets on all ranks, and both stages 2 and 3 do so for every micro-batch,
    while nothing is computed (``overlap_comm`` is off by default). DDP reduces gradients during the backward.
    """
    if layout.float_rows:
        yield from _row_exchanges(portion, learnt, layout, who)
        return
    gradient, working = (2 if layout.low_precision_weights else 4), (2 if layout.low_precision_weights else 4)
    buckets, m, everyone = max(1, round(learnt / BUCKET)), layout.micro_batches, who["data"]
    if layout.stage == 0:
        pieces = max(1, round(4 * learnt / DDP_BUCKET))
        yield Exchange("data", "all_reduce", "gradients", 4 * learnt, 1, pieces, everyone, "backward")
        return
    if layout.stage < 3:
        times = m if layout.stage == 2 else 1
        yield Exchange("data", "all_reduce", "gradients", gradient * learnt, times, buckets, everyone)
        yield Exchange("data", "all_gather", "updated weights", working * learnt, 1, buckets, everyone)
        return
    yield Exchange("data", "reduce_scatter", "gradients", gradient * learnt, m, buckets, everyone)
    once = portion.elements <= live_parameters(layout.cuda)
    for during in ("forward",) if once else ("forward", "backward"):
        size, pieces = working * portion.elements, portion.layers + 2
        yield Exchange("data", "all_gather", "weights", size, 1 if once else m, pieces, everyone, during)


def _row_exchanges(portion: Portion, learnt: float, layout: Layout, who: dict[str, Group]) -> Iterator[Exchange]:
    """Of FSDP: blocks are gathered in the forward and, where they are given back, in the backward; what is around them once.

    Gradients add up in float32. Experts' weights meet on the ranks that have the same ones.
    """
    working, times = (2 if layout.low_precision_weights else 4), (layout.micro_batches if layout.reshard else 1)
    parts = [("weights", portion.dense, who["data"], portion.layers), ("tables", portion.tables, who["data"], 1)]
    if portion.experts:
        parts.append(("experts", portion.experts / layout.expert, who["expert data"], portion.layers))
    for what, elements, group, pieces in parts:
        size = working * elements
        yield Exchange("data", "all_gather", what, size, times, pieces, group, "forward")
        if layout.reshard and what != "tables":
            yield Exchange("data", "all_gather", what, size, times, pieces, group, "backward")
        trained = 4 * elements * learnt / portion.elements
        yield Exchange("data", "reduce_scatter", f"gradients of {what}", trained, times, pieces, group, "backward")


def _tensor(a: Architecture, layout: Layout, portion: Portion, group: Group) -> Iterator[Exchange]:
    """All-reduces of the residual stream's width: two a block in the forward, two in the backward (Shoeybi et al. 2019,
    arXiv:1909.08053, figure 4), and attention's once more where the block is computed again."""
    m, again = layout.micro_batches, layout.recompute is not Recompute.none
    states = layout.tokens * a.hidden_size * layout.compute
    yield Exchange("tensor", "all_reduce", "states", states, m * portion.layers * (4 + again), 1, group)
    embedded = layout.tokens * a.hidden_size * layout.stream
    yield Exchange("tensor", "all_reduce", "embeddings", embedded, m, 1, group)
    yield Exchange("tensor", "all_reduce", "the loss's gradient", states * layout.sequence, m, 1, group)


def _sequence(a: Architecture, layout: Layout, portion: Portion, group: Group) -> Iterator[Exchange]:
    """All-to-alls of queries, keys, values and attention's output (Jacobs et al. 2023, arXiv:2309.14509), forward, backward,
    and once more where a block is computed again; hidden states joined in front of the head."""
    m, again = layout.micro_batches, layout.recompute is not Recompute.none
    width = 2 * layout.query_width(a) + 2 * layout.key_width(a)
    swapped = layout.tokens * width * layout.compute
    yield Exchange("sequence", "all_to_all", "heads for tokens", swapped, m * portion.layers * (2 + again), 2, group)
    joined = layout.micro * layout.length * a.hidden_size * layout.compute
    yield Exchange("sequence", "all_gather", "hidden states", joined, m, 1, group)
    yield Exchange("sequence", "reduce_scatter", "their gradient", joined, m, 1, group)


def _expert(a: Architecture, layout: Layout, portion: Portion, group: Group) -> Iterator[Exchange]:
    """All-to-alls of routed tokens: there and back, in forward and backward, and again where a block is computed again."""
    sparse = sum(layer.sparse for layer in a.layers)
    if not sparse:
        return
    again = layout.recompute is not Recompute.none
    size = layout.tokens * routed_width(a) * len(a.layers) / sparse * layout.compute
    layers = round(portion.layers * sparse / len(a.layers))
    yield Exchange("expert", "all_to_all", "tokens", size, layout.micro_batches * layers * (4 + 2 * again), 1, group)


def _pipeline(a: Architecture, layout: Layout, portion: Portion, group: Group) -> Iterator[Exchange]:
    """States to the next stage and gradients to the one before, of which the ends send one; once a step the gradient of a
    tied table, from either end to the other."""
    states, ways = layout.tokens * a.hidden_size * layout.stream, min(2, layout.pipeline - 1)
    yield Exchange("pipeline", "send", "states and gradients", states, ways * layout.micro_batches, 1, group)
    if a.tie_word_embeddings:
        ends = Group(min(2, group.size), 1 if group.nodes > 1 else min(2, group.size))
        table = 4 * portion.tables / layout.shards
        yield Exchange("pipeline", "send", "gradient of the tied table", table, 1, 1, ends)
