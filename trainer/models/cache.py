"""Keys and values of the sequences that are being decoded, in blocks; attention touches the blocks in use."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from trainer.batch import Documents
from trainer.models.architecture import Architecture
from trainer.models.attention import attend

BLOCK = 64
"""Tokens of a block."""
HIDDEN = -1e30
"""Added to scores that count for nothing. Finite: a block of them alone then weighs nothing, and is not 0 / 0."""


class Cache:
    """Preallocated room for ``slots`` sequences of ``longest`` tokens each.

    A sequence holds whole blocks. On CPU it takes them as it grows, and those in use are always the first ones: whoever ends
    leaves holes that the last blocks are moved into, so that attention reads a view of what is in use, without padding to
    the longest. ``fixed``: a slot's blocks are its own for ever, so that shapes and addresses never change (CUDA graphs).
    """

    def __init__(self, a: Architecture, slots: int, longest: int, device: torch.device, *, fixed: bool) -> None:
        self.width = -(-longest // BLOCK)
        self.slots, self.device, self.fixed = slots, device, fixed
        self.lengths = np.zeros(slots, np.int64)
        own = [range(slot * self.width, (slot + 1) * self.width if fixed else 0) for slot in range(slots)]
        self.held: list[list[int]] = [list(blocks) for blocks in own]
        self._shape = (a.num_hidden_layers, slots * self.width * BLOCK, a.num_key_value_heads, a.head_dim)
        self._tensors: tuple[Tensor, Tensor] | None = None
        self.used = slots * self.width if fixed else 0
        self._clean = 0

    def of(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values ``(slots * width * BLOCK, Hkv, D)`` of a layer."""
        assert self._tensors is not None
        return self._tensors[0][layer], self._tensors[1][layer]

    def write(self, layer: int, places: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Put ``k`` and ``v`` ``(n, Hkv, D)`` at ``places`` ``(n,)``; returns the layer's keys and values."""
        if self._tensors is None:
            self._tensors = k.new_empty(self._shape), v.new_empty(self._shape)
        self._wipe()
        keys, values = self.of(layer)
        keys[places], values[places] = k, v
        return keys, values

    def reserve(self, slot: int, length: int) -> None:
        """Make room for a sequence of ``length`` tokens."""
        held = self.held[slot]
        while len(held) * BLOCK < length:
            held.append(self.used)
            self.used += 1
        self.lengths[slot] = length

    def places(self, slot: int, first: int, last: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        """Where the tokens ``first`` to ``last - 1`` of a sequence lie, ``(last - first,)``."""
        at = np.arange(first, last)
        return np.asarray(self.held[slot])[at // BLOCK] * BLOCK + at % BLOCK

    def copy(self, source: int, target: int, length: int) -> None:
        """Give ``target`` the first ``length`` tokens of ``source``."""
        self._wipe()
        assert self._tensors is not None
        count = -(-length // BLOCK)
        self._move(self.held[source][:count], self.held[target][:count])

    def release(self, slots: Sequence[int]) -> None:
        """Forget sequences, and close the gaps that they leave."""
        for slot in slots:
            self.lengths[slot] = 0
        if self.fixed:
            return
        holes = {block for slot in slots for block in self.held[slot]}
        for slot in slots:
            self.held[slot] = []
        end = self.used - len(holes)
        free = sorted(block for block in holes if block < end)
        moves: dict[int, int] = {}
        for held in self.held:
            for n, block in enumerate(held):
                if block >= end:
                    moves[block] = held[n] = free[len(moves)]
        self.used = end
        self._move(list(moves), list(moves.values()))

    def _move(self, origins: Sequence[int], targets: Sequence[int]) -> None:
        if not origins or self._tensors is None:
            return
        here, there = (torch.tensor(blocks, device=self.device) for blocks in (origins, targets))
        for tensor in self._tensors:
            blocks = tensor.view(len(tensor), -1, BLOCK, *tensor.shape[2:])
            blocks[:, there] = blocks[:, here]

    def _wipe(self) -> None:
        """Zero blocks before their first use: what lies in fresh memory could be NaN, which no mask hides."""
        if self._clean < self.used and self._tensors is not None:
            for tensor in self._tensors:
                tensor[:, self._clean * BLOCK : self.used * BLOCK].zero_()
            self._clean = self.used


class Prompts:
    """Whole prompts that pass through packed, and are written to their slots."""

    def __init__(self, cache: Cache, slots: Sequence[int], lengths: Sequence[int]) -> None:
        self.cache = cache
        self.documents = Documents.from_lengths(list(lengths), 1).to(cache.device)
        places = [cache.places(slot, 0, length) for slot, length in zip(slots, lengths, strict=True)]
        self.places = torch.from_numpy(np.concatenate(places)).to(cache.device)
        self.positions = self.documents.positions

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int | None, scale: float) -> Tensor:
        self.cache.write(layer, self.places, k[0], v[0])
        return attend(q, k, v, self.documents, window=window, scale=scale)


class Piece:
    """The tokens ``first`` to ``last - 1`` of one prompt, which see those before them in the cache."""

    def __init__(self, cache: Cache, slot: int, first: int, last: int) -> None:
        self.cache = cache
        whole = torch.from_numpy(cache.places(slot, 0, last)).to(cache.device)
        self.seen, self.places = whole, whole[first:]
        self.positions = torch.arange(first, last, device=cache.device)[None]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int | None, scale: float) -> Tensor:
        keys, values = self.cache.write(layer, self.places, k[0], v[0])
        own, places = self.positions[0, :, None], torch.arange(len(self.seen), device=q.device)
        mask = places <= own
        if window is not None:
            mask &= places > own - window
        out = F.scaled_dot_product_attention(
            q.transpose(1, 2), keys[self.seen].transpose(0, 1)[None], values[self.seen].transpose(0, 1)[None],
            attn_mask=mask, scale=scale, enable_gqa=q.shape[2] != k.shape[2],
        )  # fmt: skip
        return out.transpose(1, 2)


class Step:
    """One token of each of ``active`` slots, on CPU: attention block by block over the blocks in use, then merged.

    A block's query attends to that block alone; the log of each block's normaliser then weighs what it gave
    (Flash-Decoding, Dao et al. 2023).
    """

    def __init__(self, cache: Cache, active: Sequence[int]) -> None:
        self.cache = cache
        lengths = cache.lengths[list(active)]
        for slot in active:
            cache.reserve(slot, int(cache.lengths[slot]) + 1)
        held = [cache.held[slot] for slot in active]
        self.positions = torch.from_numpy(lengths)[:, None]
        last = np.array([blocks[-1] for blocks in held])
        self.places = torch.from_numpy(last * BLOCK + lengths % BLOCK)
        owner, first = np.empty(cache.used, np.int64), np.empty(cache.used, np.int64)
        table = np.full((len(held), max(map(len, held))), cache.used)
        for row, blocks in enumerate(held):
            owner[blocks], first[blocks] = row, np.arange(len(blocks)) * BLOCK
            table[row, : len(blocks)] = blocks
        self.owner, self.table = torch.from_numpy(owner), torch.from_numpy(table)
        self._own = torch.from_numpy(lengths[owner])[:, None]
        self._places = torch.from_numpy(first)[:, None] + torch.arange(BLOCK)
        self._masks: dict[int | None, Tensor] = {}

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int | None, scale: float) -> Tensor:
        keys, values = self.cache.write(layer, self.places, k[:, 0], v[:, 0])
        rows, _, heads, size = q.shape
        groups, blocks = k.shape[2], self.cache.used
        keys, values = (t[: blocks * BLOCK].view(blocks, BLOCK, groups, size).transpose(1, 2) for t in (keys, values))
        queries = q.view(rows, groups, heads // groups, size)[self.owner]
        out, normalisers = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            queries, keys, values, 0.0, False, attn_mask=self._mask(window), scale=scale
        )
        if self.table.shape[1] == 1:
            return out[self.table[:, 0]].view(q.shape)  # type: ignore[no-any-return]
        none = normalisers.new_full((1, heads), -torch.inf)
        weights = torch.cat([normalisers.reshape(blocks, heads), none])[self.table].softmax(1)
        flat = out.reshape(blocks, heads, size)
        parts: Tensor = flat[self.table.clamp(max=blocks - 1)].float()
        return parts.mul_(weights[..., None]).sum(1, keepdim=True).to(q.dtype)

    def _mask(self, window: int | None) -> Tensor:
        """0 or `HIDDEN` for every place of every block, ``(blocks, 1, 1, BLOCK)``."""
        if window not in self._masks:
            hidden = self._places > self._own
            if window is not None:
                hidden |= self._places <= self._own - window
            self._masks[window] = (hidden * HIDDEN)[:, None, None]
        return self._masks[window]


class FixedStep:
    """One token of every slot, whatever it holds: shapes and addresses that a CUDA graph can repeat.

    ``lengths`` ``(slots,)`` int64 on the device: tokens before this one. ``span``: places that are looked at.
    """

    def __init__(self, cache: Cache, lengths: Tensor, span: int) -> None:
        self.cache, self.span = cache, span
        most = cache.width * BLOCK
        self._lengths = lengths.clamp(max=most - 1)[:, None]
        self.positions = self._lengths
        self._places = (torch.arange(cache.slots, device=cache.device) * most) + self._lengths[:, 0]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int | None, scale: float) -> Tensor:
        keys, values = self.cache.write(layer, self._places, k[:, 0], v[:, 0])
        rows, _, heads, size = q.shape
        keys, values = (t.view(rows, -1, *t.shape[1:])[:, : self.span].transpose(1, 2) for t in (keys, values))
        places = torch.arange(self.span, device=q.device)
        mask = places <= self._lengths
        if window is not None:
            mask &= places > self._lengths - window
        grouped = q.view(rows, k.shape[2], heads // k.shape[2], size)
        out = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=mask[:, None, None], scale=scale)
        return out.reshape(q.shape)
