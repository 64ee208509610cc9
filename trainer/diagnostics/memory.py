"""Memory of a run per rank, from its configuration alone, before anything is started."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

from trainer.diagnostics.activations import activations, backward, loss, table_gradient
from trainer.diagnostics.layout import Layout, Portion, portions
from trainer.models.architecture import Architecture
from trainer.models.nf4 import BITS
from trainer.models.recompute import Recompute
from trainer.parallel.zero import BUCKET, live_parameters
from trainer.tracking.throughput import device_bytes

STATE = 12
"""Bytes of a checkpoint for each trained element: the float32 master and two moments."""
USABLE = 0.8
"""Part of a device's memory that a run is fitted to: the estimate is a tenth off, allocators leave holes, CUDA takes some."""
BASE_CPU = 0.39e9
"""Bytes that a process holds without its model: Python, PyTorch, tokenizers (measured on Linux, torch 2.13).

DeepSpeed adds 0.07e9. Pages of shared libraries count in it, and how many of them are mapped depends on the machine: 0.12e9
more were seen elsewhere.
"""


LIBRARY_CPU = 0.04e9
"""What the import of bitsandbytes adds (0.50, without its files' pages)."""


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank on its device, by what they are for."""

    parameters: float
    gradients: float
    optimizer: float
    activations: float
    loss: float
    temporary: float
    others: float
    base: float

    @property
    def total(self) -> float:
        return float(sum(getattr(self, f.name) for f in dataclasses.fields(self)))

    def lines(self) -> Iterator[str]:
        """A line a part, largest first, and the sum."""
        parts = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        for name, size in sorted(parts.items(), key=lambda item: -item[1]):
            yield f"  {name:<12} {size / 1e9:8.2f} GB"
        yield f"  {'total':<12} {self.total / 1e9:8.2f} GB"


def states(parameters: float, layout: Layout, wide: float = 0.0) -> tuple[float, float, float]:
    """Bytes of parameters, gradients and optimizer state on a rank (docs/algorithms.md#memory).

    bfloat16 working copy: 2 + 2 + 12 bytes a parameter, of which ZeRO divides the last, the last two, or all by the ranks
    (Rajbhandari et al. 2020, arXiv:1910.02054). Float32 working copy: DDP 4 + 4 + 8; under ZeRO DeepSpeed keeps a second
    float32 master, so 4 + 4 + 12. Of the last, 8 are the moments, less where ``layout.moment`` says so; not those of
    the ``wide`` elements: embeddings and heads. FSDP: 4 + 4 and the moments, all of them divided; without resharding a
    working copy besides, and gradients that are whole until they are exchanged.
    """
    working = 2 if layout.low_precision_weights else 4
    pair = 2 * (layout.moment * (parameters - wide) + 4 * wide)
    if layout.float_rows:
        share = 0.0 if layout.offload != "none" and layout.cuda else 1 / layout.shards
        if layout.reshard:
            return 4 * parameters * share, 4 * parameters * share, pair * share
        return 4 * parameters * share + working * parameters, 4 * parameters, pair * share
    optimizer = (4 if layout.stage or layout.low_precision_weights else 0) * parameters + pair
    over = [layout.shards if layout.stage >= stage else 1 for stage in (3, 2, 1)]
    weights, gradients, moments = (
        size / n for size, n in zip((working * parameters, working * parameters, optimizer), over, strict=True)
    )
    if layout.offload != "none" and layout.cuda:
        moments = 0.0
    if layout.offload == "parameters" and layout.cuda:
        weights = 0.0
    return weights, gradients, moments


def host_memory(a: Architecture, layout: Layout) -> float:
    """Bytes of CPU memory that ``strategy.offload`` moves a rank's states to; what a library copies besides is not in it."""
    if not layout.cuda or layout.offload == "none":
        return 0.0
    further = (portion for shape, learns in layout.auxiliary if learns for portion in portions(shape, layout))
    trained = [(portion.elements, portion.tables) for portion in further]
    largest = max(portions(a, layout), key=lambda portion: portion.elements)
    trained += [(learnt_elements(a, layout, largest), 0 if layout.adapters else largest.tables)]
    here, there = (
        sum(sum(states(count, dataclasses.replace(layout, offload=offload), wide)) for count, wide in trained)
        for offload in (layout.offload, "none")
    )
    return there - here


def frozen(portion: Portion, layout: Layout, packed: float = 0) -> float:
    """Bytes of a rank's share of a model that is not trained: linear layers in the compute format, where they can be.

    ``packed``: elements of them that are held in NF4; beside those the tables are in the compute format, too.
    """
    count, tables = portion.elements - packed, portion.tables
    if layout.low_precision_weights or (layout.stage == 3 and not layout.float_rows):
        others = (2 if layout.low_precision_weights else 4) * count
    else:
        others = (layout.compute if packed else 4) * tables + layout.compute * (count - tables)
    return (packed * BITS / 8 + others) / (layout.shards if layout.stage == 3 else 1)


def learnt_elements(a: Architecture, layout: Layout, portion: Portion) -> float:
    """Trained elements of a portion. Of an adapter a rank has one of its two matrices, of the other its block."""
    if not layout.adapters:
        return portion.elements
    return layout.adapters * (1 + 1 / layout.tensor) / 2 * portion.layers / a.num_hidden_layers


def memory(a: Architecture, layout: Layout) -> Memory:
    """The peak of a rank, in the middle of a step; of a pipeline's ranks the one that needs most.

    On CPU within a tenth of what was measured in use for DDP, FSDP, ZeRO-1 and ZeRO-2 (tests/distributed/test_memory.py).
    What a C library's allocator keeps for later comes on top of it (glibc: up to a quarter), and ZeRO-3 takes up to a third
    more.
    """
    return max((_memory(a, layout, portion) for portion in portions(a, layout)), key=lambda need: need.total)


def _memory(a: Architecture, layout: Layout, portion: Portion) -> Memory:
    count, learnt = portion.elements, learnt_elements(a, layout, portion)
    part = portion.layers / a.num_hidden_layers
    packed, largest = layout.packed[0] * part / layout.tensor, layout.packed[1] / layout.tensor
    weights, gradients, moments = states(learnt, layout, 0 if layout.adapters else portion.tables)
    weights += frozen(portion, layout, packed) if layout.adapters else 0.0
    stored = activations(a, layout) * part * (layout.in_flight if portion.first else 1)
    head = loss(a, layout) if portion.last else 0.0
    if layout.float_rows:
        temporary = max(_sharded(a, layout, portion, stored, head)) - head
    else:
        temporary = (
            max(_undivided(a, layout, portion, stored, head)) - head + _exchanged(layout, portion, learnt, packed)
        )
    if layout.stage and not layout.float_rows:
        # The copy of its share that the optimizer steps with comes later, when the activations are gone.
        temporary += max(0.0, 4 * learnt / layout.shards - stored - head)
    # A packed matrix and the product's own copy of it, in a forward or backward.
    temporary += layout.compute * largest
    others = LIBRARY_CPU if packed and not layout.cuda else 0.0
    for shape, trained in layout.auxiliary:
        [further] = portions(shape, dataclasses.replace(layout, pipeline=1))
        if trained:
            # A critic passes the same tokens, so it keeps as much of each weight's work as the policy does.
            others += sum(states(further.elements, layout, further.tables)) + stored * further.elements / count
        else:
            # A frozen model of the policy's shape is its reference, packed alike.
            others += frozen(further, layout, packed if shape == a else 0)
    base = 0.0 if layout.cuda else BASE_CPU
    return Memory(weights, gradients, moments, stored, head, temporary, others, base)


def _undivided(a: Architecture, layout: Layout, portion: Portion, stored: float, head: float) -> Iterator[float]:
    """Bytes beside a rank's states and what forwards have ``stored`` under DDP and ZeRO, at each of the peaks."""
    learnt, projected, embedded = learnt_elements(a, layout, portion), *_table_gradients(a, layout, portion)
    # The buckets that gradients are exchanged in; on CUDA all of their memory, and at stages 1 and 2 one fills meanwhile.
    size = BUCKET * (1 + (layout.stage < 3)) if layout.cuda else min(learnt, BUCKET)
    bucket = layout.working * size if layout.stage else 0.0
    # The gradient of a tied table waits for that of its other use.
    waits = projected if a.tie_word_embeddings else 0.0
    # At stage 2 buckets last as long as a backward, behind which a micro-batch's share is laid out and added.
    shares = 8 * learnt / layout.shards if layout.stage == 2 else 0.0
    yield head + (0.0 if layout.stage == 2 and layout.cuda else bucket)
    yield bucket + waits + backward(a, layout)
    yield bucket + waits + max(embedded, shares) - stored


def _sharded(a: Architecture, layout: Layout, portion: Portion, stored: float, head: float) -> Iterator[float]:
    """The same under FSDP, with the weights that are gathered: those around the blocks from the first forward to the end."""
    learnt, working = learnt_elements(a, layout, portion), layout.working
    projected, embedded = _table_gradients(a, layout, portion)
    block, tables = portion.block(layout), working * portion.tables * layout.reshard
    # Autocast's casts are part of what the backward reads, of every block that it does not compute again.
    casts = 2.0 * (layout.compute == 2 and not layout.low_precision_weights)
    graph = casts * (learnt - (0 if layout.adapters else portion.tables)) * (layout.recompute is not Recompute.full)
    yield head + tables + graph
    # A block, and the next one in the buffer that it arrives in.
    gathered = tables + 2 * working * block * layout.reshard + (graph or casts * block)
    trained = learnt / portion.elements
    waiting = projected * layout.reshard
    freed = activations(a, layout) / a.num_hidden_layers
    yield (
        gathered
        + waiting
        + max(backward(a, layout), _exchanging(layout, portion, trained, backward(a, layout)) - freed)
    )
    if layout.reshard and not layout.adapters:
        waits = projected if a.tie_word_embeddings else 0.0
        yield tables + projected + waits + embedded - stored
        # Gathered tables are free when their gradients are laid out in float32, exchanged, and cut; one rank divides a copy.
        rows = 1 / layout.shards + (layout.shards == 1)
        yield 4 * portion.tables * (1 + rows) + max(projected, embedded) - stored


def _table_gradients(a: Architecture, layout: Layout, portion: Portion) -> tuple[float, float]:
    """Bytes of the gradients of projection and embedding, where a stage has them."""
    size = table_gradient(a, layout)
    sparse = a.tie_word_embeddings and not layout.cuda and layout.pipeline == 1
    return size * portion.last, size * portion.first * (not sparse)


def _exchanged(layout: Layout, portion: Portion, learnt: float, packed: float) -> float:
    """Bytes that DDP and ZeRO need all the time beside a rank's states: casts, gathered weights, wider gradients."""
    count, block, table = portion.elements, portion.block(layout), portion.tables
    needed = 0.0
    if layout.compute == 2 and not layout.low_precision_weights:
        # Autocast keeps a cast of every trained matrix for the length of a step; under ZeRO-3 of the block that it is in.
        # Casts of frozen float32 weights live in the graph. Of the tables none reads a cast that lasts.
        matrices = learnt - (0 if layout.adapters else table)
        needed += 2.0 * (matrices if layout.stage < 3 else count - packed if layout.adapters else block)
    if layout.stage >= 2 and layout.low_precision_weights:
        needed += 2 * learnt / layout.shards  # gradients add up in float32
    if layout.stage == 3:
        live = max(live_parameters(layout.cuda), 2 * block + table)
        needed += layout.working * min(count - packed, live) + min(packed / 2, live)
    return needed


def _exchanging(layout: Layout, portion: Portion, part: float, needed: float) -> float:
    """Bytes that a block's backward takes under FSDP when that of the block behind it has freed what it had read.

    The gradient of its trained ``part``, or all else that is ``needed``; and the buffer in which gradients of the block
    behind it add up: it is there until the next one goes out.
    """
    trained = part * portion.block(layout)
    return max(needed, trained * layout.working) + 4 * trained * layout.reshard


def fit(a: Architecture, layout: Layout, limit: float | None) -> Layout:
    """With the least that the backward must compute again for ``limit`` bytes a rank, all of it where nothing fits.

    ``limit``: None = the memory of this machine's device.
    """
    usable = USABLE * (device_bytes(layout.ranks) if limit is None else limit)
    for recompute in Recompute:
        fitting = dataclasses.replace(layout, recompute=recompute)
        if memory(a, fitting).total <= usable:
            break
    return fitting


def print_estimate(summary: str, a: Architecture, layout: Layout) -> dict[str, float]:
    """Print what a rank of a run would hold; gives the sum as ``memory_gb``."""
    need = memory(a, layout)
    more = "'onecurve estimate' does the same for other devices and ranks, with time and advice"
    print("\n".join([f"{summary}; memory of a rank:", *need.lines(), more]))
    return {"memory_gb": need.total / 1e9}
