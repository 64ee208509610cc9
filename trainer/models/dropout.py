"""Dropout whose draws belong to rows of the data: the same on every rank, after a resume, and when computed again."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn import functional as F

from trainer.parallel.mesh import UNDIVIDED, Axis

Part = tuple[tuple[int, int], tuple[int, int]]
Draws = tuple[tuple[str, ...], tuple[int, ...] | None, Tensor | None, Part | None]
"""Rows that are drawn for, the tokens of each, those of them that the last block computes, and those that are here."""
_rows: tuple[str, ...] = ("",)
_tokens: tuple[int, ...] | None = None
_places: Tensor | None = None
_part: Part | None = None


def draw_for(key: Sequence[int], rows: Sequence[int], tokens: tuple[int, ...] | None = None) -> None:
    """Draw for these rows of the data until the next call.

    ``key``: what else it depends on (seed, step).
    ``tokens``: how many tokens each has, where they lie end to end in a single row; None where all have as many.
    """
    global _rows, _tokens, _places, _part
    _rows = tuple(":".join(map(str, (*key, row))) for row in rows)
    _tokens, _places, _part = tokens, None, None


def narrow_to(places: Tensor | None) -> None:
    """Until the next call or draw: which tokens ``(n,)`` of a single row the last block computes alone; None = all."""
    global _places
    _places = places


def divide(shape: tuple[int, int], span: tuple[int, int]) -> None:
    """Until the next draw: of micro-batches ``(B, T)`` this rank has the tokens ``span``, counted along all of them.

    Those behind the last one belong to nothing.
    """
    global _part
    _part = shape, span


def current() -> Draws:
    """What is drawn for now."""
    return _rows, _tokens, _places, _part


@contextmanager
def again(draws: Draws) -> Iterator[None]:
    """For a while, draw what was drawn when they were `current`."""
    global _rows, _tokens, _places, _part
    before, (_rows, _tokens, _places, _part) = current(), draws
    try:
        yield
    finally:
        _rows, _tokens, _places, _part = before


@torch.compiler.disable  # type: ignore[untyped-decorator]
def dropout(x: Tensor, part: float, place: str, columns: Axis = UNDIVIDED) -> Tensor:
    """Zero a ``part`` of ``x``, the rest scaled up (Srivastava et al. 2014).

    ``x`` ``(B, T, d)``, or all rows end to end, ``(1, T, d)`` or ``(T, d)``, of which the last block may have a few only; or
    this rank's part of either, ``(1, n, d)`` or ``(n, d)``.
    ``place``: where in the model. ``columns``: ranks that each have an equal part of the last dimension: what is drawn is
    drawn for all of it.

    Raises:
        ValueError: if the tokens of a single row are not those that `draw_for` was told of.
    """
    if x.dim() == 2:
        return dropout(x[None], part, place, columns)[0]  # type: ignore[no-any-return]
    rows = x.shape[:2] if _part is None else _part[0]
    narrowed = _tokens is not None and rows[1] != sum(_tokens)
    if narrowed and (_places is None or rows[1] != len(_places)):
        raise ValueError(f"dropout at {place} has {rows[1]} tokens of rows with {_tokens}, and nothing says which")
    rows, width = rows if _tokens is None else (1, sum(_tokens)), x.shape[-1] * columns.size
    keep = torch.empty((*rows, width), dtype=x.dtype, device=x.device)
    for number, mask in enumerate(_row_by_row(keep)):
        turn, row = divmod(number, len(_rows))
        digest = hashlib.blake2b(f"{_rows[row]}:{turn}:{place}".encode(), digest_size=7).digest()
        generator = torch.Generator(x.device).manual_seed(int.from_bytes(digest, "big"))
        mask.bernoulli_(1 - part, generator=generator)
    if narrowed:
        assert _places is not None
        keep = keep.index_select(1, _places)
    if _part is not None:
        first, last = _part[1]
        keep = keep.flatten(0, 1)[None, first:last]
        keep = F.pad(keep, (0, 0, 0, x.shape[1] - keep.shape[1]))
    if columns.size > 1:
        first, last = columns.span(width)
        keep = keep[..., first:last]
    return x * keep / (1 - part)


def _row_by_row(keep: Tensor) -> Sequence[Tensor]:
    """Views of what belongs to each row of the data."""
    if _tokens is not None:
        return torch.split(keep[0], list(_tokens))
    end_to_end = len(keep) == 1 and keep.shape[1] % len(_rows) == 0
    return (keep.view(len(_rows), -1, *keep.shape[2:]) if end_to_end else keep).unbind()
