"""Values of new parameters."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from trainer.models.delta import initial_delta

HEAD = "score.weight"
"""The vector of a model that scores."""


def initial(
    name: str, shape: Sequence[int], seed: int, deviation: float, layers: int, norm_offset: float = 0.0
) -> Tensor:
    """A new parameter's values, from a generator of its own, seeded by (seed, name).

    Matrices are normal, those that write to the residual stream scaled by 1 / sqrt(2 * layers) (Radford et al. 2019, GPT-2);
    norms are 1 less what is added to them, biases and attention's sinks 0. So a parameter's value depends neither on ranks
    nor on the order of construction.
    """
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    if (drawn := initial_delta(name, shape, generator)) is not None:
        return drawn
    if name.endswith(("bias", "sinks", "router.balance")):
        return torch.zeros(*shape)
    if len(shape) < 2 or "norm" in name.split(".")[-2]:
        return torch.full(shape, 1.0 - norm_offset)
    if name == HEAD:
        deviation = (shape[1] + 1) ** -0.5  # Stiennon et al. 2020, arXiv:2009.01325
    if name.endswith(("o_proj.weight", "down_proj.weight", "out_proj.weight")):
        deviation /= math.sqrt(2 * layers)
    return torch.empty(*shape).normal_(0.0, deviation, generator=generator)
