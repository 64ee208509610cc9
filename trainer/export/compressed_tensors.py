"""Folders of 4- or 8-bit integers in compressed-tensors' layout, which transformers and vLLM open.

The linear layers of blocks are integers times bfloat16 scales; embedding, head, norms and biases stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainer.export.gptq import calibrated
from trainer.export.matrices import Matrix, matrices_of
from trainer.export.rounded_folder import plain_names, write_rounded
from trainer.models.architecture import Architecture
from trainer.models.compressed_format import pack, settings_of
from trainer.models.header import read_shape
from trainer.models.int_grid import GROUPS, group_size, quantise
from trainer.models.sizes import linear_widths
from trainer.models.stored import StoredWeights

Rows = Sequence[Sequence[int]]
Rounded = Iterator[tuple[str, Tensor, Tensor]]
"""Name, codes ``(o, i)`` int8 and scales ``(o, groups)`` bfloat16 of every matrix."""


def int_problems(bits: int, architecture: Architecture, _: Any) -> Iterator[str]:
    """Why a model cannot be written in integers of ``bits``, a clause each."""
    if architecture.experts:
        yield "experts are not written in this layout; use a GGUF format"
    widths = linear_widths(architecture)
    if group_size(widths.values(), bits) is None:
        name, width = next((name, width) for name, width in widths.items() if width % GROUPS[-1])
        groups = " or ".join(map(str, GROUPS))
        yield f"a scale belongs to {groups} inputs, which do not divide the {width} of {name}; use int8, a scale a row"


def write_int(bits: int, method: str, source: Path, out: Path, calibration: Rows = ()) -> list[str]:
    """Write the Hugging Face folder ``source`` in integers as ``out``, tensor by tensor; gives what is to be said about it.

    Args:
        bits: 4: weights alone, a scale for every 64 inputs (32 where 64 do not divide all rows). 8: a scale a row, and
            activations are 8-bit integers, too, when the model runs (W8A8).
        method: One of `METHODS`: ``rtn`` rounds to the nearest; ``gptq`` makes up for what rounding changes.
        source: Of any family, without experts.
        out: The folder to write, which must not exist.
        calibration: Rows of token ids that ``gptq`` measures the layers' inputs on.

    Raises:
        InputError: of ``gptq`` without rows, or with rows of another tokenizer.
    """
    stored = StoredWeights(source, read_shape(source))
    a, matrices = stored.architecture, matrices_of(stored)
    group = group_size(linear_widths(a).values(), bits) or 0
    rounded = METHODS[method](stored, matrices, bits, group, calibration)
    settings = settings_of(bits, group, "score" if a.scores else "lm_head")
    write_rounded(stored, out, _tensors(stored, matrices, rounded, bits, group), settings)
    return list(_remarks(stored, matrices, group))


def _remarks(stored: StoredWeights, matrices: Sequence[Matrix], group: int) -> Iterator[str]:
    if group and group != GROUPS[0]:
        yield f"a scale for every {group} inputs, since {GROUPS[0]} do not divide all rows"
    if stored.files.tensor(matrices[0].name).dtype is torch.float32:
        yield "embedding, head and norms stay in float32, as they were; from a bf16 folder they take half the room"


def _nearest(stored: StoredWeights, matrices: Sequence[Matrix], bits: int, group: int, _: Rows) -> Rounded:
    for matrix in matrices:
        yield matrix.name, *quantise(stored.files.tensor(matrix.name), bits, group)


METHODS: dict[str, Callable[[StoredWeights, Sequence[Matrix], int, int, Rows], Rounded]] = {
    "rtn": _nearest,
    "gptq": calibrated,
}
"""Ways to round, by name."""


def _tensors(
    stored: StoredWeights, matrices: Sequence[Matrix], rounded: Rounded, bits: int, group: int
) -> Iterator[tuple[str, Tensor]]:
    """All tensors of the new folder."""
    quantised = {matrix.name for matrix in matrices}
    for name in plain_names(stored):
        if name not in quantised:
            yield name, stored.files.tensor(name)
    for name, codes, scales in rounded:
        yield f"{name}_scale", scales
        if group:
            yield f"{name}_packed", pack(codes, bits)
            yield f"{name}_shape", torch.tensor(codes.shape)
        else:
            yield name, codes
