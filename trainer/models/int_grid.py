"""The grid of integer exports: equal steps, symmetric around zero, that a group of neighbouring inputs of an output shares.

Training that rounds to it (`trainer.models.qat`) and the files that hold its codes use these functions alone, so both compute
the same numbers. They round the bfloat16 of a weight: what a float32 master, its bfloat16 copy and a folder of either have in
common.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

GROUPS = (64, 32)
"""Inputs that share a scale in 4 bits: the first that divides the inputs of every matrix. In 8 bits whole rows share one."""


def group_size(widths: Iterable[int], bits: int) -> int | None:
    """Inputs that share a scale in matrices of these numbers of inputs; 0 = the whole row, None = none divides them all."""
    widths = set(widths)
    return 0 if bits == 8 else next((group for group in GROUPS if not any(width % group for width in widths)), None)


def scales(weight: Tensor, bits: int, group: int) -> Tensor:
    """Widths of the grid's steps, bfloat16 ``(..., o, i / group)``, of a weight ``(..., o, i)``; ``group`` 0 = whole rows.

    The largest weight of a group lies half a step outside of the largest code, so the other sign's has a code of its own.
    """
    largest = _grouped(weight.bfloat16(), group).abs().amax(-1).float()
    scale: Tensor = (largest / (2 ** (bits - 1) - 0.5)).bfloat16()
    return scale.masked_fill(scale == 0, 1.0)


def quantise(weight: Tensor, bits: int, group: int) -> tuple[Tensor, Tensor]:
    """Codes int8 ``(..., o, i)`` and their `scales` of a weight ``(..., o, i)``.

    It is done once, to the weights themselves: of what `dequantise` gives the scales are others (half a step, again).
    """
    scale = scales(weight, bits, group)
    steps = _grouped(weight.bfloat16(), group).float() / scale.float()[..., None]
    codes = steps.round_().clamp_(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    return codes.to(torch.int8).view(weight.shape), scale


def dequantise(codes: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weight ``(..., o, i)`` of codes ``(..., o, i)`` and scales ``(..., o, groups)``, rounded to ``dtype``."""
    group = codes.shape[-1] // scale.shape[-1]
    return (_grouped(codes, group).float() * scale.float()[..., None]).view(codes.shape).to(dtype)


def fake(weight: Tensor, bits: int, group: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A weight rounded to its grid, ``dequantise(*quantise(weight))``."""
    return (_opaque if torch.compiler.is_compiling() else _fake)(weight, bits, group, dtype)


def _fake(weight: Tensor, bits: int, group: int, dtype: torch.dtype) -> Tensor:
    return dequantise(*quantise(weight, bits, group), dtype)


# Compiled blocks do not look inside: inductor leaves out a rounding to bfloat16 that float32 follows, and codes change.
_opaque = torch.library.custom_op("onecurve::fake_quantize", _fake, mutates_args=())


@_opaque.register_fake
def _(weight: Tensor, bits: int, group: int, dtype: torch.dtype) -> Tensor:
    return weight.new_empty(weight.shape, dtype=dtype)


def _grouped(weight: Tensor, group: int) -> Tensor:
    return weight.reshape(*weight.shape[:-1], -1, group or weight.shape[-1])
