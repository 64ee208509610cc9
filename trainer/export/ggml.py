"""Numbers in llama.cpp's formats: by its own code where xllamacpp is installed, else by the package gguf."""

from __future__ import annotations

import ctypes
import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trainer.config import InputError

HALF_MOST = 65504.0
"""The largest number in float16."""


@dataclass(frozen=True)
class GgufFormat:
    """How the matrices of a file are stored.

    ``kind``: llama.cpp's name of the numbers. ``file_type``: its name of such files. ``head``: the numbers of the matrix that
    makes logits. ``ggml``: whether only llama.cpp's own code makes them.
    """

    kind: str
    file_type: str
    head: str
    ggml: bool = False


GGUF_FORMATS = {
    "f16": GgufFormat("F16", "MOSTLY_F16", "F16"),
    "bf16": GgufFormat("BF16", "MOSTLY_BF16", "BF16"),
    "q8_0": GgufFormat("Q8_0", "MOSTLY_Q8_0", "Q8_0"),
    "q4_0": GgufFormat("Q4_0", "MOSTLY_Q4_0", "Q8_0"),
    "q5_1": GgufFormat("Q5_1", "MOSTLY_Q5_1", "Q5_1"),
    "q4_k": GgufFormat("Q4_K", "MOSTLY_Q4_K_S", "Q6_K", ggml=True),
    "q6_k": GgufFormat("Q6_K", "MOSTLY_Q6_K", "Q6_K", ggml=True),
}
"""By what a format is called here. Four bits are too few for logits: llama-quantize gives their matrix more, too."""
NARROWER = {"Q4_K": "Q5_0", "Q6_K": "Q8_0"}
"""Of a row that blocks of 256 do not divide: numbers in blocks of 32, as llama-quantize has it; then float16."""


def fitting(kind: str, width: int) -> str:
    """The kind of numbers for rows of ``width``: ``kind``, or the next one whose blocks divide it."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    while width % GGML_QUANT_SIZES[GGMLQuantizationType[kind]][0]:
        kind = NARROWER.get(kind, "F16")
    return kind


def stored_bytes(kind: str, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor of such numbers."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    block, size = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    return math.prod(shape) // int(block) * int(size)


def quantised(name: str, values: Tensor, kind: str) -> np.ndarray[Any, Any]:
    """A tensor in numbers of ``kind``, as the bytes of a file.

    Raises:
        InputError: if float16 cannot hold one of its numbers; ``name`` is the tensor's.
    """
    if kind == "F16" and values.numel() and float(values.abs().max()) > HALF_MOST:
        raise InputError(f"{name} has numbers above {HALF_MOST:g}, the largest of float16; use the format gguf-bf16")
    if kind in ("F32", "F16", "BF16"):
        dtype = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[kind]
        return values.to(dtype).contiguous().view(torch.uint8).numpy()
    from gguf import GGMLQuantizationType, quants

    wide = np.ascontiguousarray(values.float().numpy())
    if (chunk := ggml_chunk()) is None and kind in NARROWER:
        raise InputError(f"{kind} needs llama.cpp's own code, which xllamacpp hides here; reinstall 'onecurve[gguf]'")
    if chunk is None:
        return np.asarray(quants.quantize(wide, GGMLQuantizationType[kind]))
    out = np.empty(stored_bytes(kind, wide.shape), np.uint8)
    rows, width = wide.size // wide.shape[-1], wide.shape[-1]
    written = chunk(int(GGMLQuantizationType[kind]), wide.ctypes.data, out.ctypes.data, 0, rows, width, None)
    assert written == out.nbytes, f"ggml wrote {written} bytes for {name}, not {out.nbytes}"
    return out


@cache
def ggml_chunk() -> Callable[..., int] | None:
    """llama.cpp's function that quantises rows, out of xllamacpp's library; None where it is not installed."""
    spec = importlib.util.find_spec("xllamacpp")
    folders = list(spec.submodule_search_locations or ()) if spec is not None else []
    libraries = sorted(library for folder in folders for library in Path(folder).glob("xllamacpp*.so"))
    if not libraries:
        return None
    try:
        chunk = ctypes.CDLL(str(libraries[0])).ggml_quantize_chunk
    except (OSError, AttributeError):  # it cannot be loaded here, or hides the function
        return None
    chunk.restype = ctypes.c_size_t
    chunk.argtypes = [ctypes.c_int, *[ctypes.c_void_p] * 2, *[ctypes.c_int64] * 3, ctypes.c_void_p]
    return chunk
