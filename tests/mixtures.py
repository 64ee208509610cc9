"""Tiny mixtures of experts, with weights drawn from a seed."""

from typing import Any

import torch

from trainer.models.architecture import Architecture, Layer, Rope
from trainer.models.experts import MixtureOfExperts

SMALL: dict[str, Any] = {
    "vocab_size": 101, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 8, "max_position_embeddings": 256, "experts": 4, "experts_per_token": 2, "expert_size": 16,
}  # fmt: skip


def small(**features: Any) -> Architecture:
    """Two layers of experts."""
    layers = (Layer(rope=Rope(10000.0), sparse=True),) * 2
    return Architecture(**{**SMALL, "layers": layers, **features})


def mixture(**features: Any) -> MixtureOfExperts:
    """The experts of a layer."""
    layer, draw = MixtureOfExperts(small(**features)), torch.Generator().manual_seed(0)
    for parameter in layer.parameters():
        parameter.data = 0.3 * torch.randn(parameter.shape, generator=draw)
    return layer
