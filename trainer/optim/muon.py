"""Muon (Jordan et al. 2024): momentum whose matrices are orthogonalised, many of one shape at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the polynomial of a Newton-Schulz step."""
STACK_BYTES = 256 * 2**20
"""Bytes of matrices that one rank orthogonalises at once: enough for a device, little beside a model."""


@dataclass(frozen=True)
class Replicas:
    """Ranks that hold the same parameters and gradients, or parts of the same.

    Args:
        rank: This one's number.
        size: How many there are.
        stack: Gives a tensor ``(...)`` of every rank as ``(W, ...)``; collective.
    """

    rank: int = 0
    size: int = 1
    stack: Callable[[Tensor], Tensor] = lambda mine: mine[None]

    def of(self, parameter: Tensor) -> Replicas:
        """Those that hold a parameter, where they are not the same for all."""
        return self

    def shape_of(self, parameter: Tensor) -> torch.Size:
        """The shape of the matrix that a parameter, or what is here of it, belongs to."""
        return parameter.shape

    def joined(self, updates: Tensor) -> Tensor:
        """Updates ``(n, *shape)`` of matrices, of which those of what is here are given; collective."""
        return updates

    def own(self, updates: Tensor) -> Tensor:
        """What of updates ``(n, *shape)`` is for what is here."""
        return updates


class BatchedMuon(torch.optim.Muon):
    """PyTorch's Muon for many matrices of one shape at a time, each orthogonalised by one of the ``replicas``.

    A parameter is a matrix, or a stack of them ``(E, rows, columns)``, of which each is updated by itself.

    Like PyTorch's fused AdamW it divides gradients by ``grad_scale`` and does nothing where ``found_inf`` is 1, without
    asking the device.
    """

    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None
    replicas: Replicas = Replicas()

    def __init__(self, groups: Any, *, lr: float, weight_decay: float, momentum: float) -> None:
        # Not PyTorch's own, which refuses stacks of matrices.
        defaults = {
            "lr": lr, "weight_decay": weight_decay, "momentum": momentum, "nesterov": True, "ns_coefficients": COEFFICIENTS,
            "eps": 1e-7, "ns_steps": 5, "adjust_lr_fn": "match_rms_adamw",
        }  # fmt: skip
        torch.optim.Optimizer.__init__(self, groups, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None if closure is None else closure()
        for group in self.param_groups:
            alike: dict[tuple[Replicas, torch.Size], list[Tensor]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    replicas = self.replicas.of(parameter)
                    alike.setdefault((replicas, replicas.shape_of(parameter)), []).append(parameter)
            for (replicas, shape), parameters in alike.items():
                most = replicas.size * max(1, STACK_BYTES // (shape.numel() * parameters[0].element_size()))
                for first in range(0, len(parameters), most):
                    self._update(group, replicas, shape, parameters[first : first + most])
        return loss

    def _update(self, group: dict[str, Any], replicas: Replicas, shape: torch.Size, parameters: list[Tensor]) -> None:
        for parameter in parameters:
            state = self.state[parameter]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(parameter)
        buffers = [self.state[p]["momentum_buffer"] for p in parameters]
        momentum, lr, decay = group["momentum"], group["lr"], 1 - group["lr"] * group["weight_decay"]
        gradients = torch.stack([p.grad for p in parameters if p.grad is not None])
        if self.grad_scale is not None:
            gradients.div_(self.grad_scale)
        skipped = None if self.found_inf is None else self.found_inf > 0
        if skipped is not None:
            # Momentum that meets itself stays what it is, whatever the gradient was.
            gradients = torch.where(skipped, torch.stack(buffers), gradients)
        torch._foreach_lerp_(buffers, list(gradients.unbind()), 1 - momentum)
        directions = replicas.joined(gradients.lerp_(torch.stack(buffers), momentum))
        updates = replicas.own(_orthogonal(directions, group, replicas))
        if skipped is not None:
            updates = updates.masked_fill(skipped, 0)
            decay = torch.where(skipped, 1.0, torch.full_like(skipped, decay, dtype=torch.float32))
        rows, columns = shape[-2:]
        # Of the size of AdamW's updates (Liu et al. 2025, arXiv:2502.16982, eq. 4).
        rate = lr * 0.2 * math.sqrt(max(rows, columns))
        torch._foreach_mul_(parameters, decay)
        torch._foreach_add_(parameters, list(updates.float().unbind()), alpha=-rate)


def _orthogonal(updates: Tensor, group: dict[str, Any], replicas: Replicas) -> Tensor:
    """`orthogonal` of ``(n, ..., rows, columns)``, of which every replica computes as many."""
    shape, updates = updates.shape, updates.flatten(0, -3)
    count, ranks = len(updates), replicas.size
    mine = -(-count // ranks)
    if mine * ranks > count:
        updates = torch.cat([updates, updates.new_zeros(mine * ranks - count, *updates.shape[1:])])
    own = updates[replicas.rank * mine :][:mine]
    done = orthogonal(own, group["ns_coefficients"], group["ns_steps"], group["eps"])
    if ranks == 1:
        return done.view(shape)
    # As bytes: what carries tensors between CPUs does not know bfloat16.
    shared = replicas.stack(done.contiguous().view(torch.uint8))
    return shared.view(torch.bfloat16).flatten(0, 1)[:count].view(shape)


def orthogonal(matrices: Tensor, coefficients: Sequence[float], steps: int, eps: float) -> Tensor:
    """Matrices ``(n, rows, columns)`` with singular values near 1, in bfloat16, by ``steps`` of Newton and Schulz.

    On CPU one after another: a product of many small ones is no faster there.
    """
    if matrices.device.type == "cpu":
        return torch.stack([_newton_schulz(matrix, coefficients, steps, eps) for matrix in matrices])
    return _newton_schulz(matrices, coefficients, steps, eps)


def _newton_schulz(matrices: Tensor, coefficients: Sequence[float], steps: int, eps: float) -> Tensor:
    """Of ``(..., rows, columns)``."""
    a, b, c = coefficients
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.to(torch.bfloat16)
    x = x.mT if tall else x
    # Then the largest singular value is at most 1.
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=eps)
    add: Callable[..., Tensor] = torch.baddbmm if x.dim() == 3 else torch.addmm
    for _ in range(steps):
        gram = x @ x.mT
        x = add(x, add(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x
