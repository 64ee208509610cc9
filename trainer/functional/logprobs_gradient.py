"""Log-probabilities under any upstream gradient, block by block."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

import trainer.functional.objective as objective
from trainer.functional.chunks import LogitsBuffer, blocks, groups
from trainer.functional.head import bound, tempered
from trainer.functional.vocabulary_part import VocabularyPart


class LogProbs(torch.autograd.Function):
    """Log-probabilities under any upstream gradient: logits are never kept, probabilities where they are few."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        ids: Tensor,
        temperature: float,
        dtype: torch.dtype,
        keep: bool,
        cap: float | None,
        own: VocabularyPart | None,
    ) -> tuple[Tensor, Tensor]:
        compute = weight.detach().to(dtype)
        probabilities = hidden.new_empty((len(ids), len(weight)), dtype=dtype) if keep else None
        read = _read_in_place if hidden.device.type in objective.IN_PLACE else _read_blocks
        read = read if own is None else partial(_read_part, own)
        with torch.autocast(hidden.device.type, enabled=False):
            values, entropies, lses = read(hidden.detach(), compute, ids, temperature, cap, probabilities)
        ctx.save_for_backward(hidden, weight, ids, lses, entropies, probabilities)
        ctx.set_materialize_grads(False)
        ctx.temperature, ctx.dtype, ctx.cap, ctx.own = temperature, dtype, cap, own
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
            return grad_hidden, grad_weight.to(weight.dtype), *[None] * 6
        # Of a part of the vocabulary from what the forward found of all: nothing is exchanged here.
        in_place = up_entropies is None and ctx.own is None and hidden.device.type in objective.IN_PLACE
        up_entropies = torch.zeros_like(lses) if up_entropies is None else up_entropies
        places, hits = ids, up_values
        if ctx.own is not None:
            places, here = ctx.own.places(ids)
            hits = up_values * here
        grad_hidden, grad_weight = torch.empty_like(hidden), torch.zeros_like(weight, dtype=torch.float32)
        with torch.autocast(hidden.device.type, enabled=False):
            buffer = None if in_place else LogitsBuffer(len(ids), weight, dtype)
            for group in groups(len(ids), weight, dtype):
                states = hidden[group].to(dtype)
                if buffer is None:
                    gradient = states @ compute.T
                    scale, slope = up_values[group] / -ctx.temperature, bound(gradient, ctx.cap)
                    objective.differentiate_block(gradient, ids[group, None], scale, 0.0, 0.0, ctx.temperature)
                    gradient = gradient if slope is None else gradient.mul_(slope)
                else:
                    columns = [t[group, None] for t in (places, lses, entropies, up_values, up_entropies, hits)]
                    gradient = _gradient_of_both(states, compute, buffer, columns, ctx.temperature, ctx.cap)
                grad_hidden[group] = gradient @ compute
                grad_weight += gradient.T @ states
        return grad_hidden, grad_weight.to(weight.dtype), *[None] * 6


def _read_blocks(
    hidden: Tensor, compute: Tensor, ids: Tensor, temperature: float, cap: float | None, probabilities: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities of ``ids`` ``(n,)``, entropies and lse, float32.

    ``probabilities`` ``(n, V)``: filled with them, less 1 at the ids, times the slope of a ``cap``.
    """
    values, entropies, lses = (hidden.new_empty(len(ids), dtype=torch.float32) for _ in range(3))
    logits_of = LogitsBuffer(len(ids), compute, compute.dtype)
    for part in blocks(len(ids), compute):
        target = ids[part, None]
        scores = logits_of(hidden[part].to(compute.dtype), compute)
        slope = bound(scores, cap)
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
            p.div_(total).scatter_add_(1, target, torch.full_like(total, -1.0))
            probabilities[part] = p if slope is None else p.mul_(slope)
    return values, entropies, lses


def _read_part(
    own: VocabularyPart,
    hidden: Tensor,
    compute: Tensor,
    ids: Tensor,
    temperature: float,
    cap: float | None,
    probabilities: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `_read_blocks`, where ``compute`` and ``probabilities`` are of this rank's part of the vocabulary."""
    values, entropies, lses = (hidden.new_empty(len(ids), dtype=torch.float32) for _ in range(3))
    places, here = own.places(ids)
    logits_of = LogitsBuffer(len(ids), compute, compute.dtype)
    for part in blocks(len(ids), compute, own.largest):
        target = places[part, None]
        scores = logits_of(hidden[part].to(compute.dtype), compute)
        slope = bound(scores, cap)
        if temperature != 1.0:
            scores.div_(temperature)
        top, at_target = scores.amax(1), scores.gather(1, target).squeeze(1)
        p = scores.sub_(top[:, None]).exp()
        total, chosen = p.sum(1), torch.where(here[part], at_target, 0.0)
        # The sum of p * score, for scores less the largest of all parts, is made of those less the largest of each.
        every = own.softmax(top, total, chosen, scores.mul_(p).sum(1))
        tops, totals, _, means = every.parts
        expected = ((means + (tops - every.top) * totals) * every.share).sum(0) / every.total
        norm = every.total.log()
        values[part], entropies[part], lses[part] = every.chosen - every.top - norm, norm - expected, norm + every.top
        if probabilities is not None:
            p.mul_((every.share[own.rank] / every.total)[:, None])
            p.scatter_add_(1, target, -here[part, None].float())
            probabilities[part] = p if slope is None else p.mul_(slope)
    return values, entropies, lses


def _read_in_place(
    hidden: Tensor, compute: Tensor, ids: Tensor, temperature: float, cap: float | None, probabilities: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """As `_read_blocks`: logits stay in the compute format, and what is to be kept takes their place."""
    chosen, lses, expected = (hidden.new_empty(len(ids), dtype=torch.float32) for _ in range(3))
    for group in groups(len(ids), compute, compute.dtype):
        scores, target = hidden[group].to(compute.dtype) @ compute.T, ids[group, None]
        slope = bound(scores, cap)
        chosen[group] = tempered(scores.gather(1, target).squeeze(1), temperature)
        top, place = scores.max(1, keepdim=True)
        top, lse, mean = tempered(top, temperature), lses[group], expected[group]
        for part in blocks(len(scores), compute):
            wide = tempered(scores[part], temperature)
            p = torch.softmax(wide, 1, dtype=torch.float32)
            # The largest one is at least 1 / V, so its logarithm is exact where a target's own may be that of 0.
            torch.sub(top[part, 0], p.gather(1, place[part]).squeeze(1).log(), out=lse[part])
            torch.sum(wide * p, 1, out=mean[part])
            if probabilities is not None:
                scores[part] = p
        if probabilities is not None:
            # From float32: near 1 the difference of p and 1 is lost to a shorter format.
            at_target = torch.expm1(chosen[group] - lse)
            scores.scatter_(1, target, at_target[:, None].to(scores.dtype))
            probabilities[group] = scores if slope is None else scores.mul_(slope)
    return chosen - lses, lses - expected, lses


def _gradient_of_both(
    states: Tensor,
    compute: Tensor,
    logits_of: LogitsBuffer,
    columns: list[Tensor],
    temperature: float,
    cap: float | None,
) -> Tensor:
    """The gradient of logits ``(n, V)`` for upstream gradients of log-probabilities and of entropies.

    ``columns``, ``(n, 1)`` each: ids, lse, entropies, both upstream gradients, and that of the chosen logits.
    """
    gradient = states.new_empty(len(states), len(compute))
    for part in blocks(len(states), compute):
        target, lse, entropy, up_value, up_entropy, hit = (column[part] for column in columns)
        bounded = logits_of(states[part], compute)
        slope = bound(bounded, cap)
        log_p = bounded.div_(temperature).sub_(lse)
        p = log_p.exp()
        # d entropy / d logit = -p (log p + H); d logprob / d logit = onehot - p.
        scores = p.mul_(log_p.add_(entropy).mul_(up_entropy).add_(up_value).neg_())
        scores.scatter_add_(1, target, hit)
        gradient[part] = scores.div_(temperature) if slope is None else scores.div_(temperature).mul_(slope)
    return gradient
