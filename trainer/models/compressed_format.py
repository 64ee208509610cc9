"""Matrices of 4- and 8-bit integers as compressed-tensors stores them, which transformers and vLLM read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from trainer.models.int_grid import dequantise

PACKED, PLAIN = "pack-quantized", "int-quantized"
"""Several integers in a word of 32 bits; or each in a byte of its own."""
WIDTHS = (4, 8)
"""Bits of an integer that divide a byte."""


def pack(codes: Tensor, bits: int) -> Tensor:
    """Signed ``codes`` ``(o, i)`` as int32 words ``(o, i * bits / 32)``: ``code + 2 ** (bits - 1)``, the first one lowest."""
    unsigned = (codes.to(torch.int16) + 2 ** (bits - 1)).to(torch.uint8)
    if bits == 4:
        unsigned = unsigned[:, ::2] | unsigned[:, 1::2] << 4
    words: Tensor = unsigned.contiguous().view(torch.int32)
    return words


def unpack(words: Tensor, bits: int, inputs: int) -> Tensor:
    """What `pack` was given, as int8; ``inputs``: columns, behind which a row's last word is padded."""
    unsigned = words.contiguous().view(torch.uint8)
    if bits == 4:
        unsigned = torch.stack([unsigned & 15, unsigned >> 4], -1).flatten(1)
    codes: Tensor = (unsigned[:, :inputs].to(torch.int16) - 2 ** (bits - 1)).to(torch.int8)
    return codes


def settings_of(bits: int, group: int, plain: str) -> dict[str, Any]:
    """The ``quantization_config`` of a model whose linear layers are quantised, all but the one that is named ``plain``.

    ``group``: inputs that share a scale; only weights are quantised. 0: a scale a row, and a token's activations are
    quantised too, by their own largest value, when the model runs (W8A8).
    """
    weights = {
        "num_bits": bits, "type": "int", "symmetric": True, "strategy": "group" if group else "channel",
        "group_size": group or None, "dynamic": False, "actorder": None, "block_structure": None, "observer": "minmax",
        "observer_kwargs": {},
    }  # fmt: skip
    by_token = {**weights, "strategy": "token", "dynamic": True, "observer": None}
    scheme = {
        "targets": ["Linear"],
        "weights": weights,
        "input_activations": None if group else by_token,
        "output_activations": None,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": PACKED if group else PLAIN,
        "quantization_status": "compressed",
        "config_groups": {"group_0": scheme},
        "ignore": [plain],
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def unread(settings: Mapping[str, Any]) -> str | None:
    """What of a ``quantization_config`` is not read, in words; None where all is."""
    schemes = _schemes(settings)
    if not schemes:
        return "its config_groups name no weights"
    for scheme in schemes:
        weights = scheme["weights"]
        kind = scheme.get("format") or settings.get("format")
        if kind not in (PACKED, PLAIN):
            return f"format={kind}"
        if weights.get("type", "int") != "int" or weights.get("num_bits") not in WIDTHS:
            return f"{weights.get('type')} of {weights.get('num_bits')} bits"
        if not weights.get("symmetric", True):
            return "symmetric=false (zero points)"
        if weights.get("strategy") not in ("group", "channel", None):
            return f"strategy={weights['strategy']}"
        if weights.get("actorder") in ("group", "dynamic"):
            return f"actorder={weights['actorder']} (groups of inputs in another order)"
    if len({scheme["weights"]["num_bits"] for scheme in schemes}) > 1:
        return "config_groups of several widths"
    return None


def dequantised(tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Tensor:
    """The weight ``(o, i)`` that a linear layer's ``tensors`` stand for, float32: every code times its scale, exactly.

    ``tensors``: by what is behind the layer's name: ``weight_packed``, ``weight_scale``, ``weight_shape``; or ``weight``
    and ``weight_scale``. ``settings``: the model's ``quantization_config``.

    Raises:
        ValueError: if they do not fit each other.
    """
    scales = tensors["weight_scale"]
    if "weight_packed" in tensors:
        rows, inputs = tensors["weight_shape"].tolist()
        codes = unpack(tensors["weight_packed"], _schemes(settings)[0]["weights"]["num_bits"], inputs)
    else:
        codes = tensors["weight"]
        rows, inputs = codes.shape
    if codes.shape != (rows, inputs) or scales.ndim != 2 or len(scales) != rows or inputs % scales.shape[1]:
        raise ValueError(
            f"codes {tuple(codes.shape)} and scales {tuple(scales.shape)} are not those of {rows} x {inputs}"
        )
    return dequantise(codes, scales)


def _schemes(settings: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Those of ``config_groups`` that quantise weights."""
    groups = settings.get("config_groups")
    groups = groups.values() if isinstance(groups, Mapping) else ()
    return [scheme for scheme in groups if isinstance(scheme, Mapping) and isinstance(scheme.get("weights"), Mapping)]
