"""Weights in 4-bit NormalFloat whose block maxima are quantised again (QLoRA; Dettmers et al. 2023, arXiv:2305.14314).

bitsandbytes packs and unpacks; what is packed are plain bytes, which no cast of a module touches. Its own `Linear4bit` is not
used: on a CPU one evaluation repacks its weight for a kernel that has no backward and computes other numbers.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from trainer.functional.bitsandbytes import library
from trainer.models.grouped import grouped_product

BLOCK, NESTED = 64, 256
"""Weights that share a maximum, and maxima that share a scale."""
BITS = 4 + 8 / BLOCK + 32 / (BLOCK * NESTED)
"""Of a weight, maxima and scales included."""


class Packed(NamedTuple):
    """A weight of n elements as bytes; blocks run over the flattened weight, the last one may be shorter.

    codes: indices of NormalFloat's 16 values, two a byte, the first one in the upper half ``(ceil(n / 2),)``
    maxima: of the magnitudes of each block, in 8 bits ``(blocks,)``
    numbers: float32 as bytes: the scale of every 256 maxima, and last the mean that was taken off them
    """

    codes: Tensor
    maxima: Tensor
    numbers: Tensor

    def digest(self) -> str:
        """Of all bytes."""
        digest = hashlib.blake2b(digest_size=8)
        for part in self:
            digest.update(part.cpu().numpy().tobytes())
        return digest.hexdigest()


class BlockSpan(NamedTuple):
    """The part of a weight between two places of a dimension, where that is blocks as a whole."""

    dim: int
    first: int
    last: int

    def shape(self, of: Sequence[int]) -> tuple[int, ...]:
        """The part's, of a weight of shape ``of``."""
        return (*of[: self.dim], self.last - self.first, *of[self.dim + 1 :])

    def fits(self, of: Sequence[int]) -> bool:
        """Whether it begins and ends with a block."""
        row = math.prod(of[self.dim + 1 :])
        return self.first * row % BLOCK == 0 and self.last * row % BLOCK == 0 and of[self.dim] * row % BLOCK == 0

    def blocks(self, of: Sequence[int]) -> tuple[int, int, int, int]:
        """The weight's blocks as so many lines of so many, and (first, last) of each line that are the part's."""
        row = math.prod(of[self.dim + 1 :])
        return (
            math.prod(of[: self.dim]),
            of[self.dim] * row // BLOCK,
            self.first * row // BLOCK,
            self.last * row // BLOCK,
        )


def packed_sizes(elements: int) -> Packed:
    """Bytes of each part of a packed weight, as empty tensors without memory."""
    blocks = -(-elements // BLOCK)
    sizes = (-(-elements // 2), blocks, 4 * (-(-blocks // NESTED) + 1))
    return Packed(*(torch.empty(size, dtype=torch.uint8, device="meta") for size in sizes))


@cache
def levels(device: torch.device) -> Tensor:
    """The 256 values of a maximum's 8 bits."""
    values: Tensor = library("NF4").create_dynamic_map().float().to(device)
    return values


@torch.no_grad()
def pack(weight: Tensor) -> Packed:
    """A weight of any shape in NF4; the same bytes of its bfloat16 and its float32 form.

    Raises:
        ConfigError: if bitsandbytes is not installed.
    """
    codes, state = library("NF4").quantize_4bit(
        weight.detach().contiguous(), blocksize=BLOCK, quant_type="nf4", compress_statistics=True
    )
    numbers = torch.cat([state.state2.absmax.float().flatten(), state.offset.float().reshape(1)])
    return Packed(codes.flatten(), state.absmax.flatten(), numbers.view(torch.uint8))


def unpack(packed: Packed, shape: Sequence[int], dtype: torch.dtype, blocks: Sequence[int] = ()) -> Tensor:
    """The weight of ``shape`` that a packed one stands for: computed in float32 and rounded once to ``dtype``.

    ``blocks``: `BlockSpan.blocks` of a part of ``shape``, of which ``codes`` and ``maxima`` are; () = there are all.
    """
    return (_opaque_unpack if torch.compiler.is_compiling() else _unpack)(*packed, list(shape), dtype, list(blocks))


def _unpack(
    codes: Tensor, maxima: Tensor, numbers: Tensor, shape: Sequence[int], dtype: torch.dtype, blocks: Sequence[int]
) -> Tensor:
    library("NF4")
    codes, maxima = codes.flatten(), maxima.flatten()
    operators = torch.ops.bitsandbytes
    # A part of a gathered buffer may begin at an address where no float32 can be read.
    scales = numbers.clone().view(torch.float32)
    if blocks:
        largest = levels(codes.device)[maxima.int()] * scales[_numbers_of(blocks, codes.device) // NESTED]
    else:
        largest = operators.dequantize_blockwise(maxima, scales[:-1], levels(codes.device), NESTED, torch.float32)
    # As one row: its kernel for CPUs (0.50) begins a block with every row, so values are wrong where 64 does not divide it.
    flat = operators.dequantize_4bit(codes, largest + scales[-1], BLOCK, "nf4", [2 * len(codes)], dtype)
    return flat.flatten()[: math.prod(shape)].view(shape)  # type: ignore[no-any-return]


def _numbers_of(blocks: Sequence[int], device: torch.device) -> Tensor:
    """Of all blocks of a weight those of a part, in order."""
    lines, length, first, last = blocks
    starts = torch.arange(0, lines * length, length, device=device)
    return (starts[:, None] + torch.arange(first, last, device=device)).flatten()


# Compiled blocks do not look inside: the library's kernels for CPUs take addresses.
_opaque_unpack = torch.library.custom_op(
    "onecurve::unpack_nf4", _unpack, mutates_args=(),
    schema="(Tensor codes, Tensor maxima, Tensor numbers, SymInt[] shape, ScalarType dtype, SymInt[] blocks) -> Tensor",
)  # fmt: skip


@_opaque_unpack.register_fake
def _(
    codes: Tensor, maxima: Tensor, numbers: Tensor, shape: Sequence[int], dtype: torch.dtype, blocks: Sequence[int]
) -> Tensor:
    return codes.new_empty(shape, dtype=dtype)


class FrozenProduct(torch.autograd.Function):
    """``x W^T + b`` of a packed W, unpacked in the format of x, in forward and again in backward: only bytes stay between.

    ``shape``, ``blocks``: as for `unpack`.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, bias: Tensor | None, shape: tuple[int, ...], blocks: tuple[int, ...], *packed: Tensor
    ) -> Tensor:
        ctx.form = shape, blocks
        ctx.save_for_backward(*packed)
        weight = unpack(Packed(*packed), shape, x.dtype, blocks)
        return F.linear(x, weight, None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        shape, blocks = ctx.form
        weight = unpack(Packed(*ctx.saved_tensors), shape, gradients[0].dtype, blocks)
        return gradients[0] @ weight, None, None, None, None, None, None


class FrozenGroupedProduct(torch.autograd.Function):
    """Sorted rows ``(S, i)`` times their expert's matrix of a packed stack ``(E, o, i)``, as `FrozenProduct` does it.

    ``ends`` ``(E,)``: the row behind the last one of every expert.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, ends: Tensor, shape: tuple[int, ...], blocks: tuple[int, ...], *packed: Tensor
    ) -> Tensor:
        ctx.form = shape, blocks
        ctx.save_for_backward(ends, *packed)
        return grouped_product(x, unpack(Packed(*packed), shape, x.dtype, blocks).mT, ends)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        ends, *packed = ctx.saved_tensors
        shape, blocks = ctx.form
        weight = unpack(Packed(*packed), shape, gradients[0].dtype, blocks)
        return grouped_product(gradients[0].contiguous(), weight, ends), None, None, None, None, None, None
