"""Rotary position embeddings (Su et al. 2021, arXiv:2104.09864), half-split as Hugging Face stores them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from trainer.models.architecture import Architecture, Rope

NEEDED = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor",),
    "longrope": ("short_factor", "long_factor"),
}
"""Kinds of scaling, and the parameters that each must have."""


def frequencies(rope: Rope, a: Architecture) -> tuple[Tensor, float]:
    """Angles per position ``(turned / 2,)`` float32, and the factor on cos and sin (1 except for yarn and longrope)."""
    size, scaling = turned_size(rope, a), rope.scaling
    exponents = torch.arange(0, size, 2, dtype=torch.int64).float() / size
    inverse = 1.0 / (rope.theta**exponents)
    match scaling.get("rope_type", "default"):
        case "linear":
            return inverse / scaling["factor"], 1.0
        case "dynamic" if scaling.get("alpha"):
            return 1.0 / ((rope.theta * scaling["alpha"] ** (size / (size - 2))) ** exponents), 1.0
        case "llama3":
            return _llama3(inverse, scaling), 1.0
        case "yarn":
            return _yarn(rope, a, size)
        case "longrope":
            return _longrope(rope, a, exponents)
    # Dynamic scaling stretches what is longer than max_position_embeddings, which no run computes.
    return inverse, 1.0


def turned_size(rope: Rope, a: Architecture) -> int:
    """The dimensions of a head that turn."""
    return int(a.head_dim * rope.fraction)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """Turn ``x`` ``(B, T, H, D)`` by the angles of its positions; ``cos`` and ``sin`` are ``(B, T, 1, turned / 2)``.

    Of a head only the first ``turned`` dimensions turn. ``interleaved``: neighbours turn together and come out as halves,
    since only products of queries with keys matter.
    """
    size = 2 * cos.shape[-1]
    if size < x.shape[-1]:
        return torch.cat([rotate(x[..., :size], cos, sin, interleaved), x[..., size:]], -1)
    if interleaved:
        x = x.view(*x.shape[:-1], -1, 2).transpose(-1, -2).flatten(-2)
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
    """Cosines and sines ``(B, T, 1, turned / 2)`` of ``positions`` ``(B, T)``, computed in float32."""
    turned = (positions[..., None].float() * inverse)[:, :, None]
    cos, sin = turned.cos(), turned.sin()
    if factor != 1.0:
        cos, sin = cos * factor, sin * factor
    return cos.to(dtype), sin.to(dtype)


def growth(rope: Rope, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """What queries are multiplied by, ``(B, T, 1, 1)``: sharper the further into a document (Llama 4); () = nothing."""
    beta = rope.scaling.get("llama_4_scaling_beta")
    if not beta:
        return ()
    original = rope.scaling["original_max_position_embeddings"]
    return ((1 + beta * torch.log1p((positions // original).float()))[..., None, None].to(dtype),)


def _llama3(inverse: Tensor, scaling: Mapping[str, Any]) -> Tensor:
    """Llama 3.1's: long wavelengths are stretched by ``factor``, short ones kept, those between blended."""
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] * inverse / (2 * math.pi)
    smooth = ((turns - low) / (high - low)).clamp(0, 1)
    blended: Tensor = (1 - smooth) * inverse / scaling["factor"] + smooth * inverse
    return blended


def _yarn(rope: Rope, a: Architecture, size: int) -> tuple[Tensor, float]:
    """YaRN (Peng et al. 2023, arXiv:2309.00071): dimensions that turn often are kept, slow ones interpolated."""
    scaling, base = rope.scaling, rope.theta
    original = scaling.get("original_max_position_embeddings") or a.max_position_embeddings
    factor = scaling["factor"]

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


def _attention_factor(factor: float, scaling: Mapping[str, Any]) -> float:
    def grown(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    if scaling.get("attention_factor") is not None:
        return float(scaling["attention_factor"])
    weight, every = scaling.get("mscale"), scaling.get("mscale_all_dim")
    return grown(weight) / grown(every) if weight and every else grown(1)


def _longrope(rope: Rope, a: Architecture, exponents: Tensor) -> tuple[Tensor, float]:
    """LongRoPE (Ding et al. 2024, arXiv:2402.13753): a factor a dimension, of two sets.

    Which set is chosen once for a model, by the longest document that it is to compute: chosen by a row's longest, a document
    would depend on its company.
    """
    scaling = rope.scaling
    original = scaling.get("original_max_position_embeddings") or a.max_position_embeddings
    chosen = "long_factor" if (a.longest or a.max_position_embeddings) > original else "short_factor"
    inverse = 1.0 / (torch.tensor(scaling[chosen], dtype=torch.float32) * rope.theta**exponents)
    factor = scaling.get("factor") or a.max_position_embeddings / original
    if scaling.get("attention_factor") is not None:
        return inverse, float(scaling["attention_factor"])
    return inverse, 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
