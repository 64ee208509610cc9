"""Cross-entropy whose gradient is computed on the way: what becomes of logits, block by block, and the sums that remain."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from trainer.functional.chunks import LogitsBuffer, blocks, groups, partition
from trainer.functional.head import bound, tempered
from trainer.functional.vocabulary_part import VocabularyPart, part_of_gradient

IN_PLACE = {"cuda"}
"""Devices where logits stay in the compute format and the gradient takes their place: few kernels, each over all of them."""


class CrossEntropy(torch.autograd.Function):
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
        cap: float | None,
        own: VocabularyPart | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        # In float16 a gradient that is not yet scaled would lose its small entries: float32 there, at the price of speed.
        if dtype is torch.float16:
            dtype = torch.float32
        compute, rows = weight.detach().to(dtype), None if own is None else own.largest
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden) if wants_hidden else None
        grad_weight = None
        objective = Objective(ids, w, z_loss, smoothing, weight.shape[0], own)
        in_place, wanted = hidden.device.type in IN_PLACE, wants_hidden or wants_weight
        with torch.autocast(hidden.device.type, enabled=False):
            buffer = None if in_place else LogitsBuffer(len(ids), weight, dtype)
            for group in groups(len(ids), weight, dtype, rows):
                states = hidden[group].detach().to(dtype)
                if buffer is None:
                    gradient = states @ compute.T
                    slope = bound(gradient, cap)
                    objective.differentiate_in_place(group, gradient)
                    gradient = gradient if slope is None else gradient.mul_(slope)
                else:
                    gradient = states.new_empty(len(states) if wanted else 0, weight.shape[0])
                    for part in blocks(len(states), weight, rows):
                        at = slice(group.start + part.start, group.start + part.stop)
                        scores = buffer(states[part], compute)
                        slope = bound(scores, cap)
                        objective.differentiate(at, scores, gradient[part] if wanted else None, slope)
                if grad_hidden is not None:
                    grad_hidden[group] = gradient @ compute
                if wants_weight:
                    grad_weight = _added(grad_weight, gradient.T @ states)
                del gradient  # or two groups' would meet
            if wants_weight and grad_weight is None:
                grad_weight = torch.zeros_like(weight, dtype=torch.float32)
            parts = [slice(None)] if in_place else partition(len(ids), weight, dtype, rows)
            loss, nll, lse_squares = objective.sums(parts)
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
        return grad_hidden, grad_weight, *[None] * 7


def _added(total: Tensor | None, product: Tensor) -> Tensor:
    """A float32 sum, whose first part is ``product``."""
    return product.float() if total is None else total.add_(product)


class Objective:
    """Of n tokens: ``(1 - s) * nll + s * mean of -log p + z * lse ** 2``, times a weight each; block by block.

    Float32 ``(n,)``, filled as blocks are differentiated: ``lse``, the ``chosen`` logits, and their ``mean``.
    With a part of the vocabulary as this rank's ``own``, logits and gradients are of that part, and values of all.
    """

    def __init__(
        self, ids: Tensor, weights: Tensor, z_loss: float, smoothing: float, vocabulary: int, own: VocabularyPart | None
    ) -> None:
        self.ids, self.weights, self.own = ids, weights, own
        self.vocabulary = vocabulary if own is None else own.size
        self.places, self.hits = ids, weights
        if own is not None:
            self.places, here = own.places(ids)
            self.hits = weights * here
        self.z_loss, self.smoothing = z_loss, smoothing
        self.lse, self.chosen = torch.empty_like(weights), torch.empty_like(weights)
        self.mean = torch.empty_like(weights) if smoothing else self.chosen

    def differentiate(self, part: slice, scores: Tensor, gradient: Tensor | None, slope: Tensor | None = None) -> None:
        """Take note of tokens ``part`` with their float32 logits ``(n, V)``, which are used up; write the loss's gradient.

        ``slope`` ``(n, V)``: of logits that were bounded.
        """
        target, scale, z, s = self.places[part, None], self.weights[part], self.z_loss, self.smoothing
        self.chosen[part] = scores.gather(1, target).squeeze(1)
        if s:
            self.mean[part] = scores.mean(1)
        top = scores.amax(1, keepdim=True)
        probabilities = scores.sub_(top).exp_()
        total = probabilities.sum(1, keepdim=True)
        if self.own is None:
            self.lse[part] = (total.log() + top).squeeze(1)
        else:
            total = self._of_all(self.own, part, top.squeeze(1), total.squeeze(1), scores.shape[1])
        lse = self.lse[part]
        if gradient is None:
            return
        # d/dlogit = (1 + 2 z lse) p - (1 - s) onehot - s / V, times the token's weight.
        probabilities.mul_(((1 + 2 * z * lse) * scale)[:, None] / total)
        if s:
            probabilities.sub_((scale * s / self.vocabulary)[:, None])
        probabilities.scatter_add_(1, target, -(1 - s) * self.hits[part, None])
        gradient.copy_(probabilities if slope is None else probabilities.mul_(slope))

    def _of_all(self, own: VocabularyPart, part: slice, top: Tensor, total: Tensor, rows: int) -> Tensor:
        """Take note of all ranks' parts; gives what exp(logit - ``top``) of this one is to be divided by, ``(n, 1)``."""
        _, here = own.places(self.ids[part])
        sums = (self.mean[part] * rows,) if self.smoothing else ()
        every = own.softmax(top, total, torch.where(here, self.chosen[part], 0.0), *sums)
        self.chosen[part], self.lse[part] = every.chosen, every.total.log() + every.top
        if self.smoothing:
            self.mean[part] = every.parts[-1].sum(0) / own.size
        return (every.total / every.share[own.rank])[:, None]

    def differentiate_in_place(self, group: slice, scores: Tensor) -> None:
        """As `differentiate`, of logits in the compute format, whose place the gradient takes."""
        ids, how = self.ids[group], (self.weights[group], self.z_loss, self.smoothing)
        if self.own is None:
            lse, chosen, mean = differentiate_block(scores, ids[:, None], *how)
        else:
            lse, chosen, mean = part_of_gradient(scores, ids, *how, self.own)
        self.lse[group], self.chosen[group] = lse, chosen
        if self.smoothing:
            self.mean[group] = mean

    def sums(self, parts: list[slice]) -> tuple[Tensor, Tensor, Tensor]:
        """The loss, the negative log-likelihoods ``(n,)`` and the sum of ``lse ** 2``, added up part by part."""
        lse, chosen, s = self.lse, self.chosen, self.smoothing
        objective = (lse - (1 - s) * chosen - s * self.mean + self.z_loss * lse.square()) * self.weights
        squares = lse.square() * self.weights
        loss, lse_squares = objective.new_zeros(()), objective.new_zeros(())
        for part in parts:
            loss += objective[part].sum()
            lse_squares += squares[part].sum()
        return loss, lse - chosen, lse_squares


def eager_gradient(
    scores: Tensor, target: Tensor, scale: Tensor, z: float, s: float, temperature: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Replace logits ``(n, V)`` by the gradient of `Objective`; gives lse, the chosen logits, and their mean, float32.

    ``target`` ``(n, 1)``; ``scale`` ``(n,)``: the weights; ``z``, ``s``: of the z-loss and the smoothing. With a
    ``temperature`` all of it is of the logits that were divided by it.
    """
    chosen = tempered(scores.gather(1, target).squeeze(1), temperature).float()
    mean = tempered(scores, temperature).mean(1, dtype=torch.float32) if s else chosen
    top, place = scores.max(1, keepdim=True)
    top = tempered(top, temperature)
    lse, even = torch.empty_like(scale), scale * (-s / scores.shape[1])
    for part in blocks(len(scores), scores.T):
        probabilities = torch.softmax(tempered(scores[part], temperature), 1, dtype=torch.float32)
        # The largest one is at least 1 / V, so its logarithm is exact where a target's own may be that of 0.
        torch.sub(top[part, 0], probabilities.gather(1, place[part]).squeeze(1).log(), out=lse[part])
        factor = (1 + 2 * z * lse[part]) * scale[part] if z else scale[part]
        if s:
            torch.addcmul(even[part, None], probabilities, factor[:, None], out=scores[part])
        else:
            torch.mul(probabilities, factor[:, None], out=scores[part])
        del probabilities  # or two blocks' would meet
    # From float32: near 1 the difference of p and 1 is lost to a shorter format.
    at_target = ((chosen - lse).exp() * (1 + 2 * z * lse) - (1 - s)) * scale + even
    scores.scatter_(1, target, at_target[:, None].to(scores.dtype))
    return lse, chosen, mean


def fused_gradient(
    scores: Tensor, target: Tensor, scale: Tensor, z: float, s: float, temperature: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """As `eager_gradient`, in a form of which the compiler makes two passes over the logits."""
    wide = scores.float() / temperature
    chosen = wide.gather(1, target).squeeze(1)
    mean = wide.mean(1) if s else chosen
    lse = wide.logsumexp(1)
    hit = torch.arange(scores.shape[1], device=scores.device) == target
    gradient = (1 + 2 * z * lse)[:, None] * (wide - lse[:, None]).exp() - s / scores.shape[1]
    scores.copy_((gradient - torch.where(hit, 1 - s, 0.0)) * scale[:, None])
    return lse, chosen, mean


class GradientBlock:
    """`eager_gradient`, or once it is to be compiled, `fused_gradient`."""

    def __init__(self) -> None:
        self._function: Callable[..., Any] = eager_gradient

    def compile(self, backend: str | Callable[..., Any] = "inductor") -> None:
        """Compile from now on."""
        self._function = torch.compile(fused_gradient, backend=backend)

    def __call__(self, *inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        return self._function(*inputs)  # type: ignore[no-any-return]


differentiate_block = GradientBlock()


def compile_loss(backend: str | Callable[..., Any]) -> None:
    """Compile what becomes of logits where they stay in place."""
    differentiate_block.compile(backend)
