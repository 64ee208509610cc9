"""Memory and time of a run per rank, from its configuration alone, before anything is started."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

from trainer.models.architecture import Architecture
from trainer.models.delta import CHUNK
from trainer.models.nf4 import BITS
from trainer.models.recompute import Recompute
from trainer.models.sizes import parameters_of
from trainer.parallel.zero import BUCKET, live_parameters
from trainer.tracking.throughput import device_bytes, training_flops

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
class Layout:
    """How a model is spread and computed.

    Args:
        stage: What is sharded: 0 (DDP: nothing) to 3 (parameters too).
        ranks: Data-parallel ranks.
        low_precision_weights: The working copy of the weights is bfloat16 instead of float32 under autocast.
        compute: Bytes of an activation, 2 or 4.
        stream: Bytes of an element of the residual stream, 2 or 4.
        micro: Rows of a forward.
        length: Tokens of a row.
        recompute: Activations that the backward computes again.
        offload: What lives in CPU memory: none, optimizer or parameters.
        cuda: Whether the ranks compute on GPUs.
        adapters: Elements that are trained beside a frozen model; 0 = the model itself is trained.
        packed: Elements of that model that are held in NF4, and of the largest matrix of them.
        float_rows: The sharded weights are float32 rows, which the optimizer steps and gathered weights are cast from.
        reshard: Gathered weights and gradients are given back block by block, with every micro-batch.
        auxiliary: Shapes of further models (a reference, a critic, a reward model), and whether each is trained.
        moment: Bytes of a moment of an element of hidden matrices and adapters; 4 of every other one.
    """

    stage: int
    ranks: int
    low_precision_weights: bool
    compute: int
    micro: int
    length: int
    recompute: Recompute = Recompute.none
    offload: str = "none"
    cuda: bool = True
    stream: int = 4
    adapters: int = 0
    packed: tuple[int, int] = (0, 0)
    float_rows: bool = False
    reshard: bool = True
    auxiliary: tuple[tuple[Architecture, bool], ...] = ()
    moment: float = 4.0


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
    working copy and its gradients besides.
    """
    working = 2 if layout.low_precision_weights else 4
    pair = 2 * (layout.moment * (parameters - wide) + 4 * wide)
    if layout.float_rows:
        share = 0.0 if layout.offload != "none" and layout.cuda else 1 / layout.ranks
        copy = 0.0 if layout.reshard else parameters
        return 4 * parameters * share + working * copy, 4 * parameters * share + 4 * copy, pair * share
    optimizer = (4 if layout.stage or layout.low_precision_weights else 0) * parameters + pair
    over = [layout.ranks if layout.stage >= stage else 1 for stage in (3, 2, 1)]
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
    trained = [
        (layout.adapters, 0) if layout.adapters else (parameters_of(a), vocabulary_tables(a)),
        *((parameters_of(shape), vocabulary_tables(shape)) for shape, learns in layout.auxiliary if learns),
    ]
    here, there = (
        sum(sum(states(count, dataclasses.replace(layout, offload=offload), wide)) for count, wide in trained)
        for offload in (layout.offload, "none")
    )
    return there - here


def frozen(a: Architecture, layout: Layout, packed: int = 0) -> float:
    """Bytes of a rank's share of a model that is not trained: linear layers in the compute format, where they can be.

    ``packed``: elements of them that are held in NF4; beside those the tables are in the compute format, too.
    """
    count, tables = parameters_of(a) - packed, vocabulary_tables(a)
    if layout.low_precision_weights or (layout.stage == 3 and not layout.float_rows):
        others = (2 if layout.low_precision_weights else 4) * count
    else:
        others = (layout.compute if packed else 4) * tables + layout.compute * (count - tables)
    return (packed * BITS / 8 + others) / (layout.ranks if layout.stage == 3 else 1)


def vocabulary_tables(a: Architecture) -> int:
    """Elements of the embeddings of tokens, tied ones once."""
    return a.vocab_size * a.hidden_size * (1 if a.tie_word_embeddings or a.scores else 2)


def activations(a: Architecture, layout: Layout) -> float:
    """Bytes that the forward of a micro-batch keeps for the backward."""
    each = sum(_stored(a, layout, layer.delta) for layer in a.layers) + _norm(layout) * a.hidden_size
    return float(layout.micro * layout.length * each)


def backward(a: Architecture, layout: Layout) -> float:
    """Bytes that the backward of one block needs: what is computed again, and the gradients of its widest tensors."""
    again = max(_block(a, layout, layer.delta) - _stored(a, layout, layer.delta) for layer in a.layers)
    gradients = 2 * layout.stream * a.hidden_size + layout.compute * (2 * mlp_width(a) + routed_width(a))
    return float(layout.micro * layout.length * (again + gradients))


def mlp_width(a: Architecture) -> float:
    """Width of what a token passes through behind attention: of an MLP, or of its experts together; the mean over layers."""
    sparse = sum(layer.sparse for layer in a.layers) / len(a.layers)
    return (1 - sparse) * a.intermediate_size + sparse * (a.experts_per_token * a.expert_size + a.shared_size)


def routed_width(a: Architecture) -> float:
    """Width of the copies of a token that go to its experts together; the mean over layers."""
    return sum(layer.sparse for layer in a.layers) / len(a.layers) * a.experts_per_token * a.hidden_size


def _stored(a: Architecture, layout: Layout, delta: bool) -> float:
    """Bytes that a block keeps of a token from its forward to its backward; ``delta``: a block of a gated delta rule."""
    inputs = layout.stream * a.hidden_size
    products = layout.compute * (2 * a.hidden_size + 2 * mlp_width(a) + routed_width(a)) + _mixer(a, layout, delta)[1]
    stored = {Recompute.none: _block(a, layout, delta), Recompute.selective: inputs + products, Recompute.full: inputs}
    return stored[layout.recompute]


def _block(a: Architecture, layout: Layout, delta: bool) -> float:
    """Bytes of a token that a block's backward reads.

    What its norms keep; in the compute format their outputs, and four tensors of the MLP's width (two without a gate); what
    goes to experts and comes back; and what its mixer keeps.
    """
    norms = 4 if a.norm_before and a.norm_after else 2
    inner = (4 if a.gated else 2) * mlp_width(a) + 2 * routed_width(a)
    own = norms * _norm(layout) * a.hidden_size + layout.compute * (norms * a.hidden_size + inner)
    return own + _mixer(a, layout, delta)[0]


def _mixer(a: Architecture, layout: Layout, delta: bool) -> tuple[float, float]:
    """Bytes of a token that a mixer's backward reads, and those of its products.

    Of attention: queries, keys, values and its output; queries and keys before their own norms. Of a gated delta rule: in the
    compute format what goes into its convolution and comes out of its norm; in float32 the convolution before and behind its
    activation, seven matrices of a chunk, the solution of its system, nine tensors of the keys' width, seven of the values',
    and a memory a chunk (counted in what autograd saves).
    """
    heads, groups, normed = a.num_attention_heads * a.head_dim, a.num_key_value_heads * a.head_dim, bool(a.qk_norm)
    if not delta:
        return layout.compute * (2 + normed) * (heads + groups), layout.compute * 2 * (heads + groups)
    keys, values = (a.delta_value_heads * size for size in (a.delta_key_size, a.delta_value_size))
    channels, chunk = 2 * a.delta_key_heads * a.delta_key_size + values, a.delta_value_heads * CHUNK
    memory = keys * a.delta_value_size / CHUNK
    narrow, wide = channels + values, 2 * channels + 7 * chunk + 10 * keys + 8 * values + memory
    return layout.compute * narrow + 4 * wide, layout.compute * narrow + 4 * (2 * chunk + 3 * values + memory)


def _norm(layout: Layout) -> int:
    """Bytes that a norm keeps of an element of the residual stream: that element, and on CPU the float32 normalised one."""
    return layout.stream + (0 if layout.cuda else 4)


def loss(a: Architecture, layout: Layout) -> float:
    """Bytes of the vocabulary projection and its cross-entropy: blocks of logits, one group's gradient, both gradients."""
    from trainer.functional.chunks import BLOCK_BYTES, GROUP_BYTES

    tokens = layout.micro * layout.length
    if a.scores:
        return 0.0
    device = "cuda" if layout.cuda else "cpu"
    block = min(BLOCK_BYTES[device], 4 * tokens * a.vocab_size)
    group = min(max(GROUP_BYTES[device], block), layout.compute * tokens * a.vocab_size)
    cast = layout.compute == 2 and not (layout.packed[0] and layout.stage < 3)  # else it is held so
    table = a.vocab_size * a.hidden_size * (2 * cast + 4 * (layout.adapters == 0))
    return float(1.5 * block + group + table + 4 * tokens * a.hidden_size)


def memory(a: Architecture, layout: Layout) -> Memory:
    """The peak of a rank, in the middle of a step.

    On CPU within a tenth of what was measured in use for DDP, ZeRO-1 and ZeRO-2 (tests/distributed/test_memory.py). What a C
    library's allocator keeps for later comes on top of it (glibc: up to a quarter), and ZeRO-3 takes up to a third more.
    """
    count = parameters_of(a)
    learnt = layout.adapters or count
    packed, largest = layout.packed
    weights, gradients, moments = states(learnt, layout, 0 if layout.adapters else vocabulary_tables(a))
    weights += frozen(a, layout, packed) if layout.adapters else 0.0
    block = (count - a.vocab_size * a.hidden_size) / a.num_hidden_layers
    stored, head = activations(a, layout), loss(a, layout)
    # The loss is gone when the blocks' backward begins.
    temporary = max(0.0, backward(a, layout) - head)
    if layout.float_rows:
        temporary += _gathered(a, layout, learnt, block)
    elif layout.compute == 2 and not layout.low_precision_weights:
        # Autocast keeps a cast of every trained weight for the length of a step; under ZeRO-3 of the block that it is in.
        # Casts of frozen float32 weights live in the graph.
        temporary += 2.0 * (learnt if layout.stage < 3 else count - packed if layout.adapters else block)
    if layout.stage and not layout.float_rows:
        # The bucket that gradients are exchanged in; on CUDA another one fills meanwhile. The copy of its share that the
        # optimizer steps with comes later, when the activations are gone.
        temporary += (1 + layout.cuda) * 4 * min(learnt, BUCKET) + max(0.0, 4 * learnt / layout.ranks - stored - head)
    if layout.stage == 3 and not layout.float_rows:
        live = max(live_parameters(layout.cuda), 2 * block + a.vocab_size * a.hidden_size)
        temporary += (2 if layout.low_precision_weights else 4) * min(count - packed, live) + min(packed / 2, live)
    # A packed matrix and the product's own copy of it, in a forward or backward.
    temporary += layout.compute * largest
    others = LIBRARY_CPU if packed and not layout.cuda else 0.0
    for shape, trained in layout.auxiliary:
        if trained:
            # A critic passes the same tokens, so it keeps as much of each weight's work as the policy does.
            others += (
                sum(states(parameters_of(shape), layout, vocabulary_tables(shape)))
                + stored * parameters_of(shape) / count
            )
        else:
            # A frozen model of the policy's shape is its reference, packed alike.
            others += frozen(shape, layout, packed if shape == a else 0)
    base = 0.0 if layout.cuda else BASE_CPU
    return Memory(weights, gradients, moments, stored, head, temporary, others, base)


def _gathered(a: Architecture, layout: Layout, learnt: float, block: float) -> float:
    """Bytes that FSDP needs beside a rank's rows: what is gathered, and the gradients that are exchanged.

    All that is around the blocks is gathered through a step, with its gradient; of the blocks one and the next, in the buffer
    that they arrive in and in tensors of their own; and the gradient of one, as it is computed and as it adds up.
    """
    working, around = (2 if layout.low_precision_weights else 4), a.vocab_size * a.hidden_size
    arriving = block * working * (1 if not layout.reshard else 3) + (around * working if layout.reshard else 0)
    part = learnt / parameters_of(a)
    sums = 0.0 if not layout.reshard else part * (working + 4) * block
    # Autocast's casts are part of what the backward reads, of every block that it does not compute again.
    casts = layout.compute == 2 and not layout.low_precision_weights
    return arriving + sums + (2 * (block if layout.recompute is Recompute.full else learnt) if casts else 0)


def seconds_per_step(a: Architecture, layout: Layout, tokens: float, peak: float, utilisation: float) -> float:
    """Time of a step of ``tokens`` tokens over all ranks, at the part ``utilisation`` of ``peak`` operations a second."""
    flops = training_flops(a, tokens, tokens * (layout.length + 1) / 2)
    again = {Recompute.none: 1.0, Recompute.selective: 1.05, Recompute.full: 4 / 3}[layout.recompute]
    return flops * again / (layout.ranks * peak * utilisation)


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
