"""MXFP4 (OCP Microscaling Formats 1.0): blocks of 32 four-bit floats that share an eight-bit power of two."""

from __future__ import annotations

import torch
from torch import Tensor

VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""What the four bits mean: sign, two of exponent, one of mantissa."""
EXPONENT_BIAS = 127


def from_mxfp4(blocks: Tensor, scales: Tensor) -> Tensor:
    """Stacked matrices ``(E, rows, 32 G)`` in bfloat16, which loses nothing.

    ``blocks`` ``(E, rows, G, 16)`` uint8, two values a byte, the low half first; ``scales`` ``(E, rows, G)`` uint8.
    """
    # One after another: what lies between takes several times the room of the result.
    return torch.stack([_matrix(b, s) for b, s in zip(blocks, scales, strict=True)])


def _matrix(blocks: Tensor, scales: Tensor) -> Tensor:
    blocks, table = blocks.to(torch.uint8), torch.tensor(VALUES, device=blocks.device)
    values = torch.stack([table[(blocks & 15).int()], table[(blocks >> 4).int()]], -1).flatten(-2)
    return torch.ldexp(values, scales.int()[..., None] - EXPONENT_BIAS).flatten(-2).bfloat16()
