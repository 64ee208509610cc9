"""Root-mean-square normalisation (Zhang & Sennrich 2019, arXiv:1910.07467)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trainer.functional import working_dtype
from trainer.models.cpu_kernels import has_fast_norm, rms_norm


class RMSNorm(nn.Module):
    """``weight * x / sqrt(mean(x ** 2) + eps)`` over the last dimension, statistics in float32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        if has_fast_norm(x, self.weight):
            out = rms_norm(x, self.weight, self.eps)
        elif x.device.type == "cuda" and not torch.compiler.is_compiling():
            # One kernel, which wants one format: autocast would widen both.
            with torch.autocast("cuda", enabled=False):
                out = F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)
        else:
            wide = x.float()
            wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
            out = self.weight * wide.to(x.dtype)
        # Once, rather than in each of the projections that read it.
        return out.to(working_dtype(out))
