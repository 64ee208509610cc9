"""Weights in the order in which products on CPU read them: a copy, made once where it is read at every token."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from trainer.functional import Head, logits, working_dtype
from trainer.functional.head import bound
from trainer.models.actor_critic import of_policy
from trainer.models.cpu_kernels import has_rearranged_products, rearranged, rearranged_product
from trainer.models.linear import WeightProduct
from trainer.models.packed import lack_of_memory, warn_once

Logits = Callable[[Tensor, Head], Tensor]


@contextmanager
def rearranged_weights(model: nn.Module) -> Iterator[Logits]:
    """Hold a policy's weights rearranged, too, where it computes in bfloat16 on CPU and memory allows; gives a reader.

    What the model computes is the same, and `functional.logits` are what is read. Only forwards without gradients are faster.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    some = next(p for p in parameters.values() if p.is_floating_point())
    if some.device.type != "cpu" or working_dtype(some) is not torch.bfloat16 or not has_rearranged_products():
        yield logits
        return
    named = model.named_modules()
    layers = [part for name, part in named if isinstance(part, WeightProduct) and _rearranges(name, part)]
    head = parameters.get("lm_head.weight")
    shapes = [*(layer.weight.shape for layer in layers), *([] if head is None else [head.shape])]
    if lack := lack_of_memory(shapes, torch.bfloat16, some.device):
        warn_once(f"sampling rearranges the weights at every token: {lack}")
        yield logits
        return
    try:
        for layer in layers:
            layer.rearranged = rearranged(layer.weight.bfloat16())
        yield logits if head is None else partial(_logits, rearranged(head.bfloat16()))
    finally:
        for layer in layers:
            layer.rearranged = None


def _rearranges(name: str, layer: WeightProduct) -> bool:
    """Whether a layer multiplies by its own weight: the policy's, neither packed nor rounded."""
    rounded = layer.fake_quantizer is not None and layer.fake_quantizer.active
    return of_policy(name) and isinstance(layer.weight, Tensor) and not rounded


def _logits(copy: Tensor, hidden: Tensor, head: Head) -> Tensor:
    out = rearranged_product(hidden, copy)
    bound(out, head.cap)
    return out if head.part is None else head.part.joined(out)
