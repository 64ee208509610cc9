"""Rotary position embeddings (Su et al. 2021, arXiv:2104.09864), half-split as Hugging Face stores them."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from trainer.models.architecture import Architecture


def frequencies(architecture: Architecture) -> tuple[Tensor, float]:
    """Angles per position ``(head_dim / 2,)`` float32, and the factor on cos and sin (1 except for yarn)."""
    exponents = torch.arange(0, architecture.head_dim, 2, dtype=torch.int64).float() / architecture.head_dim
    inverse = 1.0 / (architecture.rope_theta**exponents)
    scaling = architecture.rope_scaling or {}
    match scaling.get("rope_type", "default"):
        case "linear":
            return inverse / scaling["factor"], 1.0
        case "llama3":
            return _llama3(inverse, scaling), 1.0
        case "yarn":
            return _yarn(architecture, scaling)
    return inverse, 1.0


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn ``x`` ``(B, T, H, D)`` by the angles of its positions; ``cos`` and ``sin`` are ``(B, T, 1, D / 2)``."""
    if x.device.type == "cuda" and not torch.compiler.is_compiling():
        return Rotation.apply(x, cos, sin)  # type: ignore[no-untyped-call,no-any-return]
    first, second = x.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


class Rotation(torch.autograd.Function):
    """`rotate` in three kernels each way instead of seven; a compiler fuses the plain one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turned(x, cos, sin, 1.0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        # The transpose of a rotation is the rotation back.
        cos, sin = ctx.saved_tensors
        return _turned(upstream, cos, sin, -1.0), None, None


def _turned(x: Tensor, cos: Tensor, sin: Tensor, direction: float) -> Tensor:
    halves = x.view(*x.shape[:-1], 2, -1)
    first, second = halves.unbind(-2)
    out = halves * cos[..., None, :]
    out.select(-2, 0).addcmul_(second, sin, value=-direction)
    out.select(-2, 1).addcmul_(first, sin, value=direction)
    return out.flatten(-2)


def angles(inverse: Tensor, factor: float, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines ``(B, T, 1, D / 2)`` of ``positions`` ``(B, T)``, computed in float32."""
    turned = (positions[..., None].float() * inverse)[:, :, None]
    cos, sin = turned.cos(), turned.sin()
    if factor != 1.0:
        cos, sin = cos * factor, sin * factor
    return cos.to(dtype), sin.to(dtype)


def _llama3(inverse: Tensor, scaling: dict[str, Any]) -> Tensor:
    """Llama 3.1's: long wavelengths are stretched by ``factor``, short ones kept, those between blended."""
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] * inverse / (2 * math.pi)
    smooth = ((turns - low) / (high - low)).clamp(0, 1)
    blended: Tensor = (1 - smooth) * inverse / scaling["factor"] + smooth * inverse
    return blended


def _yarn(architecture: Architecture, scaling: dict[str, Any]) -> tuple[Tensor, float]:
    """YaRN (Peng et al. 2023, arXiv:2309.00071): dimensions that turn often are kept, slow ones interpolated."""
    size, base, factor = architecture.head_dim, architecture.rope_theta, scaling["factor"]
    original = scaling.get("original_max_position_embeddings") or architecture.max_position_embeddings

    def dimension(turns: float) -> float:
        return size * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(base))

    first, last = dimension(scaling.get("beta_fast") or 32), dimension(scaling.get("beta_slow") or 1)
    if scaling.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, size - 1)
    if first == last:
        last += 0.001
    stretched = ((torch.arange(size // 2).float() - first) / (last - first)).clamp(0, 1)
    powers = base ** (torch.arange(0, size, 2).float() / size)
    inverse = stretched / (factor * powers) + (1 - stretched) / powers
    return inverse, _attention_factor(factor, scaling)


def _attention_factor(factor: float, scaling: dict[str, Any]) -> float:
    def grown(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    if scaling.get("attention_factor") is not None:
        return float(scaling["attention_factor"])
    weight, every = scaling.get("mscale"), scaling.get("mscale_all_dim")
    return grown(weight) / grown(every) if weight and every else grown(1)
