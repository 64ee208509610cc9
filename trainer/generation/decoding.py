"""Continuous batching: which sequences hold a slot, what passes through the model next, and what came of it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from trainer.data.shared_beginnings import common_length
from trainer.functional import At, Head, logits
from trainer.generation.cache import BlockDecode, Cache, ChunkedPrefill, PackedPrefill
from trainer.generation.completion import RunningSequence
from trainer.generation.decode_graph import open_decoder
from trainer.generation.sampling import Sampling, choose, key_bits, uniform
from trainer.models.architecture import Architecture
from trainer.models.linear import rounded_once
from trainer.models.rearranged import rearranged_weights

CHUNK = 2048
"""Prompt tokens that pass through the model at once, at most: what bounds a prefill's memory."""
ATTENDED = 4 * CHUNK
"""Tokens that prefill's attention looks at at once, at most, with those that prompts share counted for each."""
SPARED = 256
"""Tokens that prompts must share to pass through once: a forward of fewer takes as long as reading the weights does."""
REARRANGED_FROM = 16
"""Tokens of a completion from which rearranging the weights takes less time than it spares."""


class Decoding:
    """Iterate to decode: every sequence is yielded after each of its tokens. See `generate`.

    ``fixed``: decode with fixed shapes, which on CUDA become graphs; default where the model is not on the CPU.
    """

    def __init__(
        self,
        model: nn.Module,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        *,
        stops: Collection[int],
        keys: Sequence[tuple[int, ...]] | None = None,
        max_concurrent: int = 64,
        fixed: bool | None = None,
    ) -> None:
        keys = [(0, n) for n in range(len(prompts))] if keys is None else keys
        if len(keys) != len(prompts):
            raise ValueError(f"there are {len(keys)} keys and {len(prompts)} prompts; give one key a prompt")
        if empty := [n for n, prompt in enumerate(prompts) if not len(prompt)]:
            raise ValueError(f"prompts {empty} are empty; begin with the beginning-of-document token")
        if max_concurrent < 1:
            raise ValueError(f"max_concurrent={max_concurrent} would decode nothing; use 1 or more")
        self.model, self.sampling, self.stops = model, sampling, frozenset(stops)
        self.device = next(model.parameters()).device
        # Equal prompts follow each other, so that the second finds the first in the cache.
        groups: dict[tuple[int, ...], list[RunningSequence]] = {}
        for number, (prompt, key) in enumerate(zip(prompts, keys, strict=True)):
            ids = tuple(prompt)
            groups.setdefault(ids, []).append(RunningSequence(number, ids, key_bits(key)))
        self.waiting = deque(sequence for group in groups.values() for sequence in group)
        self.running: dict[int, RunningSequence] = {}
        self._first: dict[tuple[int, ...], Tensor] = {}
        self._read: Callable[[Tensor, Head], Tensor] = logits
        slots = max(1, min(max_concurrent, len(prompts)))
        longest = max(map(len, groups), default=0) + sampling.tokens
        architecture: Architecture = model.architecture  # type: ignore[assignment]
        key_heads: int = model.key_heads  # type: ignore[assignment]
        # No graph may hold what ranks say to each other by way of their hosts.
        fixed = self.device.type != "cpu" and not getattr(model, "staged", False) if fixed is None else fixed
        self._decoder = open_decoder(model, slots, longest, sampling) if fixed else None
        self.cache = (
            Cache(architecture, slots, longest, self.device, fixed=False, key_heads=key_heads)
            if self._decoder is None
            else self._decoder.cache
        )

    def __iter__(self) -> Iterator[RunningSequence]:
        # A few free slots are filled at once: one prompt alone reads all the weights for its few tokens.
        enough = max(1, self.cache.slots // 16)
        try:
            with ExitStack() as copies:
                # A graph that is retained must find the weights themselves, where they are.
                if self._decoder is None:
                    copies.enter_context(rounded_once(self.model))
                    if self.sampling.tokens >= REARRANGED_FROM:
                        self._read = copies.enter_context(rearranged_weights(self.model))
                while self.waiting or self.running:
                    if self.waiting and (not self.running or self.cache.slots - len(self.running) >= enough):
                        yield from self._append(*self._admit())
                    if self.running:
                        yield from self._append(*self._step())
        finally:
            if self._decoder is not None:
                self._decoder.retain(self.model)

    def _forward(self, *inputs: Any) -> Tensor:
        out: Tensor = self.model(*inputs) if self._decoder is None else self._decoder.forward(self.model, *inputs)
        return out

    @torch.no_grad()
    def _admit(self) -> tuple[list[int], Tensor]:
        """Give the free slots to waiting prompts; their first tokens."""
        free = [slot for slot in range(self.cache.slots) if slot not in self.running]
        # The states of recurrent layers have gone past the prompts of those that run.
        running = {} if self.cache.states else self.running
        slot_of_prompt = {sequence.prompt: slot for slot, sequence in running.items()}
        fresh, copies, slots = list[int](), list[tuple[int, int]](), list[int]()
        for slot in free[: len(self.waiting)]:
            sequence = self.waiting.popleft()
            self.running[slot] = sequence
            self.cache.reserve(slot, len(sequence.prompt))
            slots.append(slot)
            if sequence.prompt in slot_of_prompt:
                copies.append((slot_of_prompt[sequence.prompt], slot))
            else:
                slot_of_prompt[sequence.prompt] = slot
                fresh.append(slot)
        self._prefill(fresh)
        for source, target in copies:
            self.cache.copy(source, target, len(self.running[target].prompt))
        scores = torch.stack([self._first[self.running[slot].prompt] for slot in slots])
        # Only the group that is not through yet needs them again.
        waiting = self.waiting[0].prompt if self.waiting else None
        self._first = {prompt: first for prompt, first in self._first.items() if prompt == waiting}
        if self._decoder is not None:
            self._decoder.stale = True
        return slots, self._choose(scores, slots)

    def _prefill(self, slots: Sequence[int]) -> None:
        """Let prompts pass through, packed into chunks; keeps the logits behind each."""
        chunk, size, shared = list[int](), 0, 0
        for slot in slots:
            prompt = self.running[slot].prompt
            if len(prompt) > CHUNK:
                self._prefill_long(slot)
                continue
            both = common_length(self.running[chunk[0]].prompt[:shared], prompt) if chunk else 0
            if chunk and (size + len(prompt) > ATTENDED or size + len(prompt) - len(chunk) * both > CHUNK):
                self._prefill_chunk(chunk, shared)
                chunk, size = [], 0
            shared = both if chunk else len(prompt)
            chunk.append(slot)
            size += len(prompt)
        if chunk:
            self._prefill_chunk(chunk, shared)

    def _prefill_chunk(self, slots: list[int], shared: int) -> None:
        """``shared``: tokens that all prompts begin with."""
        prompts = [self.running[slot].prompt for slot in slots]
        lengths = [len(prompt) for prompt in prompts]
        spared = (len(slots) - 1) * shared
        # Recurrent layers go through each prompt from its beginning.
        if self.cache.states or spared < SPARED or spared < sum(lengths) // 8:
            shared = 0
        packed = [*prompts[0][:shared], *(token for prompt in prompts for token in prompt[shared:])]
        context = PackedPrefill(self.cache, slots, lengths, shared)
        tokens = torch.tensor([packed], device=self.device)
        scores = self._forward(tokens, context, At(context.last, self._read))[0]
        self._first.update(zip(prompts, scores.float(), strict=True))

    def _prefill_long(self, slot: int) -> None:
        prompt = self.running[slot].prompt
        for first in range(0, len(prompt), CHUNK):
            tokens = torch.tensor([prompt[first : first + CHUNK]], device=self.device)
            last = torch.tensor([tokens.shape[1] - 1], device=self.device)
            chunk = ChunkedPrefill(self.cache, slot, first, first + tokens.shape[1])
            scores = self._forward(tokens, chunk, At(last, self._read))
        self._first[prompt] = scores[0, 0].float()

    @torch.no_grad()
    def _step(self) -> tuple[list[int], Tensor]:
        """The next token of every running sequence."""
        slots = sorted(self.running)
        if self._decoder is not None:
            # Every slot goes to the host: choosing among them on the device would send it a list at every token.
            return slots, self._decoder.step(self.model, self.running).cpu()[:, slots]
        tokens = torch.tensor([[self.running[slot].ids[-1]] for slot in slots])
        scores = self.model(tokens, BlockDecode(self.cache, slots), self._read)[:, 0]
        return slots, self._choose(scores.float(), slots)

    def _choose(self, scores: Tensor, slots: Sequence[int]) -> Tensor:
        """Ids and log-probabilities as one float64 tensor ``(2, n)``, so that the host waits for the device once."""
        bits, drawn = ([getattr(self.running[slot], what) for slot in slots] for what in ("bits", "ids"))
        places = torch.tensor([len(ids) for ids in drawn], device=self.device)
        draws = uniform(torch.tensor(bits, device=self.device), places)
        return torch.stack([t.double() for t in choose(scores, self.sampling, draws)])

    def _append(self, slots: Sequence[int], chosen: Tensor) -> Iterator[RunningSequence]:
        """Append what was drawn, free the slots of those that are done, then yield each."""
        grown, done = [], []
        for slot, token, logprob in zip(slots, *chosen.tolist(), strict=True):
            sequence = self.running[slot]
            sequence.ids.append(int(token))
            sequence.logprobs.append(logprob)
            sequence.ended = token in self.stops
            sequence.done = sequence.ended or len(sequence.ids) == self.sampling.tokens
            grown.append(sequence)
            if sequence.done:
                done.append(slot)
                del self.running[slot]
        if done:
            self.cache.release(done)
            if self._decoder is not None:
                self._decoder.stale = True
        yield from grown
