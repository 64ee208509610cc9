"""Everything in the models that exists for speed on CPU alone; the models call it where it is faster and as exact."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from functools import cache, lru_cache
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from trainer.batch import Documents

Causal = Callable[[Tensor, Tensor, Tensor], Tensor]
TILES = range(192, 4097)
"""Lengths at which a backward goes head group by head group: shorter ones are many small products."""
BUCKET = 16
"""Documents are padded to a multiple of this many tokens and attended to together."""
QUERIES, SCORES = 64, 2**19
"""Queries and scores of a piece of `forward_attention`, at most, but for the scores of a single document."""


def embed(tokens: Tensor, table: Tensor, *, tied: bool) -> Tensor:
    """Rows of an embedding table.

    A ``tied`` table's gradient is added to that of the projection, which is dense: a dense one would first fill a whole table
    with zeros.
    """
    return F.embedding(tokens, table, sparse=tied and table.device.type == "cpu")


def has_fast_norm(x: Tensor, weight: Tensor) -> bool:
    """Whether `rms_norm` takes these."""
    return x.device.type == "cpu" and x.dtype is weight.dtype is torch.float32 and weight.ndim == 1


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`norm.RMSNorm` in half the time (768 x 256 with its gradient, one thread: 0.45 against 0.88 ms)."""
    return _RMSNorm.apply(x, weight, eps)  # type: ignore[no-untyped-call,no-any-return]


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        inverse = x.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
        normal = x * inverse
        ctx.save_for_backward(normal, inverse, weight)
        return normal * weight

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, Tensor, None]:
        normal, inverse, weight = ctx.saved_tensors
        products = upstream * normal
        along = (products @ weight).div_(-weight.numel()).unsqueeze(-1)
        grad = torch.addcmul(upstream * weight, normal, along).mul_(inverse)
        return grad, products.flatten(0, -2).sum(0), None


@cache
def has_rearranged_products() -> bool:
    """Whether `rearranged_product` is there, and is `F.linear` bit for bit.

    The operators are private, those of Inductor's frozen graphs: a release without them takes `F.linear`.
    """
    draw = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(shape, generator=draw).bfloat16() for shape in ((5, 2, 96), (48, 96), (48,)))
    try:
        product = rearranged_product(x, rearranged(weight), bias)
    except (AttributeError, RuntimeError):  # NotImplementedError is one, too
        return False
    return torch.equal(product, F.linear(x, weight, bias))


def rearranged(weight: Tensor) -> Tensor:
    """A copy of a bfloat16 weight ``(o, i)`` in the order in which products read it."""
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach(), None)  # type: ignore[no-any-return]


def rearranged_product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear` of a `rearranged` weight, which is else rearranged at every call.

    For 64 rows and less that is a fifth to two fifths of the time; there is no backward.
    """
    bias = None if bias is None else bias.to(weight.dtype)
    return _pointwise()(x.to(weight.dtype), weight, bias, "none", [], "")  # type: ignore[no-any-return]


@cache
def _pointwise() -> Callable[..., Any]:
    """The operator, looked up once: by name takes as long as a small product."""
    return torch.ops.mkldnn._linear_pointwise.default


def has_forward_attention(q: Tensor) -> bool:
    """Whether `forward_attention` takes queries ``(n, H, L, D)``."""
    return q.device.type == "cpu" and q.dtype is torch.bfloat16


def forward_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """`causal_attention` without gradients, at any length: in half to three quarters of PyTorch's fused forward's time.

    Scores are float32, a piece at a time that stays near the caches: some queries, and the keys up to the last of them.
    """
    documents, heads, length, size = q.shape
    groups = k.shape[1]
    out = q.new_empty(documents, length, groups, heads // groups, size)
    step = min(QUERIES, length)
    future = torch.full((step, step), -torch.inf).triu_(1)
    together = max(1, SCORES // (heads * step * length))
    with torch.autocast("cpu", enabled=False):  # whose products would give scores of 8 bits
        for first in range(0, documents, together):
            own = slice(first, first + together)
            queries = (q[own].float() * scale).reshape(-1, heads // groups, length, size)
            keys, values = k[own].float().reshape(-1, length, size), v[own].reshape(-1, length, size)
            for begin in range(0, length, step):
                end = min(begin + step, length)
                asked = queries[:, :, begin:end].reshape(len(keys), -1, size)
                scores = torch.bmm(asked, keys[:, :end].transpose(1, 2)).view(*queries.shape[:2], end - begin, end)
                scores[..., begin:].add_(future[: end - begin, : end - begin])
                weights = scores.softmax(-1).to(v.dtype).flatten(1, 2)
                part = torch.bmm(weights, values[:, :end]).view(-1, *out.shape[2:4], end - begin, size)
                out[own, begin:end] = part.permute(0, 3, 1, 2, 4)
    return out.flatten(2, 3).transpose(1, 2)


# Selective recomputation does not look inside, where it would keep the scores.
_opaque_attention = torch.library.custom_op("onecurve::causal_attention", forward_attention, mutates_args=())


@_opaque_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    return torch.empty_like(q.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)


def has_fast_attention(q: Tensor) -> bool:
    """Whether `causal_attention` takes queries ``(n, H, L, D)``."""
    return has_forward_attention(q) and q.shape[2] in TILES


def causal_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Causal attention of bfloat16 ``(n, H, L, D)``, whose keys and values have a divisor of H heads."""
    return _CausalAttention.apply(q, k, v, scale)  # type: ignore[no-untyped-call,no-any-return]


class _CausalAttention(torch.autograd.Function):
    """`forward_attention`, and a backward of bfloat16 matrix products, twice as fast as PyTorch's own and as exact.

    One head group at a time, so that the scores ``(G, L, L)`` stay near the caches (measured at L = 512: 7.6 against 14 ms).
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        out: Tensor = _opaque_attention(q, k, v, scale)
        ctx.save_for_backward(q, k, v, out)
        ctx.scale = scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Any, ...]:
        q, k, v, out = ctx.saved_tensors
        rows, heads, length, width = q.shape
        group = heads // k.shape[1]
        grad_q, grad_k, grad_v = (torch.empty(t.shape, dtype=t.dtype) for t in (q, k, v))
        future = torch.full((length, length), -torch.inf, dtype=q.dtype).triu_(1)
        dots = (upstream.float() * out.float()).sum(-1, keepdim=True).to(q.dtype)
        scaled = q * ctx.scale
        for row in range(rows):
            for head in range(k.shape[1]):
                own = slice(head * group, (head + 1) * group)
                queries, up = (t[row, own].reshape(-1, width) for t in (scaled, upstream))
                key, value = k[row, head], v[row, head]
                p = (queries @ key.T).view(group, length, length).add_(future).softmax(-1).view(-1, length)
                torch.mm(p.T, up, out=grad_v[row, head])
                # d score = p * (d p - sum of (d out * out)) (Dao et al. 2022, arXiv:2205.14135, appendix B).
                change = (up @ value.T).sub_(dots[row, own].reshape(-1, 1)).mul_(p)
                torch.mm(change, key, out=grad_q[row, own].view(-1, width))
                torch.mm(change.T, queries, out=grad_k[row, head])
        return grad_q.mul_(ctx.scale), grad_k, grad_v, None


def take(x: Tensor, dim: int, places: Tensor) -> Tensor:
    """``x`` at ``places`` of a dimension. On CPU indexing looks for every number by itself, five times as slow."""
    return x.index_select(dim, places) if x.device.type == "cpu" else x[(slice(None),) * dim + (places,)]


# Which documents go together is decided on the host, anew for every micro-batch: no graph of it could be used again.
@torch.compiler.disable  # type: ignore[untyped-decorator]
def attend_by_length(q: Tensor, k: Tensor, v: Tensor, documents: Documents, causal: Causal) -> Tensor:
    """One ``causal`` call ``(n, L, H, D)`` for all documents of about the same length, where no kernel takes ragged ones.

    A document is padded behind its end, where a causal query never looks; so no mask is needed.
    """
    if len(set(documents.lengths)) == 1:
        # Nothing to gather, and nothing to scatter in the backward.
        same_length = (t.reshape(-1, documents.longest, *t.shape[2:]) for t in (q, k, v))
        return causal(*same_length).reshape(q.shape)
    flat = [t.flatten(0, 1) for t in (q, k, v)]
    buckets, back = _buckets(documents.lengths, q.device)
    parts = [causal(*(take(t, 0, places).view(-1, size, *t.shape[1:]) for t in flat)) for size, places in buckets]
    out = torch.cat([part.flatten(0, 1) for part in parts]).to(q.dtype)
    return take(out, 0, back).view(q.shape)


@lru_cache(maxsize=64)
def _buckets(lengths: tuple[int, ...], device: torch.device) -> tuple[list[tuple[int, Tensor]], Tensor]:
    """Documents that are attended to together: their padded length, and the tokens ``(n * padded,)`` that are looked at.

    Also the place ``(T,)`` of every token of the row among those of all buckets, laid end to end.
    """
    groups: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for length, end in zip(lengths, accumulate(lengths), strict=True):
        groups[-(-length // BUCKET) * BUCKET].append((end - length, length))
    buckets, back, before = [], torch.empty(sum(lengths), dtype=torch.int64), 0
    for size, members in sorted(groups.items()):
        starts, counts = torch.tensor(members).T[..., None]
        places, within = starts + torch.arange(size), torch.arange(len(members) * size).view(-1, size)
        real = torch.arange(size) < counts
        back[places[real]] = before + within[real]
        before += within.numel()
        buckets.append((size, places.clamp(max=len(back) - 1).flatten().to(device)))
    return buckets, back.to(device)


def block_weights(q: Tensor, k: Tensor, mask: Tensor, scale: float, cap: float | None = None) -> tuple[Tensor, Tensor]:
    """Attention's weights within each block of a key-value cache, and the logs of their normalisers, both float32.

    Args:
        q: each block's own queries (n, Hkv, G, D)
        k: its keys (n, Hkv, block, D)
        mask: added to the scores of its places (n, block)
        scale: factor of the scores
        cap: bound of the scores; None = none

    Returns:
        Weights ``(n * Hkv, G, block)`` and normalisers ``(n, Hkv * G)``.
    """
    # A product and a softmax: a quarter of the time that the fused kernel takes for so few queries. Keys come first: queries
    # first would be products of a few rows, which take one and a half times as long.
    queries = (q.float() * scale).flatten(0, 1)
    with torch.autocast("cpu", enabled=False):  # whose products would give scores of 8 bits
        products = torch.bmm(k.float().flatten(0, 1), queries.transpose(1, 2))
    if cap is not None:
        products.div_(cap).tanh_().mul_(cap)
    scores = queries.new_empty(*q.shape[:3], k.shape[2])
    torch.add(products.view(*k.shape[:3], -1).transpose(2, 3), mask[:, None, None], out=scores)
    weights = scores.softmax(-1)
    # The largest weight is exp(largest score - normaliser): a second exponential of all scores took twice the time.
    normalisers = scores.amax(-1).sub_(weights.amax(-1).log_())
    return weights.flatten(0, 1), normalisers.flatten(1)
