"""Dropout whose draws belong to rows of the data: the same on every rank, after a resume, and when computed again."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

_rows: tuple[str, ...] = ("",)


def draw_for(key: Sequence[int], rows: Sequence[int]) -> None:
    """Draw for these rows of the data until the next call; ``key``: what else it depends on (seed, step)."""
    global _rows
    _rows = tuple(":".join(map(str, (*key, row))) for row in rows)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def dropout(x: Tensor, part: float, place: str) -> Tensor:
    """Zero a ``part`` of ``x``, the rest scaled up (Srivastava et al. 2014).

    ``x`` ``(B, T, ...)``, or ``(1, B * T, ...)`` where rows that share beginnings lie end to end.
    ``place``: where in the model.
    """
    keep = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    end_to_end = x.dim() > 2 and len(x) == 1 and x.shape[1] % len(_rows) == 0
    for number, mask in enumerate(keep.view(len(_rows), -1, *x.shape[2:]) if end_to_end else keep):
        turn, row = divmod(number, len(_rows))
        digest = hashlib.blake2b(f"{_rows[row]}:{turn}:{place}".encode(), digest_size=7).digest()
        generator = torch.Generator(x.device).manual_seed(int.from_bytes(digest, "big"))
        mask.bernoulli_(1 - part, generator=generator)
    return x * keep / (1 - part)
