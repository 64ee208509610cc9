"""Rows that weigh unequally, so that micro-batches and ranks do."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from trainer.data.rows import Segment, collate

VOCABULARY = 101


def uneven_rows(step: int, numbers: Sequence[int], length: int, *, less: int, first: list[int]) -> Any:
    """Packed rows of a step by number: the first of documents of sizes ``first``, each next one ``less`` tokens shorter."""
    rows = []
    for number in numbers:
        draw = np.random.default_rng(100 * step + number)
        sizes = [length + 1 - less * number] if number else first
        rows.append([Segment(draw.integers(0, VOCABULARY, size).astype(np.int64)) for size in sizes])
    return collate(rows, numbers, length, 0)
