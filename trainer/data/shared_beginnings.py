"""Samples of one conversation, each laid down from where it leaves the one before."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from trainer.data.rows import Encoded


def branched(samples: Sequence[Encoded], length: int) -> Iterator[Encoded]:
    """``samples`` of a conversation, the last one first, without the beginnings that are computed with the one before.

    The last sample has all turns as later ones remember them, and learns those that were generated so: what it shares with
    an earlier sample is learnt with it. Where the earlier one does learn something of that, it shares what is before only.
    Samples that share stay together in a row of ``length`` positions, in half of one where they can: groups of more would
    leave much of each row empty. Where there is no room left, a sample is laid down in full.
    """
    before, room = None, 0
    for sample in reversed(samples):
        inputs = len(sample.ids) - 1
        shared = 0 if before is None else _shared(before, sample)
        if not shared or inputs - shared > room:
            shared, room = 0, length // 2 if inputs <= length // 2 else length
        room -= inputs - shared
        trained = None if sample.trained is None else sample.trained[shared:]
        yield Encoded(sample.ids[shared:], trained, sample.cut, shared)
        before = sample


def _shared(before: Encoded, sample: Encoded) -> int:
    """How many inputs of ``before`` serve ``sample`` as well, which learns none of their targets and has one of its own."""
    learnt = [True] * len(sample.ids) if sample.trained is None else sample.trained
    common = min(common_length(before.ids, sample.ids), len(before.ids) - 1, len(sample.ids) - 2)
    return next((n for n in range(common) if learnt[n + 1]), common)


def common_length(first: Sequence[object], second: Sequence[object]) -> int:
    """How many items two sequences begin with alike."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((n for n, (a, b) in pairs if a != b), min(len(first), len(second)))
