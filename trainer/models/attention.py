"""Causal attention inside packed documents, without a mask over the row."""

from __future__ import annotations

from collections import defaultdict
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from trainer.batch import Branches, Documents

TILES = range(192, 4097)
"""Lengths at which a backward on CPU goes head group by head group: shorter ones are many small products."""
BUCKET = 16
"""Documents are padded to a multiple of this many tokens and attended to together (CPU)."""


def attend(
    q: Tensor, k: Tensor, v: Tensor, documents: Documents | Branches, *, window: int | None, scale: float
) -> Tensor:
    """Causal attention inside each document, or inside each of the sequences that share tokens of a row.

    ``q`` ``(B, T, H, D)``; ``k``, ``v`` ``(B, T, Hkv, D)``, where query heads share key heads in groups. ``window``: a token
    sees itself and the ``window - 1`` before it. Returns ``(B, T, H, D)``.
    """
    if isinstance(documents, Branches):
        q, k, v = (t[:, documents.index] for t in (q, k, v))
        return attend(q, k, v, documents.whole, window=window, scale=scale)[:, documents.back]
    if window is not None and window >= documents.longest:
        window = None
    if q.device.type == "cuda" and q.dtype in (torch.bfloat16, torch.float16):
        return _varlen(q, k, v, documents, window, scale)
    return _by_length(q, k, v, documents, window, scale)


def _varlen(q: Tensor, k: Tensor, v: Tensor, documents: Documents, window: int | None, scale: float) -> Tensor:
    """FlashAttention over the flattened micro-batch; documents are told apart by their offsets."""
    from torch.nn.attention.varlen import varlen_attn

    longest = documents.longest
    out = varlen_attn(
        q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), documents.offsets, documents.offsets, longest, longest,
        scale=scale, enable_gqa=q.shape[2] != k.shape[2], window_size=(-1 if window is None else window - 1, 0),
    )  # fmt: skip
    assert isinstance(out, Tensor)
    return out.view(q.shape)


def _by_length(q: Tensor, k: Tensor, v: Tensor, documents: Documents, window: int | None, scale: float) -> Tensor:
    """One causal call for all documents of about the same length.

    A document is padded behind its end, where a causal query never looks; so no mask is needed.
    """
    rows, length = q.shape[:2]
    if len(set(documents.lengths)) == 1:
        # Nothing to gather, and nothing to scatter in the backward.
        each_q, each_k, each_v = (t.reshape(-1, documents.longest, *t.shape[2:]) for t in (q, k, v))
        return _causal(each_q, each_k, each_v, window, scale).reshape(q.shape)
    flat = [t.flatten(0, 1) for t in (q, k, v)]
    parts, places = [], []
    for size, starts in _buckets(documents.lengths):
        index, real = _gather_index(size, starts, documents.lengths, rows * length, q.device)
        out = _causal(flat[0][index], flat[1][index], flat[2][index], window, scale)
        parts.append(out.flatten(0, 1)[real])
        places.append(index.flatten()[real])
    whole = torch.cat(parts)
    order = torch.cat(places)
    return torch.zeros_like(flat[0]).index_copy(0, order, whole.to(q.dtype)).view(q.shape)


@lru_cache(maxsize=64)
def _buckets(lengths: tuple[int, ...]) -> list[tuple[int, tuple[tuple[int, int], ...]]]:
    """(padded length, ((start, length), ...)) of documents that are attended to together."""
    groups: dict[int, list[tuple[int, int]]] = defaultdict(list)
    start = 0
    for length in lengths:
        groups[-(-length // BUCKET) * BUCKET].append((start, length))
        start += length
    return [(size, tuple(members)) for size, members in sorted(groups.items())]


@lru_cache(maxsize=512)
def _gather_index(
    size: int, members: tuple[tuple[int, int], ...], lengths: tuple[int, ...], total: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Flat token indices ``(n, size)`` of a bucket, and the flat places in it that are real tokens."""
    starts = torch.tensor([s for s, _ in members])[:, None]
    counts = torch.tensor([n for _, n in members])[:, None]
    places = torch.arange(size)[None]
    index = (starts + places).clamp(max=total - 1)
    real = (places < counts).flatten().nonzero().squeeze(1)
    return index.to(device), real.to(device)


def _causal(q: Tensor, k: Tensor, v: Tensor, window: int | None, scale: float) -> Tensor:
    """Causal attention over rows of one document each, ``(n, L, H, D)``."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    if window is not None and window < q.shape[2]:
        out = _banded(q, k, v, window, scale)
    elif q.device.type == "cpu" and q.dtype is torch.bfloat16 and q.shape[2] in TILES:
        out = _CausalOnCPU.apply(q, k, v, scale)  # type: ignore[no-untyped-call]
    else:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
    return out.transpose(1, 2)


class _CausalOnCPU(torch.autograd.Function):
    """PyTorch's fused forward, and a backward of bfloat16 matrix products, twice as fast as its own and as exact.

    One head group at a time, so that the scores ``(G, L, L)`` stay near the caches (measured at L = 512: 7.6 against 14 ms).
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        out, _ = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True, scale=scale)
        ctx.save_for_backward(q, k, v, out)
        ctx.scale = scale
        return out  # type: ignore[no-any-return]

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


def _banded(q: Tensor, k: Tensor, v: Tensor, window: int, scale: float) -> Tensor:
    """A sliding window in blocks of ``window`` queries, each of which sees at most ``2 * window - 1`` keys."""
    parts = []
    for first in range(0, q.shape[2], window):
        last, begin = min(first + window, q.shape[2]), max(0, first - window + 1)
        queries = torch.arange(first, last, device=q.device)[:, None]
        keys = torch.arange(begin, last, device=q.device)[None]
        seen = (keys <= queries) & (keys > queries - window)
        parts.append(
            F.scaled_dot_product_attention(
                q[:, :, first:last], k[:, :, begin:last], v[:, :, begin:last],
                attn_mask=seen, scale=scale, enable_gqa=q.shape[1] != k.shape[1],
            )
        )  # fmt: skip
    return torch.cat(parts, 2)
