"""The decode step with fixed shapes: on CUDA it is captured once as a graph and then launched whole."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.func import functional_call

from trainer.functional import logits
from trainer.generation.cache import BLOCK, Cache, FixedDecode
from trainer.generation.completion import RunningSequence
from trainer.generation.sampling import Sampling, choose, uniform
from trainer.models.actor_critic import of_policy
from trainer.models.architecture import Architecture

SPAN = 4 * BLOCK
"""A graph looks at a multiple of this many places of every slot: a new one when the longest sequence outgrows it."""
RETAINED_BYTES = 2**30
"""A decoder of at most so many bytes is retained for the next generation; a larger one's memory is training's."""
_retained: WeakKeyDictionary[nn.Module, FixedDecoder] = WeakKeyDictionary()


def open_decoder(model: nn.Module, slots: int, longest: int, sampling: Sampling) -> FixedDecoder:
    """A decoder of ``slots`` sequences of ``longest`` tokens: the model's last one, with its graphs, where that fits."""
    decoder = _retained.pop(model, None)
    if decoder is None or not decoder.fits(model, slots, longest, sampling):
        decoder = FixedDecoder(model, slots, longest, sampling)
    decoder.load_weights(model)
    return decoder


class FixedDecoder:
    """Decodes all slots of a cache, idle ones too. What a step needs stays on the device and is advanced there.

    It does not hold the model, so that it can be retained for as long as the model lives.
    """

    def __init__(self, model: nn.Module, slots: int, longest: int, sampling: Sampling) -> None:
        architecture: Architecture = model.architecture  # type: ignore[assignment]
        device = next(model.parameters()).device
        heads: int = model.key_heads  # type: ignore[assignment]
        self.cache = Cache(architecture, slots, longest, device, fixed=True, key_heads=heads)
        self.sampling = sampling
        zeros = [torch.zeros(slots, dtype=torch.int64, device=device) for _ in range(4)]
        self._tokens, self._lengths, self._bits, self._drawn = zeros
        self._out = torch.zeros(2, slots, dtype=torch.float64, device=device)
        self._steps: dict[int, Callable[[nn.Module], None]] = {}
        self._pool: Any = None
        self._captured_with: tuple[Any, ...] | None = None
        self._weights: dict[str, Tensor] = {}
        self.stale = True
        """Whether the host knows better which slots hold what: a sequence came or went."""

    def fits(self, model: nn.Module, slots: int, longest: int, sampling: Sampling) -> bool:
        """Whether its graphs decode this, too: they know addresses and filters, not values or lengths."""
        return (
            self._captured_with == _addresses(model)
            and (slots, _filters(sampling)) == (self.cache.slots, _filters(self.sampling))
            and longest <= self.cache.block
        )

    def load_weights(self, model: nn.Module) -> None:
        """Cast once what autocast would cast at every token: a graph cannot remember a cast that it did not make."""
        kind = self.cache.device.type
        if not torch.is_autocast_enabled(kind):
            return
        dtype = torch.get_autocast_dtype(kind)
        with torch.no_grad():
            for name, p in model.named_parameters(remove_duplicate=False):
                if p.dtype != dtype and of_policy(name) and _is_cast(name, p):
                    if name in self._weights:
                        self._weights[name].copy_(p)
                    else:
                        self._weights[name] = p.to(dtype)

    def forward(self, model: nn.Module, *inputs: Any) -> Any:
        """The model's forward, with the weights that were cast."""
        if not self._weights:
            return model(*inputs)
        kind = self.cache.device.type
        # A cast that autocast remembers is gone when its context ends, and a graph may live longer.
        with torch.autocast(kind, torch.get_autocast_dtype(kind), cache_enabled=False):
            return functional_call(model, self._weights, inputs, tie_weights=False)

    def step(self, model: nn.Module, running: Mapping[int, RunningSequence]) -> Tensor:
        """The next ids and their log-probabilities, float64 ``(2, slots)``."""
        if self.stale:
            self._load(running)
        longest = max(sequence.cached for sequence in running.values()) + 1
        span = min(-(-longest // SPAN) * SPAN, self.cache.block)
        if span not in self._steps:
            self._steps[span] = self._captured(model, span)
        self._steps[span](model)
        return self._out

    def retain(self, model: nn.Module) -> None:
        """End a generation; what it used is retained for the model's next one, where it is small."""
        self.cache.release(range(self.cache.slots))
        self.stale = True
        if self.cache.nbytes + sum(t.nbytes for t in self._weights.values()) <= RETAINED_BYTES:
            _retained[model] = self

    def _load(self, running: Mapping[int, RunningSequence]) -> None:
        rows = [(0, 0, 0, 0)] * self.cache.slots
        for slot, sequence in running.items():
            rows[slot] = (sequence.ids[-1], sequence.cached, sequence.bits, len(sequence.ids))
        columns = torch.tensor(rows, dtype=torch.int64).T.to(self.cache.device)
        for tensor, column in zip((self._tokens, self._lengths, self._bits, self._drawn), columns, strict=True):
            tensor.copy_(column)
        self.stale = False

    def _compute(self, model: nn.Module, span: int) -> None:
        cached = FixedDecode(self.cache, self._lengths, span)
        scores = self.forward(model, self._tokens[:, None], cached, logits)[:, 0].float()
        ids, logprobs = choose(scores, self.sampling, uniform(self._bits, self._drawn))
        self._out.copy_(torch.stack([ids.double(), logprobs.double()]))
        self._tokens.copy_(ids)
        self._lengths.add_(1)
        self._drawn.add_(1)

    def _captured(self, model: nn.Module, span: int) -> Callable[[nn.Module], None]:
        """The step: on CUDA a graph, elsewhere the function."""
        self._captured_with = _addresses(model)
        if self.cache.device.type != "cuda":
            return partial(self._compute, span=span)
        graph = self._graph(model, span)
        return lambda _: graph.replay()

    def _graph(self, model: nn.Module, span: int) -> torch.cuda.CUDAGraph:
        """The step as a graph; what the runs before capture advance is put back.

        Not by ``torch.cuda.graph``, which gives back all the memory that training has cached.
        """
        advanced = (self._tokens, self._lengths, self._drawn, *self.cache.states.tensors)
        before = [t.clone() for t in advanced]
        graph, aside = torch.cuda.CUDAGraph(), torch.cuda.Stream()  # type: ignore[no-untyped-call]
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(2):
                self._compute(model, span)
            torch.cuda.synchronize()
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                self._compute(model, span)
            finally:
                graph.capture_end()
        torch.cuda.current_stream().wait_stream(aside)
        self._pool = self._pool or graph.pool()
        for tensor, value in zip(advanced, before, strict=True):
            tensor.copy_(value)
        return graph


def _is_cast(name: str, parameter: nn.Parameter) -> bool:
    """Whether autocast casts it where it is used: not a norm's, nor the embedding, which is read row by row."""
    cast = parameter.is_floating_point() and (parameter.ndim == 2 or name.endswith(".bias"))
    return cast and not name.endswith("embed_tokens.weight") and "norm" not in name.split(".")[-2]


def _filters(sampling: Sampling) -> Sampling:
    """What of ``sampling`` a step depends on."""
    return dataclasses.replace(sampling, tokens=1)


def _addresses(model: nn.Module) -> tuple[Any, ...]:
    """Where a graph finds the model, and what it computes in."""
    tensors = [*model.parameters(), *model.buffers()]
    kind = tensors[0].device.type
    autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    return (autocast, *(t.data_ptr() for t in tensors))
