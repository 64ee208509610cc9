"""FlashAttention-2's varlen kernels on CPU: CUDA's branch of attention runs here, and can be compared with the CPU's.

The kernels are registered for the operators that `varlen_attn` calls, so its own Python, `torch.compile` and recomputation
are the real ones. They refuse what the real kernels refuse, and compute by definition, document by document.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.attention.varlen as varlen
from torch import Tensor

from trainer.models import attention


@dataclass(frozen=True)
class Call:
    """What the forward kernel was called with; ``longest``: as the caller says, ``lengths``: as the offsets say."""

    dtype: torch.dtype
    heads: tuple[int, int]
    longest: int
    lengths: tuple[int, ...]
    window: tuple[int, ...]


calls: list[Call] = []
"""Calls of the forward kernel since `emulated` was entered."""


@contextmanager
def emulated() -> Iterator[list[Call]]:
    """Attention takes CUDA's branch on CPU inside; gives the kernel's calls."""
    before, attention.VARLEN_DEVICES = attention.VARLEN_DEVICES, ("cuda", "cpu")
    calls.clear()
    try:
        yield calls
    finally:
        attention.VARLEN_DEVICES = before


def _forward(
    q: Tensor, k: Tensor, v: Tensor, starts: Tensor, _: Tensor, longest: int, __: int,
    causal: bool = False, scale: float | None = None, window: list[int] | None = None, *___: object,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    assert starts.dtype is torch.int32
    assert q.shape[-1] % 8 == 0
    assert q.shape[-1] <= 256
    assert q.dtype in (torch.bfloat16, torch.float16)
    assert q.dtype is k.dtype is v.dtype
    assert all(t.stride(-1) == 1 for t in (q, k, v))
    assert q.shape[1] % k.shape[1] == 0
    spans = list(pairwise(starts.tolist()))
    calls.append(
        Call(q.dtype, (q.shape[1], k.shape[1]), longest, tuple(b - a for a, b in spans), tuple(window or (-1, -1)))
    )
    out, normalisers = torch.empty_like(q), q.new_empty(q.shape[1], len(q), dtype=torch.float32)
    for a, b in spans:
        _, _, p, normalisers[:, a:b] = _probabilities(q[a:b], k[a:b], causal, scale, window)
        out[a:b] = (p @ _heads(v[a:b], q.shape[1])).transpose(0, 1).to(out.dtype)
    return out, normalisers, torch.zeros(2, dtype=torch.uint64)


def _backward(
    up: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, normalisers: Tensor, starts: Tensor, _: Tensor,
    longest: int, __: int, causal: bool, rng: Tensor, scale: float | None = None, window: list[int] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    grads = tuple(torch.empty_like(t) for t in (q, k, v))
    for a, b in pairwise(starts.tolist()):
        queries, keys, p, _ = _probabilities(q[a:b], k[a:b], causal, scale, window)
        upstream = up[a:b].float().transpose(0, 1)
        change = upstream @ _heads(v[a:b], q.shape[1]).transpose(1, 2)
        change = p * (change - (change * p).sum(-1, keepdim=True)) * scale
        grads[0][a:b] = (change @ keys).transpose(0, 1).to(q.dtype)
        for grad, by_head in ((grads[1], change.mT @ queries), (grads[2], p.mT @ upstream)):
            # The query heads of a group share their key head.
            grad[a:b] = by_head.unflatten(0, (k.shape[1], -1)).sum(1).transpose(0, 1).to(grad.dtype)
    return grads


def _heads(t: Tensor, heads: int) -> Tensor:
    """``(n, Hkv, D)`` as float32 ``(H, n, D)``."""
    return t.float().transpose(0, 1).repeat_interleave(heads // t.shape[1], 0)


def _probabilities(
    q: Tensor, k: Tensor, causal: bool, scale: float | None, window: list[int] | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Queries and keys ``(H, n, D)``, probabilities ``(H, n, n)`` and the log of their normalisers ``(H, n)``.

    A query at ``i`` sees the keys from ``i - left`` to ``i + right``; -1: no limit.
    """
    queries, keys = _heads(q, q.shape[1]), _heads(k, q.shape[1])
    ahead = torch.arange(len(q))[None] - torch.arange(len(q))[:, None]
    left, right = window or (-1, -1)
    hidden = torch.zeros_like(ahead, dtype=torch.bool)
    if causal:
        hidden |= ahead > 0
    if left >= 0:
        hidden |= ahead < -left
    if right >= 0:
        hidden |= ahead > right
    scores = (queries @ keys.mT * scale).masked_fill(hidden, -torch.inf)
    return queries, keys, scores.softmax(-1), scores.logsumexp(-1)


varlen._varlen_attn.register_kernel("cpu")(_forward)
varlen._varlen_attn_backward.register_kernel("cpu")(_backward)
