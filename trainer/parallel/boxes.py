"""Boxes of a tensor: what of it lies where, however many dimensions divide it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise

from torch import Tensor

Box = tuple[tuple[int, int], ...]
"""(first index, the one behind the last) in each dimension of a tensor; a scalar counts as a vector of one element."""


def box_of(shape: Sequence[int]) -> Box:
    """The box that is all of a tensor."""
    return tuple((0, size) for size in shape) or ((0, 1),)


def volume(box: Sequence[tuple[int, int]]) -> int:
    """Elements of a box."""
    return math.prod(last - first for first, last in box)


def intersection(a: Box, b: Box) -> Box | None:
    """What two boxes of a tensor have in common; None for nothing."""
    both = tuple((max(x[0], y[0]), min(x[1], y[1])) for x, y in zip(a, b, strict=True))
    return both if all(first < last for first, last in both) else None


def boxes_of(box: Sequence[tuple[int, int]], start: int, stop: int) -> Iterator[Box]:
    """The elements ``start`` .. ``stop`` of a flattened box as boxes that follow each other.

    Of n dimensions they are 2 n - 1 at most: a part of the first row, whole rows, a part of the last row.
    """
    (top, _), *inner = box
    row = volume(inner)
    cuts = {start, min(-(-start // row) * row, stop), max(stop // row * row, start), stop}
    for first, last in pairwise(sorted(cuts)):
        number, at = divmod(first, row)
        if at == 0 and last % row == 0:
            yield ((top + number, top + last // row), *inner)
        else:
            of_row = boxes_of(inner, at, at + last - first)
            yield from (((top + number, top + number + 1), *rest) for rest in of_row)


def part_of(flat: Tensor, box: Box, part: Box) -> Tensor:
    """A view of the elements ``part`` of a box whose elements are ``flat`` ``(volume,)``."""
    shaped = flat.view([last - first for first, last in box])
    return shaped[tuple(slice(p[0] - b[0], p[1] - b[0]) for b, p in zip(box, part, strict=True))]
