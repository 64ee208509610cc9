"""How many weights an architecture has, and which of them multiply a token: read off a model without memory."""

from __future__ import annotations

import dataclasses
from functools import cache

import torch
from torch import nn

from trainer.models.architecture import Architecture
from trainer.models.experts import Router, SharedExpertGate
from trainer.models.grouped import GroupedLinear
from trainer.models.transformer import Transformer


@cache
def parameters_of(a: Architecture) -> int:
    """Elements of all parameters, tied ones once."""
    with torch.device("meta"):
        return sum(p.numel() for p in Transformer(a).parameters())


@cache
def multiplied_by(a: Architecture) -> int:
    """Weights that multiply a token: all but the input embedding; a tied one counts once, as the projection.

    Of experts those that a token goes to.
    """
    with torch.device("meta"):
        model = Transformer(dataclasses.replace(a, scores=False))
    plain = (nn.Linear, Router, SharedExpertGate)
    linears = sum(m.weight.numel() for m in model.modules() if isinstance(m, plain))
    stacked = sum(m.experts * m.inputs * m.outputs for m in model.modules() if isinstance(m, GroupedLinear))
    return linears + stacked * a.experts_per_token // max(a.experts, 1) + a.vocab_size * a.hidden_size


def linear_widths(a: Architecture) -> dict[str, int]:
    """Inputs of every linear layer of the blocks, by its weight; embedding, head, norms, routers and experts are none."""
    with torch.device("meta"):
        blocks = Transformer(a).model.layers
    modules = blocks.named_modules(prefix="model.layers")
    return {f"{name}.weight": module.in_features for name, module in modules if isinstance(module, nn.Linear)}
