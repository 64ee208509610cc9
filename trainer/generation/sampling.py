"""What the next token is drawn from, and how: a draw is a function of its key, never of the batch around it."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.config import InputError

TILE = 256
"""Tokens of the vocabulary that are summed together: a draw finds its tile first, then its token in the tile."""
PREFIX = 64
"""Likeliest tokens among which a nucleus is looked for first (CPU)."""


@dataclass(frozen=True)
class Sampling:
    """How completions are drawn. ``tokens``: the longest; ``temperature`` 0 takes the likeliest token.

    The filters apply in the order top-k, top-p (Holtzman et al. 2020, arXiv:1904.09751; of what top-k left), min-p (Nguyen
    et al. 2024, arXiv:2407.01082); 0, 1 and 0 switch them off. Tokens as likely as the last one that is kept are kept too.

    Raises:
        ValueError: if a value has no meaning.
    """

    tokens: int = 64
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        rules = {
            "tokens": (self.tokens >= 1, "at least 1"),
            "temperature": (0 <= self.temperature < math.inf, "0 (greedy) or more"),
            "top_k": (self.top_k >= 0, "0 (off) or more"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1 (off)"),
            "min_p": (0 <= self.min_p <= 1, "from 0 (off) to 1"),
        }
        if wrong := [
            f"{name}={getattr(self, name)} must be {rule}" for name, (good, rule) in rules.items() if not good
        ]:
            raise InputError("; ".join(wrong))

    @property
    def filters(self) -> bool:
        """Whether some tokens are never drawn."""
        return bool(self.top_k or self.top_p < 1 or self.min_p)


def choose(scores: Tensor, sampling: Sampling, draws: Tensor) -> tuple[Tensor, Tensor]:
    """A token for every row of float32 logits ``(n, V)``, and its log-probability: ``(n,)`` int64, ``(n,)`` float32.

    ``draws`` ``(n,)`` float64 in [0, 1) pick by inverting the distribution. The log-probability is that before the
    filters, under ``softmax(logits / temperature)``; at temperature 0 under ``softmax(logits)``. ``scores`` is overwritten.
    """
    if sampling.temperature == 0:
        ids = _likeliest(scores)
        return ids, scores.softmax(1).gather(1, ids[:, None]).log().squeeze(1)
    scores.sub_(scores.amax(1, keepdim=True))
    if sampling.temperature != 1:
        scores.div_(sampling.temperature)
    mass = scores.exp()
    tiles = _tiles(mass)
    total = tiles.sum(1)
    if sampling.filters:
        mass = mass.mul_(scores >= least_kept(scores, mass, sampling))
        tiles = _tiles(mass)
    ids = _invert(mass, tiles, draws)
    return ids, scores.gather(1, ids[:, None]).squeeze(1) - total.log().float()


def _likeliest(scores: Tensor) -> Tensor:
    """The first largest score's place ``(n,)``."""
    count = scores.shape[1] // TILE
    if scores.device.type != "cpu" or not count:
        return scores.argmax(1)
    # The largest of a row are found 16 times as fast as their places.
    tiles = scores[:, : count * TILE].view(len(scores), count, TILE).amax(2)
    tile = tiles.argmax(1)
    start = (tile * TILE)[:, None]
    ids = tile * TILE + scores.gather(1, start + torch.arange(TILE)).argmax(1)
    rest = scores[:, count * TILE :]
    if not rest.shape[1]:
        return ids
    best, place = rest.max(1)
    return torch.where(best > tiles.amax(1), count * TILE + place, ids)


def least_kept(scores: Tensor, mass: Tensor, sampling: Sampling) -> Tensor:
    """The smallest score ``(n, 1)`` that the filters keep; the largest of ``scores`` are 0, ``mass`` is their exp."""
    size = scores.shape[1]
    least = scores.new_full((len(scores), 1), -torch.inf)
    if 0 < sampling.top_k < size:
        least = scores.topk(sampling.top_k).values[:, -1:]
    if sampling.top_p < 1:
        least = torch.maximum(least, _nucleus(scores, mass, least, sampling.top_p))
    if sampling.min_p:
        least = least.clamp(min=math.log(sampling.min_p))
    return least


def _nucleus(scores: Tensor, mass: Tensor, least: Tensor, top_p: float) -> Tensor:
    """The last score of the smallest set of likeliest tokens that holds ``top_p`` of what is not below ``least``."""
    target = top_p * mass.mul(scores >= least).sum(1, keepdim=True, dtype=torch.float64)
    size = scores.shape[1]
    # A nucleus is small: a sorted prefix grows until it holds it. On a GPU asking whether it does costs more than sorting.
    first = min(PREFIX, size) if scores.device.type == "cpu" else size
    while True:
        values = scores.topk(first).values
        inside = values.exp().mul_(values >= least).cumsum(1, dtype=torch.float64) >= target
        if first == size or bool(inside[:, -1].all()):
            break
        first = min(8 * first, size)
    # Rounding may leave the whole a little short of the target.
    inside[:, -1] = True
    return values.gather(1, inside.int().argmax(1, keepdim=True))


def _tiles(mass: Tensor) -> Tensor:
    """Sums ``(n, ceil(V / TILE))`` float64 of neighbouring tokens."""
    count = mass.shape[1] // TILE
    sums = mass[:, : count * TILE].view(len(mass), count, TILE).sum(2).double()
    rest = mass[:, count * TILE :]
    return torch.cat([sums, rest.sum(1, keepdim=True).double()], 1) if rest.shape[1] else sums


def _invert(mass: Tensor, tiles: Tensor, draws: Tensor) -> Tensor:
    """The token ``(n,)`` whose share of the cumulative ``mass`` holds ``draws``; float64, never a token without mass."""
    edges = tiles.cumsum(1)
    at = _below(draws[:, None] * edges[:, -1:], edges[:, -1:])
    tile = torch.searchsorted(edges, at, right=True).clamp(max=tiles.shape[1] - 1)
    places = tile * TILE + torch.arange(TILE, device=mass.device)
    inside = mass.gather(1, places.clamp(max=mass.shape[1] - 1)).double().mul_(places < mass.shape[1])
    steps = inside.cumsum(1)
    rest = _below(at - (edges - tiles).gather(1, tile), steps[:, -1:])
    return (tile * TILE + torch.searchsorted(steps, rest, right=True)).squeeze(1).clamp(max=mass.shape[1] - 1)


def _below(value: Tensor, limit: Tensor) -> Tensor:
    return torch.minimum(value, torch.nextafter(limit, torch.zeros_like(limit))).clamp(min=0)


def key_bits(key: Sequence[int]) -> int:
    """64 bits, signed, that are a function of ``key``."""
    digest = hashlib.blake2b(":".join(map(str, key)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big", signed=True)


def uniform(bits: Tensor, positions: Tensor) -> Tensor:
    """Numbers in [0, 1) float64, functions of ``bits`` and ``positions``, both int64 (SplitMix64, Steele et al. 2014)."""
    z = bits + (positions + 1) * -0x61C8864680B583EB
    z = (z ^ _shifted(z, 30)) * -0x40A7B892E31B1A47
    z = (z ^ _shifted(z, 27)) * -0x6B2FB644ECCEEE15
    return _shifted(z ^ _shifted(z, 31), 11).double() * 2.0**-53


def _shifted(z: Tensor, by: int) -> Tensor:
    """A logical shift to the right; torch's own repeats the sign."""
    return (z >> by) & ((1 << (64 - by)) - 1)
