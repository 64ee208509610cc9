"""Causal attention inside packed documents, without a mask over the row."""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.varlen import varlen_attn

from trainer.batch import Branches, Documents
from trainer.models.architecture import Architecture
from trainer.models.cpu_kernels import (
    attend_by_length,
    causal_attention,
    forward_attention,
    has_fast_attention,
    has_forward_attention,
    take,
)

VARLEN_DEVICES = ("cuda",)
"""Kinds of devices that there is a kernel for documents of unequal lengths on."""
VARLEN_DTYPES = (torch.bfloat16, torch.float16)
VARLEN_HEAD_DIMS = range(8, 257, 8)
VARLEN_CAPABILITY = 8
"""CUDA's compute capability from which FlashAttention works: Ampere. V100 and T4 are older."""
# Up to torch 2.11 the kernel takes fewer key heads without being told.
GROUPED_HEADS: dict[str, Any] = (
    {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
)


class Scores(NamedTuple):
    """How attention scores the products of queries and keys.

    scale: their factor
    window: a token sees itself and the ``window - 1`` before it; None = all
    cap: bound of the scores, ``cap * tanh(score / cap)``; None = none
    sinks: a score of every head ``(H,)`` that takes part in the softmax and has no value; None = none
    """

    scale: float
    window: int | None = None
    cap: float | None = None
    sinks: Tensor | None = None

    @property
    def plain(self) -> bool:
        """Whether the fused kernels compute it."""
        return self.cap is None and self.sinks is None


def attend(
    q: Tensor, k: Tensor, v: Tensor, documents: Documents | Branches, scores: Scores, *, forward: bool = False
) -> Tensor:
    """Causal attention inside each document, or inside each of the sequences that share tokens of a row.

    ``q`` ``(B, T, H, D)``; ``k``, ``v`` ``(B, T, Hkv, D)``, where query heads share key heads in groups. Returns
    ``(B, T, H, D)``. ``forward``: no gradient is wanted.
    """
    if isinstance(documents, Branches):
        q, k, v = (take(t, 1, documents.index) for t in (q, k, v))
        return take(attend(q, k, v, documents.sequences, scores, forward=forward), 1, documents.back)
    if scores.window is not None and scores.window >= documents.longest:
        scores = scores._replace(window=None)
    if scores.plain and has_varlen(q.device, q.dtype, q.shape[-1]):
        return _varlen(q, k, v, documents, scores.window, scores.scale)
    causal = partial(_causal, scores=scores, forward=forward)
    return attend_by_length(q, k, v, documents, causal)  # type: ignore[no-any-return]


def has_varlen(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether FlashAttention takes documents of unequal lengths; elsewhere those of about the same length go together."""
    if device.type not in VARLEN_DEVICES or dtype not in VARLEN_DTYPES or head_dim not in VARLEN_HEAD_DIMS:
        return False
    return device.type != "cuda" or torch.cuda.get_device_properties(device).major >= VARLEN_CAPABILITY


def has_kernel(a: Architecture, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a model's attention over packed documents is one kernel: no bound of the scores, no sinks."""
    return a.score_cap is None and not a.sinks and has_varlen(device, dtype, a.head_dim)


def _varlen(q: Tensor, k: Tensor, v: Tensor, documents: Documents, window: int | None, scale: float) -> Tensor:
    """FlashAttention over the flattened micro-batch; documents are told apart by their offsets."""
    out = varlen_attn(
        q.flatten(0, 1),
        k.flatten(0, 1),
        v.flatten(0, 1),
        cu_seq_q=documents.offsets,
        cu_seq_k=documents.offsets,
        max_q=documents.longest,
        max_k=documents.longest,
        scale=scale,
        window_size=(-1 if window is None else window - 1, 0),
        **GROUPED_HEADS,
    )
    assert isinstance(out, Tensor)
    return out.view(q.shape)


def _causal(q: Tensor, k: Tensor, v: Tensor, scores: Scores, forward: bool) -> Tensor:
    """Causal attention over rows of one document each, ``(n, L, H, D)``."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    length, window = q.shape[2], scores.window
    if (window is not None and window < length) or not scores.plain:
        out = _banded(q, k, v, scores)
    elif forward and has_forward_attention(q):
        out = forward_attention(q, k, v, scores.scale)
    elif has_fast_attention(q):
        out = causal_attention(q, k, v, scores.scale)
    else:
        enable_gqa = q.shape[1] != k.shape[1]
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scores.scale, enable_gqa=enable_gqa)
    return out.transpose(1, 2)


def _banded(q: Tensor, k: Tensor, v: Tensor, scores: Scores) -> Tensor:
    """A sliding window in blocks of ``window`` queries, each of which sees at most ``2 * window - 1`` keys."""
    window = min(scores.window or q.shape[2], q.shape[2])
    parts = []
    for first in range(0, q.shape[2], window):
        last, begin = min(first + window, q.shape[2]), max(0, first - window + 1)
        queries = torch.arange(first, last, device=q.device)[:, None]
        keys = torch.arange(begin, last, device=q.device)[None]
        seen = (keys <= queries) & (keys > queries - window)
        parts.append(attend_seen(q[:, :, first:last], k[:, :, begin:last], v[:, :, begin:last], seen, scores))
    return torch.cat(parts, 2)


def attend_seen(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scores: Scores) -> Tensor:
    """Attention of queries ``(n, H, L, D)`` to the keys ``(n, Hkv, S, D)`` that are ``seen`` ``(..., L, S)``."""
    if scores.plain:
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=seen, scale=scores.scale, enable_gqa=q.shape[1] != k.shape[1]
        )
    return attend_plainly(
        q.reshape(len(q), k.shape[1], -1, *q.shape[2:]), k[:, :, None], v[:, :, None], seen, scores
    ).flatten(1, 2)


def attend_plainly(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scores: Scores) -> Tensor:
    """As `attend_seen`, by products: what no fused kernel computes.

    ``q`` ``(n, Hkv, G, L, D)``; ``k``, ``v`` ``(n, Hkv, 1, S, D)``. Returns ``(n, Hkv, G, L, D)``.
    """
    products = (q @ k.transpose(-1, -2)).float() * scores.scale
    if scores.cap is not None:
        products = scores.cap * (products / scores.cap).tanh()
    products = products.masked_fill(~seen, -torch.inf)
    if scores.sinks is not None:
        sink = scores.sinks.float().view(*products.shape[1:3], 1, 1).expand(*products.shape[:-1], 1)
        products = torch.cat([products, sink], -1)
    return products.softmax(-1)[..., : k.shape[-2]].to(v.dtype) @ v
