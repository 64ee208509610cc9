"""Log-probabilities under any upstream gradient, block by block."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from trainer.functional.chunks import LogitsBuffer, blocks, groups


class LogProbs(torch.autograd.Function):
    """Log-probabilities under any upstream gradient: logits are never kept, probabilities where they are few."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, ids: Tensor, temperature: float, dtype: torch.dtype, keep: bool
    ) -> tuple[Tensor, Tensor]:
        values, entropies, lses = (hidden.new_empty(len(ids), dtype=torch.float32) for _ in range(3))
        compute = weight.detach().to(dtype)
        probabilities = hidden.new_empty((len(ids), len(weight)), dtype=dtype) if keep else None
        with torch.autocast(hidden.device.type, enabled=False):
            logits_of = LogitsBuffer(len(ids), weight, dtype)
            for part in blocks(len(ids), weight):
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
            logits_of = LogitsBuffer(len(ids), weight, dtype)
            for group in groups(len(ids), weight, dtype):
                states = hidden[group].to(dtype)
                gradient = states.new_empty(len(states), weight.shape[0])
                for part in blocks(len(states), weight):
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
