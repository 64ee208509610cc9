"""Keys and values of the sequences that are being decoded, in blocks; attention touches the blocks in use."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from trainer.batch import Branches, Documents
from trainer.generation.recurrent import DeltaStates, PromptRows
from trainer.models.architecture import Architecture
from trainer.models.attention import Scores, attend, attend_plainly, attend_seen
from trainer.models.cpu_kernels import block_weights, take
from trainer.models.delta import DeltaInputs, Pass

BLOCK = 64
"""Tokens of a block."""
Numbers = np.ndarray[tuple[int, ...], np.dtype[np.int64]]
HIDDEN = -1e30
"""Added to scores that count for nothing. Finite: a block of them alone then weighs nothing, and is not 0 / 0."""


class Cache:
    """Preallocated room for ``slots`` sequences of ``longest`` tokens each.

    A sequence holds whole blocks. On CPU it takes them as it grows, and those in use are always the first ones: whoever ends
    leaves holes that the last blocks are moved into, so that attention reads a view of what is in use, without padding to
    the longest. ``fixed``: a slot has one long block, its own for ever: shapes and addresses never change (CUDA graphs).
    ``key_heads``: those that this rank computes, where ranks divide them; None = all.
    """

    def __init__(
        self,
        a: Architecture,
        slots: int,
        longest: int,
        device: torch.device,
        *,
        fixed: bool,
        key_heads: int | None = None,
    ) -> None:
        width = -(-longest // BLOCK)
        self.block, self.width = (width * BLOCK, 1) if fixed else (BLOCK, width)
        """Tokens of a block; most blocks of a sequence."""
        self.slots, self.device, self.fixed = slots, device, fixed
        heads = a.num_key_value_heads if key_heads is None else key_heads
        self.groups = np.arange(heads)
        self.states = DeltaStates(a, slots)
        attending = [number for number, layer in enumerate(a.layers) if not layer.delta]
        self._row = {number: row for row, number in enumerate(attending)}
        self.lengths = np.zeros(slots, np.int64)
        self.blocks_of: list[list[int]] = [[slot] if fixed else [] for slot in range(slots)]
        self._shape = (len(attending), slots * self.width, heads, self.block, a.head_dim)
        self._tensors: tuple[Tensor, Tensor] | None = None
        self.used = slots if fixed else 0
        self._clean = 0

    @property
    def nbytes(self) -> int:
        """Bytes of all keys, values and states, once the first are written."""
        return sum(tensor.nbytes for tensor in self._tensors or ()) + self.states.nbytes

    def of(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values ``(blocks, Hkv, block, D)`` of a layer; keys are float32 on CPU, where blocks move."""
        assert self._tensors is not None
        return self._tensors[0][self._row[layer]], self._tensors[1][self._row[layer]]

    def write(self, layer: int, places: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Put ``k`` and ``v`` ``(n, Hkv, D)`` at ``places`` ``(n, Hkv)``; returns the layer's keys and values."""
        if self._tensors is None:
            # The products of `block_weights` are float32: keys would be widened at every token.
            moving = self.device.type == "cpu" and not self.fixed
            of_keys = torch.promote_types(k.dtype, torch.float32) if moving else k.dtype
            self._tensors = k.new_empty(self._shape, dtype=of_keys), v.new_empty(self._shape)
        self._wipe()
        keys, values = self.of(layer)
        for tensor, new in ((keys, k), (values, v)):
            # Rows at a time: indexing by a tensor looks for every number's place by itself, five times as slow on CPU.
            flat(tensor).index_copy_(0, places.flatten(), new.flatten(0, 1).to(tensor.dtype))
        return keys, values

    def reserve(self, slot: int, length: int) -> None:
        """Make room for a sequence of ``length`` tokens."""
        blocks = self.blocks_of[slot]
        while len(blocks) * self.block < length:
            blocks.append(self.used)
            self.used += 1
        self.lengths[slot] = length

    def places(self, slot: int, first: int, last: int) -> Tensor:
        """A layer's `flat` rows ``(last - first, Hkv)`` for the tokens ``first`` to ``last - 1`` of a sequence."""
        at = np.arange(first, last)
        return torch.from_numpy(self.rows(np.asarray(self.blocks_of[slot])[at // self.block], at)).to(self.device)

    def rows(self, blocks: Numbers, positions: Numbers) -> Numbers:
        """The rows ``(n, Hkv)`` of tokens at ``positions`` ``(n,)`` of their sequences, whose blocks there are ``blocks``."""
        return (blocks[:, None] * len(self.groups) + self.groups) * self.block + (positions % self.block)[:, None]

    def copy(self, source: int, target: int, length: int) -> None:
        """Give ``target`` the first ``length`` tokens of ``source``, which recurrent layers must not have gone past."""
        self._wipe()
        self.states.copy(source, target)
        count = -(-length // self.block)
        self._move(self.blocks_of[source][:count], self.blocks_of[target][:count])

    def release(self, slots: Sequence[int]) -> None:
        """Forget sequences, and close the gaps that they leave."""
        for slot in slots:
            self.lengths[slot] = 0
        if self.fixed:
            return
        holes = {block for slot in slots for block in self.blocks_of[slot]}
        for slot in slots:
            self.blocks_of[slot] = []
        end = self.used - len(holes)
        free = sorted(block for block in holes if block < end)
        moves: dict[int, int] = {}
        for blocks in self.blocks_of:
            for n, block in enumerate(blocks):
                if block >= end:
                    moves[block] = blocks[n] = free[len(moves)]
        self.used = end
        self._move(list(moves), list(moves.values()))

    def _move(self, origins: Sequence[int], targets: Sequence[int]) -> None:
        if not origins or self._tensors is None:
            return
        here, there = (torch.tensor(blocks, device=self.device) for blocks in (origins, targets))
        for tensor in self._tensors:
            tensor[:, there] = tensor[:, here]

    def _wipe(self) -> None:
        """Zero blocks before their first use: what lies in fresh memory could be NaN, which no mask hides."""
        if self._clean < self.used and self._tensors is not None:
            for tensor in self._tensors:
                tensor[:, self._clean : self.used].zero_()
            self._clean = self.used


class PackedPrefill:
    """Whole prompts that pass through packed, and are written to their slots.

    ``shared``: tokens that all of them begin with, which are in the row once, before what is left of each prompt.

    Attributes:
        last: The place ``(n,)`` in the row of each prompt's last token.
    """

    def __init__(self, cache: Cache, slots: Sequence[int], lengths: Sequence[int], shared: int = 0) -> None:
        self.cache = cache
        ends = np.cumsum([length - shared for length in lengths]) + shared
        self.last = torch.tensor([end - 1 for end in ends], device=cache.device)
        self.documents: Documents | Branches
        if shared:
            rests = [range(end - length + shared, end) for length, end in zip(lengths, ends, strict=True)]
            self.documents = Branches.of([[*range(shared), *rest] for rest in rests], ends[-1]).to(cache.device)
        else:
            self.documents = Documents.from_lengths(list(lengths), 1).to(cache.device)
        self.places = torch.cat([cache.places(slot, 0, length) for slot, length in zip(slots, lengths, strict=True)])
        self.positions = self.documents.positions
        self._rows = PromptRows(slots, lengths, cache.device) if cache.states else None

    def recur(self, layer: int, passed: Pass, inputs: DeltaInputs) -> Tensor:
        assert self._rows is not None
        return self._rows.recur(self.cache.states, layer, passed, inputs)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scores: Scores) -> Tensor:
        of_prompts = (
            take(t[0], 0, self.documents.index) if isinstance(self.documents, Branches) else t[0] for t in (k, v)
        )
        self.cache.write(layer, self.places, *of_prompts)
        return attend(q, k, v, self.documents, scores, forward=True)


class ChunkedPrefill:
    """The tokens ``first`` to ``last - 1`` of one prompt, which see those before them in the cache."""

    def __init__(self, cache: Cache, slot: int, first: int, last: int) -> None:
        self.cache = cache
        self.seen = cache.places(slot, 0, last)
        self.places = self.seen[first:]
        self.positions = torch.arange(first, last, device=cache.device)[None]
        self._first, self._slot = first, slice(slot, slot + 1)

    def recur(self, layer: int, passed: Pass, inputs: DeltaInputs) -> Tensor:
        return self.cache.states.advance(layer, self._slot, passed, inputs, self.positions, begun=self._first > 0)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scores: Scores) -> Tensor:
        keys, values = self.cache.write(layer, self.places, k[0], v[0])
        own, places = self.positions[0, :, None], torch.arange(len(self.seen), device=q.device)
        mask = places <= own
        if scores.window is not None:
            mask &= places > own - scores.window
        past = [flat(t)[self.seen].to(q.dtype).transpose(0, 1)[None] for t in (keys, values)]
        return attend_seen(q.transpose(1, 2), past[0], past[1], mask, scores).transpose(1, 2)


class BlockDecode:
    """One token of each of ``active`` slots, on CPU: attention block by block over the blocks in use, then added up.

    A block's query attends to that block alone; the log of each block's normaliser then says its share of the sequence
    (Flash-Decoding, Dao et al. 2023).
    """

    def __init__(self, cache: Cache, active: Sequence[int]) -> None:
        self.cache = cache
        lengths = cache.lengths[list(active)]
        for slot in active:
            cache.reserve(slot, int(cache.lengths[slot]) + 1)
        tables = [cache.blocks_of[slot] for slot in active]
        self.positions = torch.from_numpy(lengths)[:, None]
        self.places = torch.from_numpy(cache.rows(np.array([blocks[-1] for blocks in tables]), lengths))
        owner, first, column = (np.empty(cache.used, np.int64) for _ in range(3))
        most = max(map(len, tables))
        table = np.full((len(tables), most), cache.used)
        for row, blocks in enumerate(tables):
            owner[blocks], first[blocks] = row, np.arange(len(blocks)) * BLOCK
            table[row, : len(blocks)] = blocks
            column[blocks] = row * most + np.arange(len(blocks))
        self.owner, self._table, self._column = (torch.from_numpy(part) for part in (owner, table, column))
        self._by_sequence = torch.from_numpy(np.concatenate(tables))
        self._ends = torch.from_numpy(np.cumsum([0, *map(len, tables)]))
        self._own = torch.from_numpy(lengths[owner])[:, None]
        self._places = torch.from_numpy(first)[:, None] + torch.arange(BLOCK)
        self._masks: dict[int | None, Tensor] = {}
        self._rows: tuple[Tensor, Tensor] | None = None
        self._active = torch.tensor(list(active))

    def recur(self, layer: int, passed: Pass, inputs: DeltaInputs) -> Tensor:
        return self.cache.states.advance(layer, self._active, passed, inputs, self.positions)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scores: Scores) -> Tensor:
        keys, values = self.cache.write(layer, self.places, k[:, 0], v[:, 0])
        rows, _, heads, size = q.shape
        groups, blocks = k.shape[2], self.cache.used
        queries = q.view(rows, groups, heads // groups, size).index_select(0, self.owner)
        mask = self._mask(scores.window)
        weights, normalisers = block_weights(queries, keys[:blocks], mask, scores.scale, scores.cap)
        if self._table.shape[1] > 1 or scores.sinks is not None:
            weights.view(blocks, heads, -1).mul_(self._shares(normalisers, scores.sinks)[..., None])
        # Sums of weighted rows: products of so few rows with so many matrices take twice as long.
        looked_at, starts = self._rows_of_values(groups, heads // groups)
        weights = weights.to(values.dtype).view(-1)
        out = F.embedding_bag(looked_at, flat(values), starts, mode="sum", per_sample_weights=weights)
        # The sum of each sequence's blocks, in their order.
        out = F.embedding_bag(self._by_sequence, out.view(blocks, -1), self._ends, mode="sum", include_last_offset=True)
        return out.view(q.shape)

    def _rows_of_values(self, groups: int, queries: int) -> tuple[Tensor, Tensor]:
        """The `flat` rows ``(blocks * H * block,)`` that each query head looks at in each block, and where its first is."""
        if self._rows is None:
            rows = torch.arange(self.cache.used * groups * BLOCK).view(-1, 1, BLOCK).expand(-1, queries, -1).flatten()
            self._rows = rows, torch.arange(0, len(rows), BLOCK)
        return self._rows

    def _shares(self, normalisers: Tensor, sinks: Tensor | None) -> Tensor:
        """Each block's part of its sequence's attention, ``(blocks, H)``; a sink has a part that no block has."""
        none = normalisers.new_full((1, normalisers.shape[1]), -torch.inf)
        rows, most = self._table.shape
        columns = torch.cat([normalisers, none]).index_select(0, self._table.view(-1)).view(rows, most, -1)
        if sinks is not None:
            columns = torch.cat([columns, sinks.to(columns.dtype).expand(rows, 1, -1)], 1)
        shares = columns.softmax(1)[:, :most]
        return shares.reshape(rows * most, -1).index_select(0, self._column)

    def _mask(self, window: int | None) -> Tensor:
        """0 or `HIDDEN` for every place of every block, ``(blocks, BLOCK)``."""
        if window not in self._masks:
            hidden = self._places > self._own
            if window is not None:
                hidden |= self._places <= self._own - window
            self._masks[window] = hidden * HIDDEN
        return self._masks[window]


def flat(tensor: Tensor) -> Tensor:
    """Keys or values of a layer by rows, ``(blocks * Hkv * block, D)``."""
    return tensor.view(-1, tensor.shape[-1])


class FixedDecode:
    """One token of every slot, whatever it holds: shapes and addresses that a CUDA graph can repeat.

    ``lengths`` ``(slots,)`` int64 on the device: tokens before this one. ``span``: places that are looked at.
    """

    def __init__(self, cache: Cache, lengths: Tensor, span: int) -> None:
        self.cache, self.span = cache, span
        self._lengths = lengths.clamp(max=cache.block - 1)[:, None]
        self.positions = self._lengths
        groups = len(cache.groups)
        first = torch.arange(cache.slots * groups, device=cache.device).view(-1, groups) * cache.block
        self._places = first + self._lengths

    def recur(self, layer: int, passed: Pass, inputs: DeltaInputs) -> Tensor:
        return self.cache.states.advance(layer, slice(None), passed, inputs, self.positions)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scores: Scores) -> Tensor:
        keys, values = self.cache.write(layer, self._places, k[:, 0], v[:, 0])
        rows, _, heads, size = q.shape
        keys, values = keys[:, :, : self.span], values[:, :, : self.span]
        places = torch.arange(self.span, device=q.device)
        mask = places <= self._lengths
        if scores.window is not None:
            mask &= places > self._lengths - scores.window
        grouped, mask = q.view(rows, k.shape[2], heads // k.shape[2], size), mask[:, None, None]
        if scores.plain:
            out = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=mask, scale=scores.scale)
        else:
            each = (grouped[..., None, :], keys[:, :, None], values[:, :, None], mask[:, None])
            out = attend_plainly(*each, scores)
        return out.reshape(q.shape)
