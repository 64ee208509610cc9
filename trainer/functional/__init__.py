"""Pure tensor functions that run inside a model's forward: what is read off the final hidden states.

A reader is called as ``read(hidden, head)`` with ``hidden`` ``(B, T, d)`` and the vocabulary projection, a `Head`; its
keywords are bound with `functools.partial`. Full logits exist only in `logits`: the others work through
chunks of tokens, so that their memory does not grow with tokens x vocabulary (cf. Cut Cross-Entropy, arXiv:2411.09009).
A reader that needs some tokens of a single row only is wrapped in `At`: the last block then computes nothing of the others.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from trainer.functional.chunks import blocks
from trainer.functional.head import Head as Head
from trainer.functional.logprobs_gradient import LogProbs
from trainer.functional.objective import CrossEntropy
from trainer.functional.vocabulary_part import VocabularyPart as VocabularyPart

KEPT_BYTES = 256 * 2**20
"""Bytes of probabilities that a forward of log-probabilities keeps for its backward, instead of computing logits twice."""


@dataclass(frozen=True)
class At:
    """Reads the hidden states ``(1, n, d)`` of the tokens at ``places`` ``(n,)`` of a single row by ``read``."""

    places: Tensor
    read: Callable[[Tensor, Head], Any]

    def __call__(self, hidden: Tensor, head: Head) -> Any:
        return self.read(hidden.index_select(1, self.places), head)


def cross_entropy(
    hidden: Tensor,
    head: Head,
    *,
    targets: Tensor,
    mask: Tensor,
    places: Tensor | None = None,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Masked sum of next-token losses, with its gradient already computed on the way.

    ``targets`` ``(B, T)`` int64, ``mask`` ``(B, T)``: the weight of every target; those of weight 0 cost nothing.
    ``places`` ``(n,)``: which of the flattened targets have a weight; None = it is looked for where that does not wait for
    the device, and all are computed elsewhere.
    Returns the sum in nats (a float32 scalar, connected to the graph even where the mask is empty), the negative
    log-likelihoods ``(B, T)`` (float32, detached, 0 where masked), and the detached masked sum of ``logsumexp ** 2``.

    The loss of a token is ``(1 - s) * nll + s * mean over the vocabulary of -log p`` for label smoothing ``s`` (Szegedy et
    al. 2016, arXiv:1512.00567), plus ``z_loss * logsumexp ** 2`` (PaLM, arXiv:2204.02311).
    """
    flat = hidden.reshape(-1, hidden.shape[-1])
    weights = mask.reshape(-1).float()
    states, ids, w = flat, targets.reshape(-1), weights
    counted = weights.nonzero().squeeze(1) if places is None and weights.device.type == "cpu" else places
    if counted is not None and len(counted) < len(weights):
        states, ids, w = flat[counted], ids[counted], weights[counted]
    loss, nll, z = CrossEntropy.apply(  # type: ignore[no-untyped-call]
        states, head.weight, ids, w, z_loss, label_smoothing, working_dtype(hidden), head.cap, head.part
    )
    if counted is not None and len(counted) < len(weights):
        nll = torch.zeros_like(weights).index_copy_(0, counted, nll)
    return loss, (nll * (weights != 0)).view(mask.shape), z


def correct(hidden: Tensor, head: Head, *, targets: Tensor, mask: Tensor) -> Tensor:
    """How many targets with a mask are the likeliest token: a float64 scalar, without a gradient."""
    flat, ids, counts = hidden.detach().reshape(-1, hidden.shape[-1]), targets.reshape(-1), mask.reshape(-1) != 0
    hits = torch.zeros((), dtype=torch.float64, device=hidden.device)
    weight = head.weight.detach()  # a bound of the logits does not change which one is largest
    for part in blocks(len(ids), weight, None if head.part is None else head.part.largest):
        scores = flat[part] @ weight.to(flat.dtype).T
        likeliest = scores.argmax(1) if head.part is None else head.part.likeliest(scores)
        hits += (likeliest == ids[part])[counts[part]].sum()
    return hits


def logprobs(hidden: Tensor, head: Head, *, targets: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Log-probabilities of ``targets`` and entropies of the distributions, both ``(B, T)`` float32, in nats.

    Logits are divided by ``temperature``. Both are differentiable. The backward computes the logits again where their
    probabilities are larger than `KEPT_BYTES`, and for a gradient of the entropies.
    """
    dtype, weight = working_dtype(hidden), head.weight
    learnt = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    # In float16 probabilities that a loss scale has not yet raised would lose their small entries.
    keep = learnt and dtype is not torch.float16 and targets.numel() * weight.shape[0] * dtype.itemsize <= KEPT_BYTES
    values, entropy = LogProbs.apply(  # type: ignore[no-untyped-call]
        hidden.reshape(-1, hidden.shape[-1]), weight, targets.reshape(-1), temperature, dtype, keep, head.cap, head.part
    )
    return values.view(targets.shape), entropy.view(targets.shape)


def logprobs_at(places: Tensor, targets: Tensor, temperature: float = 1.0) -> At:
    """A reader of `logprobs`, ``(N,)`` each, of the ids that are predicted at ``places`` of a single row."""
    return At(places, partial(_of_row, targets, temperature))


def _of_row(targets: Tensor, temperature: float, hidden: Tensor, head: Head) -> tuple[Tensor, Tensor]:
    values, entropy = logprobs(hidden, head, targets=targets[None], temperature=temperature)
    return values[0], entropy[0]


def logits(hidden: Tensor, head: Head) -> Tensor:
    """Full logits ``(B, T, V)``, for generation and tests."""
    return head.logits(hidden)


def working_dtype(x: Tensor) -> torch.dtype:
    """What matrix products compute in: autocast's format, else the tensor's own."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
