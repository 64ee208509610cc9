"""How many weights an architecture has, and which of them multiply a token: read off a model without memory."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Weights:
    """Elements of a model by what can divide them.

    Attributes:
        tables: embeddings of tokens and their projection, tied ones once.
        matrices: linear layers of the blocks.
        keys: those of them that make keys and values, which have heads of their own.
        experts: matrices of experts.
        rest: norms, routers, biases: every rank that computes a layer has them.
    """

    tables: int
    matrices: int
    keys: int
    experts: int
    rest: int


@cache
def weights_of(a: Architecture) -> Weights:
    """The elements of `parameters_of` by what can divide them."""
    with torch.device("meta"):
        modules = dict(Transformer(a).named_modules())
    linears = {name: m.weight.numel() for name, m in modules.items() if isinstance(m, nn.Linear) and "layers." in name}
    keys = sum(size for name, size in linears.items() if name.endswith(("k_proj", "v_proj")))
    stacked = (p for m in modules.values() if isinstance(m, GroupedLinear) for p in m.parameters())
    experts = sum(p.numel() for p in stacked)
    tables = a.vocab_size * a.hidden_size * (1 if a.tie_word_embeddings or a.scores else 2)
    matrices = sum(linears.values()) - keys
    return Weights(tables, matrices, keys, experts, parameters_of(a) - tables - matrices - keys - experts)


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
