"""Linear layers of blocks, whose weights may be rounded to an export's grid in their own forward.

There a sharded weight is whole; strategies, checkpoints and optimizers see the weights as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trainer.functional import working_dtype
from trainer.models.cpu_kernels import rearranged_product
from trainer.models.int_grid import fake
from trainer.parallel.cuts import cut
from trainer.parallel.mesh import UNDIVIDED, Axis


class LowRank(NamedTuple):
    """What an adapter adds to a weight: ``scale * B A`` of float32 A ``(r, i)`` and B ``(o, r)``."""

    a: Tensor
    b: Tensor
    scale: float

    def added_to(self, weight: Tensor) -> Tensor:
        """The merged weight ``(o, i)``, float32."""
        with torch.autocast(weight.device.type, enabled=False):
            return weight.float() + self.scale * (self.b @ self.a)


@dataclass
class FakeQuantizer:
    """Rounds weights in the forward to the grid of an integer export. All layers of a run that are rounded share one.

    bits: 4 or 8
    group: inputs that share a scale; 0 = whole rows
    start: the step from which it rounds; 0 = before the first one, too
    """

    bits: int
    group: int
    start: int = 0
    active: bool = field(init=False)
    _rounded: dict[tuple[int, bool], Tensor] | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self.begin(0)

    def begin(self, step: int) -> None:
        """Round in ``step`` and after it, or not yet."""
        self.active = step >= self.start

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None, adapter: LowRank | None = None) -> Tensor:
        """``x fake(W + scale B A)^T + bias``, ``(..., i)`` to ``(..., o)``, in the working format.

        W's gradient is that of the rounded weight (straight-through; Bengio et al. 2013, arXiv:1308.3432); an adapter gets
        none here.
        """
        dtype = working_dtype(x)
        x, bias = x.to(dtype), None if bias is None else bias.to(dtype)
        if self._rounded is None:
            parts = adapter or (None, None, 1.0)
            return _QuantizedProduct.apply(x, weight, bias, self.bits, self.group, *parts)  # type: ignore[no-any-return, no-untyped-call]
        key = (id(weight), adapter is None)
        if key not in self._rounded:
            merged = weight if adapter is None else adapter.added_to(weight)
            self._rounded[key] = fake(merged, self.bits, self.group, dtype)
        return F.linear(x, self._rounded[key], bias)

    def adapted_product(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, down: nn.Linear, up: nn.Linear, scale: float, inputs: Axis
    ) -> Tensor:
        """`product` with the adapter ``scale * B A``, A and B the weights of ``down`` and ``up``, and with their gradients.

        These are the ones that they have unrounded. ``inputs``: ranks that each have a part of them, as for `summed`.
        """
        # Of each matrix through its own forward, where it is whole if it is sharded.
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            a, b = (
                layer(torch.eye(layer.in_features, dtype=layer.weight.dtype, device=x.device)).T.float().contiguous()
                for layer in (down, up)
            )
        out = summed(lambda bias: self.product(x, weight, bias, LowRank(a, b, scale)), bias, inputs)
        if not torch.is_grad_enabled():
            return out
        added = up(inputs.leave(down(x.detach()))) * scale
        return out + (added - added.detach())  # type: ignore[no-any-return]

    @contextmanager
    def once(self) -> Iterator[None]:
        """Round every weight once, however often it is used inside: for forwards alone, of weights that do not change."""
        self._rounded = {}
        try:
            yield
        finally:
            self._rounded = None


class _QuantizedProduct(torch.autograd.Function):
    """It keeps the weight, and no rounded copy, which is computed again: ZeRO-3 shards the weight away meanwhile."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        bits: int,
        group: int,
        a: Tensor | None,
        b: Tensor | None,
        scale: float,
    ) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight, a, b)
        ctx.bits, ctx.group, ctx.scale = bits, group, scale
        return F.linear(x, fake(_merged(weight, a, b, scale), bits, group, x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, a, b = ctx.saved_tensors
        [gradient] = gradients
        of_x = of_weight = of_bias = None
        if ctx.needs_input_grad[0]:
            of_x = gradient @ fake(_merged(weight, a, b, ctx.scale), ctx.bits, ctx.group, gradient.dtype)
        if ctx.needs_input_grad[1]:
            of_weight = (gradient.flatten(0, -2).T @ x.flatten(0, -2)).to(weight.dtype)
        if ctx.needs_input_grad[2]:
            of_bias = gradient.flatten(0, -2).sum(0)
        return of_x, of_weight, of_bias, None, None, None, None, None


def _merged(weight: Tensor, a: Tensor | None, b: Tensor | None, scale: float) -> Tensor:
    return weight if a is None or b is None else LowRank(a, b, scale).added_to(weight)


def rounded_once(model: nn.Module) -> AbstractContextManager[object]:
    """Round a model's weights once, however often its forward uses them inside, where it rounds them at all."""
    quantizers = (getattr(module, "fake_quantizer", None) for module in model.modules())
    quantizer = next((q for q in quantizers if q is not None), None)
    return nullcontext() if quantizer is None else quantizer.once()


def rounded_weights(model: nn.Module) -> set[str]:
    """Names of the weights that a model's forward rounds now."""
    quantizers = {f"{name}.weight": getattr(module, "fake_quantizer", None) for name, module in model.named_modules()}
    return {name for name, quantizer in quantizers.items() if quantizer is not None and quantizer.active}


def summed(product: Callable[[Tensor | None], Tensor], bias: Tensor | None, inputs: Axis) -> Tensor:
    """What ``product`` makes of a bias; with ``inputs`` that ranks divide the sum of their products, and the bias once."""
    if inputs.size == 1:
        return product(bias)
    out = inputs.leave(product(None))
    return out if bias is None else out + bias.to(out.dtype)


def cut_outputs(layer: nn.Module, axis: Axis) -> None:
    """Leave a linear layer's rows for this rank of ``axis``; its weight has no values yet."""
    cut(layer, "weight", 0, axis)
    if layer.bias is not None:
        cut(layer, "bias", 0, axis)


class WeightProduct(nn.Module):
    """A layer that multiplies by a weight of its own.

    Attributes:
        fake_quantizer: Rounds the weight in the forward; None = nothing does.
        inputs: Ranks that each multiply a part of the inputs (Shoeybi et al. 2019, arXiv:1909.08053).
        rearranged: A copy of the weight that is multiplied faster, while there is one; it has no backward.
    """

    weight: Any
    bias: Any
    fake_quantizer: FakeQuantizer | None = None
    inputs: Axis = UNDIVIDED
    rearranged: Tensor | None = None

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """``x W^T + b``, of the rounded W where there is an active ``fake_quantizer``."""
        if self.fake_quantizer is not None and self.fake_quantizer.active:
            return self.fake_quantizer.product(x, self.weight, bias)
        if self.rearranged is None or torch.is_grad_enabled():
            return F.linear(x, self.weight, bias)
        return rearranged_product(x, self.rearranged, bias)

    def divide_outputs(self, axis: Axis) -> None:
        """Compute this rank's part of the outputs."""
        cut_outputs(self, axis)

    def divide_inputs(self, axis: Axis) -> None:
        """Multiply this rank's part of the inputs, and add up what the ranks have computed."""
        cut(self, "weight", 1, axis)
        self.inputs = axis


class BlockLinear(nn.Linear, WeightProduct):
    """A linear layer of a block, with what `WeightProduct` says of its weight."""

    def forward(self, x: Tensor) -> Tensor:
        return summed(partial(self.product, x), self.bias, self.inputs)
