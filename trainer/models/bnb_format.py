"""Weights as bitsandbytes stores them (0.39 to 0.50), made numbers: its files hold the tables, so nothing of it is needed."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

Triple = tuple[Tensor, Tensor, Tensor]
"""A weight as `nf4.pack` gives it: codes, maxima of blocks, and the numbers of the second quantisation as bytes."""
CODES, MAXIMA, TABLE = "weight", "weight.absmax", "weight.quant_map"
NESTED_MAXIMA, NESTED_TABLE = "weight.nested_absmax", "weight.nested_quant_map"
PARTS = (CODES, MAXIMA, TABLE, NESTED_MAXIMA, NESTED_TABLE)
STATE = "weight.quant_state.bitsandbytes__"
"""The JSON of a four-bit weight, as bytes; behind it stands the kind of numbers, nf4 or fp4."""
BLOCK, NESTED_BLOCK = 64, 256
"""Weights that share a maximum, and maxima that share one: what QLoRA packs with."""
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
"""What the sixteen codes mean (arXiv:2305.14314, appendix E)."""
INT8 = 127
"""The code of the largest value of a row."""


def read_state(raw: Tensor) -> dict[str, Any]:
    """What is recorded of a four-bit weight: shape, block sizes, kind.

    Raises:
        ValueError: if it is no such record.
    """
    state = json.loads(bytes(raw.numpy()))
    shape, blocks = state.get("shape"), [state.get("blocksize"), state.get("nested_blocksize", NESTED_BLOCK)]
    if not isinstance(shape, list) or not all(type(n) is int and n > 0 for n in [*shape, *blocks]):
        raise ValueError(f"its shape {shape} and block sizes {blocks} are no positive integers")
    return dict(state)


def shape_of(raw: Tensor) -> tuple[int, ...]:
    """The shape of a four-bit weight, by its record."""
    return tuple(read_state(raw)["shape"])


def four_bit(parts: Mapping[str, Tensor]) -> Tensor:
    """A weight of blocks of four-bit codes (Dettmers et al. 2023, arXiv:2305.14314, 3), float32.

    It is ``table[code] * maximum``, the maxima themselves eight-bit codes where they are quantised once more.

    Raises:
        ValueError: if the parts do not fit each other.
    """
    state = read_state(_record(parts))
    shape, table = state["shape"], parts[TABLE].float()
    # Bytes, whatever they are stored as: FSDP wants them in the format of the other weights.
    codes, count = parts[CODES].contiguous().view(torch.uint8).flatten(), math.prod(shape)
    byte = torch.arange(256)
    pairs = table[torch.stack([byte >> 4, byte & 15], 1)]
    maxima = parts[MAXIMA]
    if NESTED_MAXIMA in parts:
        values = parts[NESTED_TABLE].float()[maxima.int()]
        maxima = _scaled(values, parts[NESTED_MAXIMA].float(), state["nested_blocksize"]) + state["nested_offset"]
    if codes.numel() != (count + 1) // 2 or maxima.numel() != -(-count // state["blocksize"]):
        raise ValueError(f"{codes.numel()} bytes and {maxima.numel()} maxima are not those of {count} weights")
    return _scaled(pairs[codes.int()].flatten()[:count], maxima.float(), state["blocksize"]).view(shape)


def eight_bit(parts: Mapping[str, Tensor]) -> Tensor:
    """A weight of rows of eight-bit codes (Dettmers et al. 2022, arXiv:2208.07339), float32.

    Raises:
        ValueError: if they are laid out for a GPU's tensor cores, as earlier releases did.
    """
    if "weight_format" in parts and (kind := int(parts["weight_format"])) != 0:
        raise ValueError(f"its weight_format is {kind}, and only rows (0) are read")
    return parts["weight"].float() * parts["SCB"].float()[:, None] * (1 / INT8)


def as_packed(parts: Mapping[str, Tensor]) -> Triple | None:
    """Codes, maxima and numbers of a four-bit weight as `nf4.pack` would give them; None where its settings are others."""
    state = read_state(_record(parts))
    ours = {"quant_type": "nf4", "blocksize": BLOCK, "nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32"}
    if NESTED_MAXIMA not in parts or any(state.get(key) != value for key, value in ours.items()):
        return None
    if not torch.equal(parts[TABLE].float(), torch.tensor(NF4)):
        return None
    offset = torch.tensor([state["nested_offset"]], dtype=torch.float32)
    numbers = torch.cat([parts[NESTED_MAXIMA].float(), offset]).view(torch.uint8)
    return parts[CODES].contiguous().view(torch.uint8).flatten(), parts[MAXIMA], numbers


def part_of(packed: Triple, first: int, last: int) -> Triple | None:
    """The weights from ``first`` up to ``last`` of a packed one, counted row by row; None where ``first`` begins no block."""
    if first % (BLOCK * NESTED_BLOCK):
        return None
    codes, maxima, numbers = packed
    floats = numbers.view(torch.float32)
    blocks = slice(first // BLOCK, -(-last // BLOCK))
    nested = floats[:-1][first // (BLOCK * NESTED_BLOCK) : -(-last // (BLOCK * NESTED_BLOCK))]
    own = torch.cat([nested, floats[-1:]]).view(torch.uint8)
    return codes[first // 2 : (last + 1) // 2], maxima[blocks], own


def stored_parts(packed: Triple, levels: Tensor, shape: Sequence[int], dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of a weight that `nf4.pack` packed, by ending.

    ``levels``: what the 256 codes of maxima mean. ``dtype``: what the weight is unpacked to where nothing else is asked for.
    """
    codes, maxima, numbers = packed
    floats = numbers.view(torch.float32)
    state = {
        "quant_type": "nf4", "blocksize": BLOCK, "dtype": str(dtype).removeprefix("torch."), "shape": list(shape),
        "nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32", "nested_offset": floats[-1].item(),
    }  # fmt: skip
    record = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    return {
        CODES: codes.view(-1, 1), MAXIMA: maxima, TABLE: torch.tensor(NF4), NESTED_MAXIMA: floats[:-1], NESTED_TABLE: levels,
        f"{STATE}nf4": record,
    }  # fmt: skip


def _record(parts: Mapping[str, Tensor]) -> Tensor:
    return next(tensor for name, tensor in parts.items() if name.startswith(STATE))


def _scaled(values: Tensor, maxima: Tensor, block: int) -> Tensor:
    """Each value times the maximum of its block; the last block may be shorter."""
    full = values.numel() // block * block
    out = (values[:full].view(-1, block) * maxima[: full // block, None]).flatten()
    return torch.cat([out, values[full:] * maxima[-1]]) if full < values.numel() else out
