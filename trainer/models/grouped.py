"""Products of rows with the matrix of the group that each belongs to: one call for all experts of a layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trainer.functional import working_dtype

GROUPED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Formats that PyTorch's grouped product takes."""
ALIGNED = 16
"""Bytes that its rows must be a multiple of."""


@dataclass(frozen=True)
class Assignment:
    """Rows ``(n, k)`` of tokens and choices, sorted by expert; shapes do not depend on what was chosen.

    ``expert`` ``(S,)``: the expert of every sorted row, of S = n * k.
    ``order`` ``(S,)``: its place in the flattened ``(n, k)``.
    ``inverse`` ``(S,)``: the sorted place of every row of the flattened ``(n, k)``.
    ``ends`` ``(E,)``: int32, the sorted row behind the last one of every expert.
    ``choices``: k.
    """

    expert: Tensor
    order: Tensor
    inverse: Tensor
    ends: Tensor
    choices: int

    @classmethod
    def of(cls, chosen: Tensor, experts: int) -> Assignment:
        """Of the experts ``chosen`` ``(n, k)`` of every token."""
        expert, order = chosen.flatten().sort(stable=True)
        numbers = torch.arange(experts, device=chosen.device)
        ends = torch.searchsorted(expert, numbers, right=True, out_int32=True)
        places = torch.arange(len(order), device=chosen.device)
        return cls(expert, order, torch.empty_like(order).scatter_(0, order, places), ends, chosen.shape[1])

    def dispatch(self, x: Tensor) -> Tensor:
        """Tokens ``(n, d)`` as sorted rows ``(S, d)``."""
        return _Rearranged.apply(x, self.order, self.inverse, self.choices)  # type: ignore[no-any-return, no-untyped-call]

    def combine(self, rows: Tensor) -> Tensor:
        """Sorted rows ``(S, d)`` as ``(n, k, d)``, the choices of a token side by side: their sum has a fixed order."""
        back = _Rearranged.apply(rows, self.inverse, self.order, 1)  # type: ignore[no-untyped-call]
        return back.view(-1, self.choices, rows.shape[-1])  # type: ignore[no-any-return]


class _Rearranged(torch.autograd.Function):
    """Rows ``(n, d)``, each ``copies`` times, in ``order``. The gradient adds the copies up in a fixed order, too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor, copies: int) -> Tensor:
        ctx.save_for_backward(inverse)
        ctx.copies = copies
        return x.index_select(0, order if copies == 1 else order // copies)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        [inverse] = ctx.saved_tensors
        back = gradients[0].index_select(0, inverse)
        if ctx.copies > 1:
            back = back.view(-1, ctx.copies, back.shape[-1]).sum(1)
        return back, None, None, None


class _GroupedProduct(torch.autograd.Function):
    """``x[i] @ weight[group of i].T``. It keeps the weight itself and no cast of it: ZeRO-3 shards it away meanwhile."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, ends)
        return grouped_product(x, weight.to(x.dtype).mT, ends)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight, ends = ctx.saved_tensors
        gradient = gradients[0].contiguous()
        of_x = grouped_product(gradient, weight.to(x.dtype), ends) if ctx.needs_input_grad[0] else None
        of_weight = grouped_outer(gradient, x, ends).to(weight.dtype) if ctx.needs_input_grad[1] else None
        return of_x, of_weight, None


def has_grouped_product(dtype: torch.dtype, *sizes: int) -> bool:
    """Whether PyTorch's grouped product takes matrices of these ``sizes`` (rows, columns)."""
    fits = all(size * dtype.itemsize % ALIGNED == 0 for size in sizes)
    return dtype in GROUPED_DTYPES and fits and hasattr(F, "grouped_mm")


def grouped_product(x: Tensor, matrices: Tensor, ends: Tensor) -> Tensor:
    """Rows ``(S, i)`` times the matrix, of ``(E, i, o)``, of their group, which ends before row ``ends[e]``."""
    return (_opaque_product if torch.compiler.is_compiling() else _product)(x, matrices, ends)


def grouped_outer(left: Tensor, right: Tensor, ends: Tensor) -> Tensor:
    """``left.T @ right`` of every group, of rows ``(S, o)`` and ``(S, i)``: ``(E, o, i)``, 0 for a group without rows."""
    return (_opaque_outer if torch.compiler.is_compiling() else _outer)(left, right, ends)


def _product(x: Tensor, matrices: Tensor, ends: Tensor) -> Tensor:
    if has_grouped_product(x.dtype, *matrices.shape[1:]):
        return F.grouped_mm(x, matrices, offs=ends)
    parts = torch.split(x, _sizes(ends))
    return torch.cat([part @ matrix for part, matrix in zip(parts, matrices.unbind(), strict=True)])


def _outer(left: Tensor, right: Tensor, ends: Tensor) -> Tensor:
    if has_grouped_product(left.dtype, left.shape[1], right.shape[1]):
        return F.grouped_mm(left.mT, right, offs=ends)
    sizes = _sizes(ends)
    pairs = zip(torch.split(left, sizes), torch.split(right, sizes), strict=True)
    return torch.stack([a.mT @ b for a, b in pairs])


# Compiled blocks do not look inside: torch 2.13 compiles PyTorch's grouped product in bfloat16 only.
_opaque_product = torch.library.custom_op("onecurve::grouped_product", _product, mutates_args=())
_opaque_outer = torch.library.custom_op("onecurve::grouped_outer", _outer, mutates_args=())


@_opaque_product.register_fake
def _(x: Tensor, matrices: Tensor, ends: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], matrices.shape[2])


@_opaque_outer.register_fake
def _(left: Tensor, right: Tensor, ends: Tensor) -> Tensor:
    return left.new_empty(ends.shape[0], left.shape[1], right.shape[1])


def _sizes(ends: Tensor) -> list[int]:
    counts = ends.long().diff(prepend=ends.new_zeros(1))
    return counts.tolist()


class GroupedLinear(nn.Module):
    """A linear layer an expert, stacked: ``weight`` ``(E, o, i)``, ``bias`` ``(E, o)``.

    It casts its weight to autocast's format itself, which knows nothing of grouped products.
    """

    casts_weights = True

    def __init__(self, experts: int, inputs: int, outputs: int, bias: bool) -> None:
        super().__init__()
        self.experts, self.inputs, self.outputs = experts, inputs, outputs
        self.weight: nn.Parameter | nn.Module = nn.Parameter(torch.empty(experts, outputs, inputs))
        self.bias = nn.Parameter(torch.empty(experts, outputs)) if bias else None

    def forward(self, rows: Tensor, assignment: Assignment) -> Tensor:
        """Sorted rows ``(S, i)`` to ``(S, o)``."""
        out = grouped_linear(rows, self.weight, assignment)
        return out if self.bias is None else out + self.bias[assignment.expert].to(out.dtype)


def grouped_linear(rows: Tensor, weight: Tensor | nn.Module, assignment: Assignment) -> Tensor:
    """Sorted rows ``(S, i)`` times their expert's matrix of ``weight`` ``(E, o, i)``, in the working format.

    ``weight``: or what stands for one and computes the product itself, of the rows and `Assignment.ends`.
    """
    x = rows.to(working_dtype(rows))
    if isinstance(weight, nn.Module):
        return weight(x, assignment.ends)  # type: ignore[no-any-return]
    return _GroupedProduct.apply(x, weight, assignment.ends)  # type: ignore[no-any-return, no-untyped-call]
