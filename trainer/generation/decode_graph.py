"""The decode step with fixed shapes: on CUDA it is captured once as a graph and then launched whole."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from trainer.functional import logits
from trainer.generation.cache import BLOCK, Cache, FixedDecode
from trainer.generation.completion import RunningSequence
from trainer.generation.sampling import Sampling, choose, uniform

SPAN = 4 * BLOCK
"""A graph looks at a multiple of this many places of every slot: a new one when the longest sequence outgrows it."""


class FixedDecoder:
    """Decodes all slots of a cache, idle ones too. What a step needs stays on the device and is advanced there."""

    def __init__(self, model: nn.Module, cache: Cache, sampling: Sampling) -> None:
        self.model, self.cache, self.sampling = model, cache, sampling
        zeros = [torch.zeros(cache.slots, dtype=torch.int64, device=cache.device) for _ in range(4)]
        self._tokens, self._lengths, self._bits, self._drawn = zeros
        self._out = torch.zeros(2, cache.slots, dtype=torch.float64, device=cache.device)
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self.stale = True
        """Whether the host knows better which slots hold what: a sequence came or went."""

    def step(self, running: Mapping[int, RunningSequence]) -> Tensor:
        """The next ids and their log-probabilities, float64 ``(2, slots)``."""
        if self.stale:
            self._load(running)
        longest = max(sequence.cached for sequence in running.values()) + 1
        span = min(-(-longest // SPAN) * SPAN, self.cache.block)
        if self.cache.device.type != "cuda":
            self._compute(span)
        else:
            if span not in self._graphs:
                self._graphs[span] = self._captured(span)
            self._graphs[span].replay()
        return self._out

    def _load(self, running: Mapping[int, RunningSequence]) -> None:
        rows = [(0, 0, 0, 0)] * self.cache.slots
        for slot, sequence in running.items():
            rows[slot] = (sequence.ids[-1], sequence.cached, sequence.bits, len(sequence.ids))
        columns = torch.tensor(rows, dtype=torch.int64).T.to(self.cache.device)
        for tensor, column in zip((self._tokens, self._lengths, self._bits, self._drawn), columns, strict=True):
            tensor.copy_(column)
        self.stale = False

    def _compute(self, span: int) -> None:
        scores = self.model(self._tokens[:, None], FixedDecode(self.cache, self._lengths, span), logits)[:, 0].float()
        ids, logprobs = choose(scores, self.sampling, uniform(self._bits, self._drawn))
        self._out.copy_(torch.stack([ids.double(), logprobs.double()]))
        self._tokens.copy_(ids)
        self._lengths.add_(1)
        self._drawn.add_(1)

    def _captured(self, span: int) -> torch.cuda.CUDAGraph:
        """The step as a graph; what the runs before capture advance is put back."""
        advanced = (self._tokens, self._lengths, self._drawn)
        before = [t.clone() for t in advanced]
        # Weights that autocast has cast must not be remembered after the graph that casts them.
        enabled, dtype = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
        with torch.autocast("cuda", dtype=dtype, enabled=enabled, cache_enabled=False):
            aside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(aside):
                for _ in range(2):
                    self._compute(span)
            torch.cuda.current_stream().wait_stream(aside)
            graph = torch.cuda.CUDAGraph()
            pool = next(iter(self._graphs.values())).pool() if self._graphs else None
            with torch.cuda.graph(graph, pool=pool):
                self._compute(span)
        for tensor, value in zip(advanced, before, strict=True):
            tensor.copy_(value)
        return graph
