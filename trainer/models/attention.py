"""Causal attention inside packed documents, without a mask over the row."""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.varlen import varlen_attn

from trainer.batch import Branches, Documents
from trainer.models.cpu_kernels import attend_by_length, causal_attention, has_fast_attention

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


def attend(
    q: Tensor, k: Tensor, v: Tensor, documents: Documents | Branches, *, window: int | None, scale: float
) -> Tensor:
    """Causal attention inside each document, or inside each of the sequences that share tokens of a row.

    ``q`` ``(B, T, H, D)``; ``k``, ``v`` ``(B, T, Hkv, D)``, where query heads share key heads in groups. ``window``: a token
    sees itself and the ``window - 1`` before it. Returns ``(B, T, H, D)``.
    """
    if isinstance(documents, Branches):
        q, k, v = (t[:, documents.index] for t in (q, k, v))
        return attend(q, k, v, documents.sequences, window=window, scale=scale)[:, documents.back]
    if window is not None and window >= documents.longest:
        window = None
    if has_varlen(q.device, q.dtype, q.shape[-1]):
        return _varlen(q, k, v, documents, window, scale)
    causal = partial(_causal, window=window, scale=scale)
    return attend_by_length(q, k, v, documents, causal)  # type: ignore[no-any-return]


def has_varlen(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether FlashAttention takes documents of unequal lengths; elsewhere those of about the same length go together."""
    if device.type not in VARLEN_DEVICES or dtype not in VARLEN_DTYPES or head_dim not in VARLEN_HEAD_DIMS:
        return False
    return device.type != "cuda" or torch.cuda.get_device_properties(device).major >= VARLEN_CAPABILITY


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


def _causal(q: Tensor, k: Tensor, v: Tensor, window: int | None, scale: float) -> Tensor:
    """Causal attention over rows of one document each, ``(n, L, H, D)``."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    if window is not None and window < q.shape[2]:
        out = _banded(q, k, v, window, scale)
    elif has_fast_attention(q):
        out = causal_attention(q, k, v, scale)
    else:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
    return out.transpose(1, 2)


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
                q[:, :, first:last],
                k[:, :, begin:last],
                v[:, :, begin:last],
                attn_mask=seen,
                scale=scale,
                enable_gqa=q.shape[1] != k.shape[1],
            )
        )
    return torch.cat(parts, 2)
