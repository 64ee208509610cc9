"""Pure tensor functions that run inside a model's forward: what is read off the final hidden states.

A reader is called as ``read(hidden, weight)`` with ``hidden`` ``(B, T, d)`` and the vocabulary projection ``weight``
``(V, d)``; its keywords are bound with `functools.partial`. Full logits exist only in `logits`: the others work through
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
from torch.autograd.function import once_differentiable

BLOCK_BYTES = {"cpu": 12 * 2**20, "cuda": 512 * 2**20}
"""Float32 bytes of logits that exist at once: on CPU what stays near the caches, on CUDA what keeps the kernels long."""
GROUP_BYTES = 128 * 2**20
"""Bytes of logits' gradients, in the compute format, that go through one matrix product."""
KEPT_BYTES = 256 * 2**20
"""Bytes of probabilities that a forward of log-probabilities keeps for its backward, instead of computing logits twice."""


@dataclass(frozen=True)
class At:
    """Reads the hidden states ``(1, n, d)`` of the tokens at ``places`` ``(n,)`` of a single row by ``read``."""

    places: Tensor
    read: Callable[[Tensor, Tensor], Any]

    def __call__(self, hidden: Tensor, weight: Tensor) -> Any:
        return self.read(hidden.index_select(1, self.places), weight)


def cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    *,
    targets: Tensor,
    mask: Tensor,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Masked sum of next-token losses, with its gradient already computed on the way.

    ``targets`` ``(B, T)`` int64, ``mask`` ``(B, T)``: the weight of every target; those of weight 0 cost nothing.
    Returns the sum in nats (a float32 scalar, connected to the graph even where the mask is empty), the negative
    log-likelihoods ``(B, T)`` (float32, detached, 0 where masked), and the detached masked sum of ``logsumexp ** 2``.

    The loss of a token is ``(1 - s) * nll + s * mean over the vocabulary of -log p`` for label smoothing ``s`` (Szegedy et
    al. 2016, arXiv:1512.00567), plus ``z_loss * logsumexp ** 2`` (PaLM, arXiv:2204.02311).
    """
    flat = hidden.reshape(-1, hidden.shape[-1])
    weights = mask.reshape(-1).float()
    states, ids, w = flat, targets.reshape(-1), weights
    # Masked tokens are left out where looking for them does not wait for the device.
    counted = weights.nonzero().squeeze(1) if weights.device.type == "cpu" else None
    if counted is not None and len(counted) < len(weights):
        states, ids, w = flat[counted], ids[counted], weights[counted]
    loss, nll, z = _CrossEntropy.apply(  # type: ignore[no-untyped-call]
        states, weight, ids, w, z_loss, label_smoothing, working_dtype(hidden)
    )
    if counted is not None and len(counted) < len(weights):
        nll = torch.zeros_like(weights).index_copy_(0, counted, nll)
    return loss, (nll * (weights != 0)).view(mask.shape), z


def correct(hidden: Tensor, weight: Tensor, *, targets: Tensor, mask: Tensor) -> Tensor:
    """How many targets with a mask are the likeliest token: a float64 scalar, without a gradient."""
    flat, ids, counts = hidden.detach().reshape(-1, hidden.shape[-1]), targets.reshape(-1), mask.reshape(-1) != 0
    hits = torch.zeros((), dtype=torch.float64, device=hidden.device)
    for part in _blocks(len(ids), weight):
        hits += ((flat[part] @ weight.detach().to(flat.dtype).T).argmax(1) == ids[part])[counts[part]].sum()
    return hits


def logprobs(hidden: Tensor, weight: Tensor, *, targets: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Log-probabilities of ``targets`` and entropies of the distributions, both ``(B, T)`` float32, in nats.

    Logits are divided by ``temperature``. Both are differentiable. The backward computes the logits again where their
    probabilities are larger than `KEPT_BYTES`, and for a gradient of the entropies.
    """
    dtype = working_dtype(hidden)
    learnt = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    # In float16 probabilities that a loss scale has not yet raised would lose their small entries.
    keep = learnt and dtype is not torch.float16 and targets.numel() * weight.shape[0] * dtype.itemsize <= KEPT_BYTES
    values, entropy = _LogProbs.apply(  # type: ignore[no-untyped-call]
        hidden.reshape(-1, hidden.shape[-1]), weight, targets.reshape(-1), temperature, dtype, keep
    )
    return values.view(targets.shape), entropy.view(targets.shape)


def logprobs_at(places: Tensor, targets: Tensor, temperature: float = 1.0) -> At:
    """A reader of `logprobs`, ``(N,)`` each, of the ids that are predicted at ``places`` of a single row."""
    return At(places, partial(_of_row, targets, temperature))


def _of_row(targets: Tensor, temperature: float, hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    values, entropy = logprobs(hidden, weight, targets=targets[None], temperature=temperature)
    return values[0], entropy[0]


def logits(hidden: Tensor, weight: Tensor) -> Tensor:
    """Full logits ``(B, T, V)``, for generation and tests."""
    return torch.nn.functional.linear(hidden, weight)


def working_dtype(x: Tensor) -> torch.dtype:
    """What matrix products compute in: autocast's format, else the tensor's own."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def _split(tokens: int, size: int) -> list[slice]:
    """Slices of equal length, at most ``size``: a last one of a few tokens would cost as much as a full one."""
    count = -(-tokens // max(1, size))
    return [slice(tokens * n // count, tokens * (n + 1) // count) for n in range(count)]


def _groups(tokens: int, weight: Tensor, dtype: torch.dtype) -> list[slice]:
    return _split(tokens, max(GROUP_BYTES, BLOCK_BYTES[weight.device.type]) // (dtype.itemsize * weight.shape[0]))


def _blocks(tokens: int, weight: Tensor) -> list[slice]:
    return _split(tokens, BLOCK_BYTES[weight.device.type] // (4 * weight.shape[0]))


class _LogitsBuffer:
    """Memory for a block of logits, used again for every block: fresh pages cost more than the arithmetic."""

    def __init__(self, tokens: int, weight: Tensor, dtype: torch.dtype) -> None:
        most = max((s.stop - s.start for s in _blocks(tokens, weight)), default=0)
        # A group's blocks can be a token longer than those of all tokens.
        shape = (min(tokens, most + 1), weight.shape[0])
        self._wide = weight.new_empty(shape, dtype=torch.float32)
        self._narrow = self._wide if dtype is torch.float32 else weight.new_empty(shape, dtype=dtype)

    def __call__(self, states: Tensor, compute: Tensor) -> Tensor:
        """Float32 logits ``(n, V)`` of ``states`` ``(n, d)``, valid until the next call."""
        narrow, wide = self._narrow[: len(states)], self._wide[: len(states)]
        torch.mm(states, compute.T, out=narrow)
        return wide if self._narrow is self._wide else wide.copy_(narrow)


class _CrossEntropy(torch.autograd.Function):
    """The loss is a known weighted sum, so the softmax that gives it also gives its gradient: one pass, no logits kept."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        ids: Tensor,
        w: Tensor,
        z_loss: float,
        smoothing: float,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor, Tensor]:
        # In float16 a gradient that is not yet scaled would lose its small entries: float32 there, at the price of speed.
        if dtype is torch.float16:
            dtype = torch.float32
        compute, vocabulary = weight.detach().to(dtype), weight.shape[0]
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden) if wants_hidden else None
        grad_weight = None
        nll, lse_squares = hidden.new_empty(len(ids), dtype=torch.float32), hidden.new_zeros((), dtype=torch.float32)
        loss = hidden.new_zeros((), dtype=torch.float32)
        with torch.autocast(hidden.device.type, enabled=False):
            logits_of = _LogitsBuffer(len(ids), weight, dtype)
            for group in _groups(len(ids), weight, dtype):
                states, targets, scales = hidden[group].detach().to(dtype), ids[group, None], w[group]
                gradient = states.new_empty(len(states), vocabulary) if wants_hidden or wants_weight else None
                for part in _blocks(len(states), weight):
                    target, scale = targets[part], scales[part]
                    scores = logits_of(states[part], compute)
                    chosen = scores.gather(1, target).squeeze(1)
                    mean = scores.mean(1) if smoothing else chosen
                    top = scores.amax(1, keepdim=True)
                    probabilities = scores.sub_(top).exp_()
                    total = probabilities.sum(1, keepdim=True)
                    lse = (total.log() + top).squeeze(1)
                    nll[group][part] = lse - chosen
                    objective = lse - (1 - smoothing) * chosen - smoothing * mean + z_loss * lse.square()
                    loss += (objective * scale).sum()
                    lse_squares += (lse.square() * scale).sum()
                    if gradient is None:
                        continue
                    # d/dlogit = (1 + 2 z lse) p - (1 - s) onehot - s / V, times the token's weight.
                    probabilities.mul_(((1 + 2 * z_loss * lse) * scale)[:, None] / total)
                    if smoothing:
                        probabilities.sub_((scale * smoothing / vocabulary)[:, None])
                    probabilities.scatter_add_(1, target, -(1 - smoothing) * scale[:, None])
                    gradient[part] = probabilities
                if gradient is None:
                    continue
                if grad_hidden is not None:
                    grad_hidden[group] = gradient @ compute
                if wants_weight:
                    product = gradient.T @ states
                    grad_weight = product.float() if grad_weight is None else grad_weight.add_(product)
            if wants_weight and grad_weight is None:
                grad_weight = torch.zeros_like(weight, dtype=torch.float32)
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight.dtype
        ctx.mark_non_differentiable(nll, lse_squares)
        return loss, nll, lse_squares

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, *_: Any) -> tuple[Any, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        if grad_hidden is not None:
            grad_hidden = grad_hidden * upstream.to(grad_hidden.dtype)
        if grad_weight is not None:
            grad_weight = grad_weight.mul_(upstream).to(ctx.weight_dtype)
        return grad_hidden, grad_weight, None, None, None, None, None


class _LogProbs(torch.autograd.Function):
    """Log-probabilities under any upstream gradient: logits are never kept, probabilities where they are few."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, ids: Tensor, temperature: float, dtype: torch.dtype, keep: bool
    ) -> tuple[Tensor, Tensor]:
        values, entropies, lses = (hidden.new_empty(len(ids), dtype=torch.float32) for _ in range(3))
        compute = weight.detach().to(dtype)
        probabilities = hidden.new_empty((len(ids), len(weight)), dtype=dtype) if keep else None
        with torch.autocast(hidden.device.type, enabled=False):
            logits_of = _LogitsBuffer(len(ids), weight, dtype)
            for part in _blocks(len(ids), weight):
                target = ids[part, None]
                scores = logits_of(hidden[part].detach().to(dtype), compute)
                if temperature != 1.0:
                    scores.div_(temperature)
                top = scores.amax(1, keepdim=True)
                scores.sub_(top)
                chosen, p = scores.gather(1, target), scores.exp()
                total = p.sum(1, keepdim=True)
                norm = total.log()
                values[part] = (chosen - norm).squeeze(1)
                # H = log sum exp s - E[s], for s = logits less their largest.
                entropies[part] = (norm - scores.mul_(p).sum(1, keepdim=True) / total).squeeze(1)
                lses[part] = (norm + top).squeeze(1)
                if probabilities is not None:
                    # p - onehot, while it is float32: near 1 the difference is lost to a shorter format.
                    probabilities[part] = p.div_(total).scatter_add_(1, target, torch.full_like(total, -1.0))
        ctx.save_for_backward(hidden, weight, ids, lses, entropies, probabilities)
        ctx.set_materialize_grads(False)
        ctx.temperature, ctx.dtype = temperature, dtype
        return values, entropies

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, up_values: Tensor | None, up_entropies: Tensor | None) -> tuple[Any, ...]:
        hidden, weight, ids, lses, entropies, probabilities = ctx.saved_tensors
        dtype, compute = ctx.dtype, weight.detach().to(ctx.dtype)
        up_values = torch.zeros_like(lses) if up_values is None else up_values
        if probabilities is not None and up_entropies is None:
            with torch.autocast(hidden.device.type, enabled=False):
                factor = (up_values / -ctx.temperature)[:, None]
                grad_hidden = ((probabilities @ compute) * factor).to(hidden.dtype)
                grad_weight = probabilities.T @ (hidden * factor).to(dtype)
            return grad_hidden, grad_weight.to(weight.dtype), None, None, None, None
        up_entropies = torch.zeros_like(lses) if up_entropies is None else up_entropies
        grad_hidden, grad_weight = torch.empty_like(hidden), torch.zeros_like(weight, dtype=torch.float32)
        with torch.autocast(hidden.device.type, enabled=False):
            logits_of = _LogitsBuffer(len(ids), weight, dtype)
            for group in _groups(len(ids), weight, dtype):
                states = hidden[group].to(dtype)
                gradient = states.new_empty(len(states), weight.shape[0])
                for part in _blocks(len(states), weight):
                    lse, entropy, target = lses[group][part, None], entropies[group][part, None], ids[group][part, None]
                    up_value, up_entropy = up_values[group][part, None], up_entropies[group][part, None]
                    log_p = logits_of(states[part], compute).div_(ctx.temperature).sub_(lse)
                    p = log_p.exp()
                    # d entropy / d logit = -p (log p + H); d logprob / d logit = onehot - p.
                    scores = p.mul_(log_p.add_(entropy).mul_(up_entropy).add_(up_value).neg_())
                    scores.scatter_add_(1, target, up_value)
                    gradient[part] = scores.div_(ctx.temperature)
                grad_hidden[group] = gradient @ compute
                grad_weight += gradient.T @ states
        return grad_hidden, grad_weight.to(weight.dtype), None, None, None, None
