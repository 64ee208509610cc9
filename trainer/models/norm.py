"""Normalisation over the last dimension: by the root mean square (Zhang & Sennrich 2019, arXiv:1910.07467), or LayerNorm."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trainer.functional import working_dtype
from trainer.models.architecture import Architecture
from trainer.models.cpu_kernels import has_fast_norm, rms_norm
from trainer.parallel.cuts import cut
from trainer.parallel.mesh import UNDIVIDED, Axis


class RMSNorm(nn.Module):
    """``(offset + weight) * x / sqrt(mean(x ** 2) + eps)``, statistics in float32.

    ``shape``: of the weight; its last size is what is normed.

    Attributes:
        users: Ranks that each norm other heads with the same weight.
        across: Ranks that each have a part of what is normed.
    """

    users: Axis = UNDIVIDED
    across: Axis = UNDIVIDED

    def __init__(self, shape: int | tuple[int, ...], eps: float, offset: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((shape,) if isinstance(shape, int) else shape, 1.0 - offset))
        self.eps, self.offset = eps, offset

    def forward(self, x: Tensor) -> Tensor:
        weight = self.users.enter(self.weight)
        # A short format has no room for what is added to a one.
        weight = weight.float() + self.offset if self.offset else weight
        if self.across.size == 1 and has_fast_norm(x, weight):
            out = rms_norm(x, weight, self.eps)
        elif self.across.size == 1 and _has_kernel(x, weight):
            # One kernel, which wants one format: autocast would widen both.
            with torch.autocast("cuda", enabled=False):
                wide = x.float() if self.offset else x
                out = F.rms_norm(wide, weight.shape, weight.to(wide.dtype), self.eps)
        else:
            wide = x.float()
            wide = wide * torch.rsqrt(self._mean(wide.square()) + self.eps)
            out = weight * (wide if self.offset else wide.to(x.dtype))
        # Once, rather than in each of the projections that read it.
        out = out.to(x.dtype) if self.offset else out
        return out.to(working_dtype(out))

    def _mean(self, squares: Tensor) -> Tensor:
        """``(..., 1)``: over the last dimension, on all ranks that have a part of it."""
        means = squares.mean(-1, keepdim=True)
        if self.across.size == 1:
            return means
        # Each rank's outputs depend on all parts: their gradients are added up, as the parts were.
        return self.across.enter(self.across.leave(means)) / self.across.size


class LayerNorm(nn.Module):
    """Mean 0 and variance 1, times ``offset + weight``, plus a bias where there is one; in float32 (Ba et al. 2016).

    Attributes:
        users: Ranks that each norm other heads with the same weight.
    """

    users: Axis = UNDIVIDED

    def __init__(self, shape: tuple[int, ...], eps: float, offset: float = 0.0, *, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full(shape, 1.0 - offset))
        self.bias = nn.Parameter(torch.zeros(shape)) if bias else None
        self.eps, self.offset = eps, offset

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            weight = self.users.enter(self.weight).float()
            weight = weight + self.offset if self.offset else weight
            bias = None if self.bias is None else self.users.enter(self.bias).float()
            if weight.ndim == 1:
                out = F.layer_norm(x.float(), weight.shape, weight, bias, self.eps)
            else:
                out = F.layer_norm(x.float(), weight.shape[-1:], None, None, self.eps) * weight
                out = out if bias is None else out + bias
        return out.to(working_dtype(x))


def divide_heads(norm: RMSNorm | LayerNorm, kind: str, axis: Axis) -> None:
    """Norm this rank's heads; ``kind``: `Architecture.qk_norm`."""
    if kind == "head":
        norm.users = axis
        return
    cut(norm, "weight", 0, axis)
    if isinstance(norm, LayerNorm) and norm.bias is not None:
        cut(norm, "bias", 0, axis)
    if kind == "width":
        assert isinstance(norm, RMSNorm)
        norm.across = axis


def _has_kernel(x: Tensor, weight: Tensor) -> bool:
    return x.device.type == "cuda" and weight.ndim == 1 and not torch.compiler.is_compiling()


def norm_of(a: Architecture, *shape: int) -> RMSNorm | LayerNorm:
    """The norm that a model has, with weights of ``shape``."""
    if a.layer_norm:
        return LayerNorm(shape, a.rms_norm_eps, a.norm_offset, bias=a.norm_bias)
    return RMSNorm(shape, a.rms_norm_eps, a.norm_offset)
