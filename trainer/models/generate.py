"""Sampling from a decoder with a key-value cache; ragged prompts are packed, never padded."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trainer.batch import Documents
from trainer.functional import logits
from trainer.models.architecture import Architecture
from trainer.models.attention import attend


def generate(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    stops: Collection[int],
    numbers: Sequence[int] | None = None,
) -> list[list[int]]:
    """Continue every prompt (at least one token each) until one of ``stops``, which is kept, or ``max_new_tokens``.

    ``temperature`` 0 takes the likeliest token. Otherwise a token depends on (seed, number of the prompt, position) and the
    model, not on the batch that it was sampled in. ``numbers``: the prompts' numbers; default 0, 1, ...
    """
    if not prompts:
        return []
    numbers = range(len(prompts)) if numbers is None else numbers
    architecture: Architecture = model.architecture  # type: ignore[assignment]
    device = next(model.parameters()).device
    lengths = [len(prompt) for prompt in prompts]
    cache = Cache(architecture, lengths, max(lengths) + max_new_tokens, device)
    done: list[list[int]] = [[] for _ in prompts]
    with torch.no_grad():
        packed = torch.tensor([token for prompt in prompts for token in prompt], device=device)[None]
        cache.documents = Documents.from_lengths(lengths, 1).to(device)
        last = torch.tensor(lengths, device=device).cumsum(0) - 1
        scores = model(packed, cache, partial(_logits_at, last))
        cache.documents = None
        for position in range(max_new_tokens):
            chosen = sample(scores.float(), temperature, [(seed, n, position) for n in numbers])
            for completion, token in zip(done, chosen.tolist(), strict=True):
                if not completion or completion[-1] not in stops:
                    completion.append(token)
            if position + 1 == max_new_tokens or all(c[-1] in stops for c in done):
                break
            scores = model(chosen[:, None], cache, logits)[:, -1]
            cache.lengths += 1
    return done


def stream(
    model: nn.Module,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    stops: Collection[int],
) -> Iterator[int]:
    """The tokens of `generate` for one prompt, each as soon as it is known."""
    architecture: Architecture = model.architecture  # type: ignore[assignment]
    device = next(model.parameters()).device
    cache = Cache(architecture, [len(prompt)], len(prompt) + max_new_tokens, device)
    cache.documents = Documents.from_lengths([len(prompt)], 1).to(device)
    tokens = torch.tensor([list(prompt)], device=device)
    read: Callable[..., Any] = partial(_logits_at, torch.tensor([len(prompt) - 1], device=device))
    for position in range(max_new_tokens):
        with torch.no_grad():
            scores = model(tokens, cache, read)
        token = int(sample(scores.reshape(1, -1).float(), temperature, [(seed, 0, position)]))
        yield token
        if token in stops:
            return
        cache.lengths += cache.documents is None
        cache.documents = None
        tokens, read = torch.tensor([[token]], device=device), logits


def sample(scores: Tensor, temperature: float, seeds: Sequence[tuple[int, ...]]) -> Tensor:
    """Draw a token from every row of logits ``(n, V)`` by inverting its distribution at the number its seed gives."""
    if temperature == 0:
        return scores.argmax(-1)
    edges = (scores.double() / temperature).softmax(-1).cumsum(-1)
    draws = torch.tensor([uniform(*s) for s in seeds], dtype=torch.float64, device=scores.device)[:, None]
    return torch.searchsorted(edges, draws * edges[:, -1:], right=True).squeeze(1).clamp(max=scores.shape[-1] - 1)


def uniform(*key: int) -> float:
    """A number in [0, 1) that is a function of ``key``."""
    digest = hashlib.blake2b(":".join(map(str, key)).encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 11) * 2.0**-53


class Cache:
    """Keys and values of every layer, preallocated, for sequences of different lengths.

    While ``documents`` is set, the prompts pass through packed and are written to the cache; afterwards one token a sequence.
    """

    def __init__(self, a: Architecture, lengths: Sequence[int], capacity: int, device: torch.device) -> None:
        shape = (a.num_hidden_layers, len(lengths), capacity, a.num_key_value_heads, a.head_dim)
        self._shape, self._device = shape, device
        self._keys: Tensor | None = None
        self._values: Tensor | None = None
        self.lengths = torch.tensor(lengths, device=device)
        self.documents: Documents | None = None
        rows = [torch.full((n,), row) for row, n in enumerate(lengths)]
        self._rows = torch.cat(rows).to(device)

    @property
    def positions(self) -> Tensor:
        """Positions of the tokens that pass through now, ``(B, T)``."""
        return self.lengths[:, None] if self.documents is None else self.documents.positions

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int | None, scale: float) -> Tensor:
        if self._keys is None or self._values is None:
            self._keys = k.new_zeros(self._shape)
            self._values = v.new_zeros(self._shape)
        keys, values = self._keys[layer], self._values[layer]
        if self.documents is not None:
            places = self.documents.positions[0]
            keys[self._rows, places], values[self._rows, places] = k[0], v[0]
            return attend(q, k, v, self.documents, window=window, scale=scale)
        rows = torch.arange(len(self.lengths), device=self._device)
        keys[rows, self.lengths], values[rows, self.lengths] = k[:, 0], v[:, 0]
        end = int(self.lengths.max()) + 1
        places = torch.arange(end, device=self._device)
        seen = places <= self.lengths[:, None]
        if window is not None:
            seen &= places > self.lengths[:, None] - window
        grouped = q.shape[2] != k.shape[2]
        out = F.scaled_dot_product_attention(
            q.transpose(1, 2), keys[:, :end].transpose(1, 2), values[:, :end].transpose(1, 2),
            attn_mask=seen[:, None, None], scale=scale, enable_gqa=grouped,
        )  # fmt: skip
        return out.transpose(1, 2)


def _logits_at(places: Tensor, hidden: Tensor, weight: Tensor) -> Tensor:
    """Logits ``(n, V)`` of the tokens at ``places`` of the single row."""
    return logits(hidden[0, places], weight)
