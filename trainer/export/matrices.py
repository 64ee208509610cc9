"""Which of a folder's tensors the quantised formats make integers of."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from trainer.models.architecture import Architecture
from trainer.models.stored import StoredWeights
from trainer.models.transformer import Transformer


@dataclass(frozen=True)
class Matrix:
    """The weight of one linear layer of a block, or of several that its family stores as one.

    ``name``: of the folder's tensor. ``ours``: the parameters that are made of it; all of them multiply the same input.
    """

    name: str
    ours: tuple[str, ...]


def linear_widths(a: Architecture) -> dict[str, int]:
    """Inputs of every linear layer of the blocks, by its weight; embedding, head, norms, routers and experts are none."""
    with torch.device("meta"):
        blocks = Transformer(a).model.layers
    modules = blocks.named_modules(prefix="model.layers")
    return {f"{name}.weight": module.in_features for name, module in modules if isinstance(module, nn.Linear)}


def matrices_of(stored: StoredWeights) -> list[Matrix]:
    """The weights of the linear layers as a folder has them, block by block."""
    ours: dict[str, list[str]] = {}
    for name in linear_widths(stored.architecture):
        [theirs] = stored.family.source(name, stored.architecture, stored.files.files).names
        ours.setdefault(theirs, []).append(name)
    return [Matrix(name, tuple(parts)) for name, parts in ours.items()]
