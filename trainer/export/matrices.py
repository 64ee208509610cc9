"""Which of a folder's tensors the quantised formats make integers of."""

from __future__ import annotations

from dataclasses import dataclass

from trainer.models.sizes import linear_widths
from trainer.models.stored import StoredWeights


@dataclass(frozen=True)
class Matrix:
    """The weight of one linear layer of a block, or of several that its family stores as one.

    ``name``: of the folder's tensor. ``ours``: the parameters that are made of it; all of them multiply the same input.
    """

    name: str
    ours: tuple[str, ...]


def matrices_of(stored: StoredWeights) -> list[Matrix]:
    """The weights of the linear layers as a folder has them, block by block."""
    ours: dict[str, list[str]] = {}
    for name in linear_widths(stored.architecture):
        [theirs] = stored.family.source(name, stored.architecture, stored.files.files).names
        ours.setdefault(theirs, []).append(name)
    return [Matrix(name, tuple(parts)) for name, parts in ours.items()]
