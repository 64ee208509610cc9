"""Documents into rows: best fit, whole documents wherever they fit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

WINDOW = 1 << 20
"""Segments that are packed together: bounds memory, and hardly costs space."""


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Put segments of at most ``capacity`` tokens into as few rows as best-fit-decreasing finds.

    Longest first, each into the fullest row that still has room (Ding et al. 2024, arXiv:2404.10830). Returns the segments'
    numbers, row by row. Deterministic; O(N log N) for N segments.
    """
    order = np.argsort(-np.asarray(lengths, dtype=np.int64), kind="stable")
    rows: list[list[int]] = []
    by_room: list[list[int]] = [[] for _ in range(capacity + 1)]
    # Bit r says that some row has r tokens of room: the fullest row that fits is the lowest bit at or above the length.
    available = 0
    for segment in order.tolist():
        length = lengths[segment]
        fitting = available >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            row = by_room[room].pop()
            if not by_room[room]:
                available &= ~(1 << room)
        else:
            room, row = capacity, len(rows)
            rows.append([])
        rows[row].append(segment)
        left = room - length
        if left:
            by_room[left].append(row)
            available |= 1 << left
    return rows


def segments_of(offsets: NDArray[np.int64], capacity: int) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
    """Cut documents into segments of at most ``capacity`` (input, target) positions.

    ``offsets`` ``(N + 1,)``: where documents of ids begin in the token file. A document of n ids has n - 1 targets, each in
    exactly one segment. Returns each segment's first input and its length.
    """
    targets = np.maximum(np.diff(offsets) - 1, 0)
    counts = -(-targets // capacity)
    document = np.repeat(np.arange(len(targets)), counts)
    number = np.arange(len(document)) - np.repeat(np.cumsum(counts) - counts, counts)
    starts = offsets[:-1][document] + number * capacity
    lengths = np.minimum(capacity, targets[document] - number * capacity)
    return starts.astype(np.int64), lengths.astype(np.int32)


def pack_groups(lengths: NDArray[np.int32], begins: NDArray[np.bool_], capacity: int) -> Iterator[list[int]]:
    """As `pack`, with segments that stay together in a row, in their order: a group from each that ``begins`` one on."""
    first = np.flatnonzero(begins)
    ends = [*first[1:].tolist(), len(lengths)]
    for row in pack(np.add.reduceat(lengths, first), capacity):
        yield [segment for group in row for segment in range(int(first[group]), ends[group])]


def pack(lengths: NDArray[np.int32], capacity: int) -> Iterator[list[int]]:
    """Rows of segment numbers, window by window."""
    for first in range(0, len(lengths), WINDOW):
        for row in best_fit(lengths[first : first + WINDOW].tolist(), capacity):
            yield [first + segment for segment in row]
