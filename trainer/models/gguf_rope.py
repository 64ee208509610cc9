"""Rotary positions as the metadata of a GGUF file, and what llama.cpp computes of such metadata as a rotation."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from trainer.models.architecture import Architecture, Rope
from trainer.models.gguf_architectures import GgufArchitecture
from trainer.models.rope import frequencies, turned_size

Metadata = Mapping[str, Any]
"""Values by key, without what an architecture's keys begin with; tables of positions by the names of their tensors."""
FREQUENCIES, LONG, SHORT = "rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"
TABLES = (FREQUENCIES, LONG, SHORT)
"""Tensors that say how positions turn."""
LLAMA_3_1 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
CLOSE = 1e-5
"""Relative difference of two numbers of which one was stored in float32 and computed with there."""


def rounded(value: Any) -> Any:
    """The number that was meant: a file holds the float32 next to it (1e-5), and seven digits give it back."""
    return float(f"{value:.7g}") if isinstance(value, float) else value


def same_number(one: Any, two: Any) -> bool:
    """Whether two features are equal, numbers to what float32 holds of them."""
    if isinstance(one, float) and isinstance(two, float | int):
        return math.isclose(one, two, rel_tol=CLOSE)
    return bool(one == two)


def read_rope(row: GgufArchitecture, metadata: Metadata, size: int, stated: Sequence[Rope]) -> Rope:
    """The rotation of layers without a window, of heads of ``size``; ``stated``: what it may be of those that fit.

    Raises:
        ValueError: if it cannot be computed.
    """
    turned = metadata.get("rope.dimension_count", size) if row.partial else size
    rope = Rope(float(rounded(metadata.get("rope.freq_base", 10000.0))), turned / size)
    return dataclasses.replace(rope, scaling=_scaling(row, metadata, rope, turned, stated))


def _scaling(
    row: GgufArchitecture, metadata: Metadata, rope: Rope, turned: int, stated: Sequence[Rope]
) -> dict[str, Any]:
    kind = metadata.get("rope.scaling.type", "none")
    factor = rounded(metadata.get("rope.scaling.attn_factor", 1.0))
    original = metadata.get("rope.scaling.original_context_length", metadata["context_length"])
    if LONG in metadata and "longrope" in row.scaling:
        return {
            "rope_type": "longrope", "long_factor": list(metadata[LONG]), "short_factor": list(metadata[SHORT]),
            "original_max_position_embeddings": original, "attention_factor": factor,
            "factor": metadata["context_length"] / original,
        }  # fmt: skip
    if FREQUENCIES in metadata and "llama3" in row.scaling:
        return _llama3(metadata[FREQUENCIES], rope, turned, stated)
    if kind in ("none", None):
        return {}
    if kind not in row.scaling:
        raise ValueError(f"rope.scaling.type={kind} is not supported; {', '.join(row.scaling)} are")
    scaling: dict[str, Any] = {"rope_type": kind, "factor": rounded(metadata["rope.scaling.factor"])}
    if kind == "linear":
        return scaling
    scaling["original_max_position_embeddings"] = original
    scaling |= {
        key: rounded(metadata[f"rope.scaling.yarn_{key}"])
        for key in ("beta_fast", "beta_slow")
        if f"rope.scaling.yarn_{key}" in metadata
    }
    if abs(factor - 1.0) > CLOSE:
        scaling["attention_factor"] = factor * (0.1 * math.log(scaling["factor"]) + 1.0)
    if beta := metadata.get("attention.temperature_scale"):
        scaling["llama_4_scaling_beta"] = rounded(beta)
    return scaling


def _llama3(stretched: Sequence[float], rope: Rope, turned: int, stated: Sequence[Rope]) -> dict[str, Any]:
    """The parameters that stretch the rotation so, among those that are stated and those of Llama 3.1.

    Raises:
        ValueError: if neither do.
    """
    usual = {"rope_type": "llama3", "factor": float(max(stretched)), **LLAMA_3_1}
    for scaling in [*(each.scaling for each in stated), usual]:
        if scaling.get("rope_type") == "llama3" and _close(_stretch(rope.theta, turned, scaling), stretched):
            return dict(scaling)
    raise ValueError(f"{FREQUENCIES} stretches the rotation otherwise than Llama 3.1 does, which is not supported")


def _stretch(theta: float, turned: int, scaling: Mapping[str, Any]) -> list[float]:
    """By how much Llama 3.1's scaling divides each frequency."""
    inverse = [theta ** (-n / turned) for n in range(0, turned, 2)]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = [scaling["original_max_position_embeddings"] * each / (2 * math.pi) for each in inverse]
    smooth = [min(max((each - low) / (high - low), 0.0), 1.0) for each in turns]
    return [1 / ((1 - each) / scaling["factor"] + each) for each in smooth]


def written_ropes(row: GgufArchitecture, a: Architecture) -> dict[str, Any]:
    """The metadata of an architecture's rotations, as far as llama.cpp has words for them."""
    turning = [layer for layer in a.layers if layer.rope is not None]
    if not turning:
        return {"rope.scaling.finetuned": False}
    rope = next((layer.rope for layer in turning if layer.window is None), turning[0].rope)
    assert rope is not None
    size, scaling = turned_size(rope, a), rope.scaling
    kind, theta = scaling.get("rope_type", "default"), rope.theta
    if kind == "dynamic" and scaling.get("alpha"):
        theta *= scaling["alpha"] ** (size / (size - 2))
    metadata: dict[str, Any] = {"rope.dimension_count": size, "rope.freq_base": float(theta)}
    local = next((layer.rope for layer in turning if layer.window is not None), None) or rope
    if local.theta != row.local(rope, None).theta:
        metadata["rope.freq_base_swa"] = float(local.theta)
    if kind not in row.scaling:
        return metadata
    if kind == "llama3":
        return {**metadata, FREQUENCIES: _stretch(rope.theta, size, scaling)}
    factor = frequencies(rope, a)[1]
    original = scaling.get("original_max_position_embeddings", a.max_position_embeddings)
    if kind == "longrope":
        return {
            **metadata, LONG: scaling["long_factor"], SHORT: scaling["short_factor"],
            "rope.scaling.original_context_length": original, "rope.scaling.attn_factor": factor,
        }  # fmt: skip
    metadata |= {"rope.scaling.type": kind, "rope.scaling.factor": float(scaling["factor"])}
    if kind == "linear":
        return metadata
    metadata["rope.scaling.original_context_length"] = original
    # llama.cpp has the usual factor of its own, which this multiplies.
    metadata["rope.scaling.attn_factor"] = factor / (0.1 * math.log(scaling["factor"]) + 1.0)
    for key in ("beta_fast", "beta_slow"):
        if scaling.get(key):
            metadata[f"rope.scaling.yarn_{key}"] = float(scaling[key])
    if "growth" in row.scaling and scaling.get("llama_4_scaling_beta"):
        metadata["attention.temperature_scale"] = float(scaling["llama_4_scaling_beta"])
    return metadata


def same_rope(one: Rope | None, a: Architecture, two: Rope | None, b: Architecture) -> bool:
    """Whether a rotation of one model turns by the same angles as another one's."""
    if one is None or two is None:
        return one is two
    growths = [rope.scaling.get("llama_4_scaling_beta") or 0.0 for rope in (one, two)]
    tables = [[rope.scaling.get(key) for key in ("long_factor", "short_factor")] for rope in (one, two)]
    (first, factor), (second, other) = frequencies(_rounded_ramp(one), a), frequencies(_rounded_ramp(two), b)
    same = first.shape == second.shape and torch.allclose(first, second, rtol=CLOSE, atol=0.0)
    return same and same_number(factor, other) and same_number(*growths) and all(
        x is y is None or (x is not None and y is not None and _close(x, y)) for x, y in zip(*tables, strict=True)
    )  # fmt: skip


def _rounded_ramp(rope: Rope) -> Rope:
    """As llama.cpp computes yarn: the dimensions between which it goes over from one frequency to the other are whole."""
    return dataclasses.replace(rope, scaling={**rope.scaling, "truncate": True}) if rope.scaling else rope


def _close(one: Sequence[float], two: Sequence[float]) -> bool:
    return len(one) == len(two) and all(
        math.isclose(float(x), float(y), rel_tol=CLOSE) for x, y in zip(one, two, strict=True)
    )
