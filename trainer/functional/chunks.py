"""Blocks of tokens whose logits exist at once, and groups of them whose gradients go through one matrix product."""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK_BYTES = {"cpu": 12 * 2**20, "cuda": 512 * 2**20}
"""Float32 bytes of logits that exist at once: on CPU what stays near the caches, on CUDA what keeps the kernels long."""
GROUP_BYTES = {"cpu": 128 * 2**20, "cuda": 2**30}
"""Bytes of logits' gradients, in the compute format, that go through one matrix product. Every product reads and writes the
float32 gradient of the whole vocabulary once more."""


def split(tokens: int, size: int) -> list[slice]:
    """Slices of equal length, at most ``size``: a last one of a few tokens would cost as much as a full one."""
    count = -(-tokens // max(1, size))
    return [slice(tokens * n // count, tokens * (n + 1) // count) for n in range(count)]


def groups(tokens: int, weight: Tensor, dtype: torch.dtype, rows: int | None = None) -> list[slice]:
    """Groups of ``tokens``, for a vocabulary projection ``(V, d)`` and logits' gradients in ``dtype``.

    ``rows``: of the largest part of a vocabulary that is divided, where cuts must be the same for all parts; None = V.
    """
    most = max(GROUP_BYTES[weight.device.type], BLOCK_BYTES[weight.device.type])
    return split(tokens, most // (dtype.itemsize * (rows or weight.shape[0])))


def blocks(tokens: int, weight: Tensor, rows: int | None = None) -> list[slice]:
    """Blocks of ``tokens``, for a vocabulary projection ``(V, d)`` and logits in float32; ``rows`` as of `groups`."""
    return split(tokens, BLOCK_BYTES[weight.device.type] // (4 * (rows or weight.shape[0])))


def partition(tokens: int, weight: Tensor, dtype: torch.dtype, rows: int | None = None) -> list[slice]:
    """The blocks of all groups; ``rows`` as of `groups`."""
    return [
        slice(group.start + part.start, group.start + part.stop)
        for group in groups(tokens, weight, dtype, rows)
        for part in blocks(group.stop - group.start, weight, rows)
    ]


class LogitsBuffer:
    """Memory for a block of logits, used again for every block: fresh pages cost more than the arithmetic."""

    def __init__(self, tokens: int, weight: Tensor, dtype: torch.dtype) -> None:
        most = max((s.stop - s.start for s in blocks(tokens, weight)), default=0)
        # A group's blocks can be a token longer than those of all tokens.
        shape = (min(tokens, most + 1), weight.shape[0])
        self._wide = weight.new_empty(shape, dtype=torch.float32)
        self._narrow = self._wide if dtype is torch.float32 else weight.new_empty(shape, dtype=dtype)

    def __call__(self, states: Tensor, compute: Tensor) -> Tensor:
        """Float32 logits ``(n, V)`` of ``states`` ``(n, d)``, valid until the next call."""
        narrow, wide = self._narrow[: len(states)], self._wide[: len(states)]
        torch.mm(states, compute.T, out=narrow)
        return wide if self._narrow is self._wide else wide.copy_(narrow)
