"""What a forward keeps for its backward, and what the loss needs: bytes of a rank by the shape of its model."""

from __future__ import annotations

from collections import Counter

from trainer.diagnostics.layout import Layout
from trainer.functional.chunks import BLOCK_BYTES, GROUP_BYTES
from trainer.models.architecture import Architecture
from trainer.models.delta import CHUNK
from trainer.models.recompute import Recompute


def activations(a: Architecture, layout: Layout) -> float:
    """Bytes that the forward of a micro-batch keeps for the backward, on ranks that compute all layers."""
    kinds = Counter(layer.delta for layer in a.layers)
    each = sum(count * _stored(a, layout, delta) for delta, count in kinds.items()) + _norm(layout) * a.hidden_size
    return float(layout.tokens * each)


def backward(a: Architecture, layout: Layout) -> float:
    """Bytes that the backward of one block needs: what is computed again, and the gradients of its widest tensors."""
    kinds = {layer.delta for layer in a.layers}
    again = max(_block(a, layout, delta) - _stored(a, layout, delta) for delta in kinds)
    widest = 2 * mlp_width(a) / layout.tensor + routed_width(a)
    return float(layout.tokens * (again + 2 * layout.stream * a.hidden_size + layout.compute * widest))


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
    products = layout.compute * (2 * a.hidden_size + 2 * mlp_width(a) / layout.tensor + routed_width(a))
    products += _mixer(a, layout, delta)[1]
    stored = {Recompute.none: _block(a, layout, delta), Recompute.selective: inputs + products, Recompute.full: inputs}
    return stored[layout.recompute]


def _block(a: Architecture, layout: Layout, delta: bool) -> float:
    """Bytes of a token that a block's backward reads.

    What its norms keep; in the compute format their outputs, and four tensors of the MLP's width (two without a gate); what
    goes to experts and comes back; and what its mixer keeps. Ranks that divide matrices have the norms alike.
    """
    norms = 4 if a.norm_before and a.norm_after else 2
    inner = (4 if a.gated else 2) * mlp_width(a) / layout.tensor + 2 * routed_width(a)
    own = norms * _norm(layout) * a.hidden_size + layout.compute * (norms * a.hidden_size + inner)
    return own + _mixer(a, layout, delta)[0]


def _mixer(a: Architecture, layout: Layout, delta: bool) -> tuple[float, float]:
    """Bytes of a token that a mixer's backward reads, and those of its products.

    Of attention: queries, keys, values and its output (once more as the output projection reads it, where ranks exchange
    heads for tokens); queries and keys before their own norms. Of a gated delta rule: in the
    compute format what goes into its convolution and comes out of its norm; in float32 the convolution before and behind its
    activation, seven matrices of a chunk, the solution of its system, nine tensors of the keys' width, seven of the values',
    and a memory a chunk (counted in what autograd saves).
    """
    heads, groups, normed = layout.query_width(a), layout.key_width(a), bool(a.qk_norm)
    if not delta:
        again = layout.compute * heads * (layout.sequence > 1)
        return layout.compute * (2 + normed) * (heads + groups) + again, layout.compute * 2 * (heads + groups) + again
    keys, values = (a.delta_value_heads * size / layout.tensor for size in (a.delta_key_size, a.delta_value_size))
    channels = 2 * a.delta_key_heads * a.delta_key_size / layout.tensor + values
    chunk, memory = a.delta_value_heads * CHUNK / layout.tensor, keys * a.delta_value_size / CHUNK
    narrow, wide = channels + values, 2 * channels + 7 * chunk + 10 * keys + 8 * values + memory
    return layout.compute * narrow + 4 * wide, layout.compute * narrow + 4 * (2 * chunk + 3 * values + memory)


def _norm(layout: Layout) -> int:
    """Bytes that a norm keeps of an element of the residual stream: that element, and on CPU the float32 normalised one."""
    return layout.stream + (0 if layout.cuda else 4)


def loss(a: Architecture, layout: Layout) -> float:
    """Bytes of the vocabulary projection's cross-entropy, which makes the gradients of hidden states and weights on the way.

    The most of: logits of a block in float32 (on CUDA in bfloat16 those and their softmax, as PyTorch casts before it; on CPU
    the ones that are cast besides) beside the gradient of a group; that gradient beside its product with the states; and the
    weight's gradient with its cast. Ranks that divide tokens or matrices all read the hidden states of whole rows, each off
    its part of the vocabulary.
    """
    if a.scores:
        return 0.0
    tokens, device, narrow = layout.micro * layout.length, "cuda" if layout.cuda else "cpu", layout.logit == 2
    part = a.vocab_size / (layout.sequence * layout.tensor)
    block = min(BLOCK_BYTES[device], 4 * tokens * part)
    all_groups = layout.logit * tokens * part
    group = min(max(GROUP_BYTES[device], BLOCK_BYTES[device]), all_groups)
    several, learnt, weight = all_groups > group, layout.adapters == 0, part * a.hidden_size
    cast = layout.logit * weight * (layout.logit != layout.table)
    states = (layout.compute if layout.cuda else 4) * tokens * a.hidden_size
    wide = block * ((2 if layout.cuda else 1.5) if narrow else 1)
    logits = wide + group + cast + 4 * weight * (learnt and several)
    product = group + cast + learnt * (4 * weight + layout.logit * weight * (narrow or several))
    # Of a part of a table first its own gradient, then one of the table's shape.
    of_table = layout.table * a.vocab_size * a.hidden_size / layout.tensor * (layout.sequence > 1)
    gradient = learnt * ((4 + layout.table * (layout.table != 4)) * weight + of_table) + states
    joined = layout.compute * tokens * a.hidden_size * (layout.sequence > 1)
    return float(max(logits, product, gradient) + states + joined)


def table_gradient(a: Architecture, layout: Layout) -> float:
    """Bytes of the gradient of a trained vocabulary projection, as the backward of the blocks finds it."""
    return 0.0 if a.scores or layout.adapters else layout.table * a.vocab_size * a.hidden_size / layout.tensor
