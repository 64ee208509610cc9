"""Folders in bitsandbytes' four-bit layout, NF4 in blocks of 64 with double quantisation (arXiv:2305.14314): QLoRA's base."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainer.export.matrices import matrices_of
from trainer.export.rounded_folder import plain_names, write_rounded
from trainer.models import bnb_format, nf4
from trainer.models.architecture import Architecture
from trainer.models.header import read_shape
from trainer.models.sizes import linear_widths
from trainer.models.stored import StoredWeights

SETTINGS = {
    "quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False, "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": "bfloat16", "bnb_4bit_quant_storage": "uint8",
}  # fmt: skip
"""The ``quantization_config`` of such a folder."""


def nf4_problems(architecture: Architecture, _: Any) -> Iterator[str]:
    """Why a model cannot be written so, a clause each."""
    if architecture.experts:
        yield "bitsandbytes packs linear layers, and experts are none; use a GGUF format"


def write_nf4(source: Path, out: Path, calibration: Sequence[list[int]] = ()) -> list[str]:
    """Write the linear layers of a folder's blocks in NF4, tensor by tensor; gives what is to be said about it.

    Embedding, head, norms and biases are not quantised; those of float32 become bfloat16. ``calibration`` has no effect.
    """
    stored = StoredWeights(source, read_shape(source))
    packed, names, narrowed = {m.name for m in matrices_of(stored)}, plain_names(stored), list[str]()
    matrices = [name for name in names if name not in packed and len(stored.files.shape(name)) > 1]
    skipped = [name.removesuffix(".weight") for name in matrices if not name.endswith("embed_tokens.weight")]
    settings = {**SETTINGS, "llm_int8_skip_modules": skipped or ["lm_head"]}
    write_rounded(stored, out, _tensors(stored, names, packed, narrowed), settings)
    return [*_remarks(stored.architecture, len(narrowed))]


def _tensors(
    stored: StoredWeights, names: Sequence[str], packed: Collection[str], narrowed: list[str]
) -> Iterator[tuple[str, Tensor]]:
    """All tensors of the new folder; the names of those that lose digits are added to ``narrowed``."""
    for name in names:
        tensor = stored.files.tensor(name)
        dtype = tensor.dtype if tensor.dtype is torch.float16 else torch.bfloat16
        if name in packed:
            parts = bnb_format.stored_parts(nf4.pack(tensor), nf4.levels(tensor.device), tuple(tensor.shape), dtype)
            yield from ((name.removesuffix("weight") + ending, part) for ending, part in parts.items())
        else:
            narrowed.extend([name] * (tensor.dtype is torch.float32))
            yield name, tensor.to(dtype) if tensor.is_floating_point() else tensor


def _remarks(architecture: Architecture, narrowed: int) -> Iterator[str]:
    if narrowed:
        yield f"{narrowed} tensors that are not quantised are in bfloat16, not float32 any more"
    widths = linear_widths(architecture)
    if odd := [name for name, width in widths.items() if width % bnb_format.BLOCK]:
        yield (
            f"bitsandbytes 0.50 reads rows that {bnb_format.BLOCK} does not divide ({widths[odd[0]]} of {odd[0]}) as other "
            "numbers on a CPU; on a GPU, and here, they are those that were written"
        )
