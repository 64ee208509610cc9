"""The shape of a model from scratch, in Hugging Face's words."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from trainer.config import setting
from trainer.models.architecture import Architecture, Layer
from trainer.models.families import FAMILIES
from trainer.models.layers import resolved
from trainer.models.mlp import ACTIVATIONS


@dataclass(frozen=True)
class Shape:
    """What a model from scratch is told of its shape; names are those of Hugging Face's ``config.json``."""

    family: str = setting("llama", "the Hugging Face architecture that the export is written as", choices=FAMILIES)
    hidden_size: int = setting(256, "width of the residual stream", least=2)
    intermediate_size: int = setting(704, "width of the MLP", least=1)
    num_hidden_layers: int = setting(4, "blocks", least=1)
    num_attention_heads: int = setting(4, "query heads", least=1)
    num_key_value_heads: int = setting(4, "key and value heads, which query heads share in groups", least=1)
    head_dim: int = setting(64, "width of a head", least=2)
    max_position_embeddings: int = setting(2048, "longest document, tokens", least=1)
    rope_theta: float = setting(10000.0, "base of the rotary wavelengths", above=0)
    rope_scaling: dict[str, Any] | None = setting(
        None, "null, or rope_type (linear, llama3, yarn, longrope) and its parameters; beside model.path, too"
    )
    partial_rotary_factor: float | None = setting(
        None, "part of a head that turns; null = the family's", above=0, most=1
    )
    rms_norm_eps: float = setting(1e-5, "added to the mean square, or variance", above=0)
    tie_word_embeddings: bool = setting(True, "whether input and output embeddings are one tensor")
    attention_bias: bool | None = setting(
        None, "biases of the query, key and value projections; null = the family's, mostly none"
    )
    attention_output_bias: bool | None = setting(None, "bias of the output projection; null = the family's")
    mlp_bias: bool | None = setting(None, "biases of the MLP; null = the family's")
    activation: str | None = setting(None, "of the MLP; null = the family's, mostly silu", choices=ACTIVATIONS)
    qk_norm: bool | None = setting(None, "normalise queries and keys; null = as the family does (Qwen3)")
    sliding_window: int | None = setting(
        None, "tokens that attention looks back on, itself included; null = all", least=1
    )
    full_attention_every: int | None = setting(
        None, "with a window: every n-th layer sees all; null = as in the family", least=1
    )
    attention_scale: float | None = setting(
        None, "factor of attention's scores; null = the family's, mostly 1 / sqrt(head_dim)", above=0
    )
    score_cap: float | None = setting(None, "bound of attention's scores; null = the family's", above=0)
    logit_cap: float | None = setting(None, "bound of the logits; null = the family's", above=0)
    embedding_scale: float | None = setting(None, "factor of the embeddings; null = the family's", above=0)
    residual_scale: float | None = setting(None, "factor of what attention and MLP add; null = the family's", above=0)
    logit_scale: float | None = setting(None, "factor of the logits; null = the family's", above=0)
    delta_key_heads: int | None = setting(
        None, "heads of keys of a gated delta rule (qwen3_5_text); null = the family's", least=1
    )
    delta_value_heads: int | None = setting(None, "its heads of values, a multiple; null = the family's", least=1)
    delta_key_size: int | None = setting(None, "width of its keys; null = the family's", least=1)
    delta_value_size: int | None = setting(None, "width of its values; null = the family's", least=1)
    experts: int = setting(0, "MLPs of a layer that a token is routed to some of; 0 = one for all tokens", least=0)
    experts_per_token: int = setting(2, "experts that a token goes to", least=1)
    expert_size: int | None = setting(None, "width of an expert; null = intermediate_size", least=1)
    shared_size: int = setting(0, "width of an MLP that every token goes to beside its experts; 0 = none", least=0)
    dense_layers: int = setting(0, "first layers with one MLP for all tokens, though the others have experts", least=0)
    router_normalised: bool | None = setting(
        None, "whether the weights of a token's experts add up to 1; null = as in the family"
    )
    router_scale: float | None = setting(None, "factor of those weights; null = the family's", above=0)
    initializer_range: float = setting(0.02, "standard deviation of new matrices", above=0)


SIZES = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim")
"""Settings that a family's `config.json` has under names of its own."""


OF_EXPERTS = ("experts", "experts_per_token", "expert_size", "shared_size", "router_normalised", "router_scale")
"""Settings that mean nothing without experts."""


def needless(shape: Shape) -> Iterator[str]:
    """One sentence for each setting that has no effect without another one."""
    needing = {"sliding_window": ("full_attention_every",), "experts": (*OF_EXPERTS[1:], "dense_layers")}
    defaults = {f.name: f.default for f in dataclasses.fields(shape)}
    for needed, names in needing.items():
        for name in names if not getattr(shape, needed) else ():
            if (value := getattr(shape, name)) != defaults[name]:
                yield f"model.{name}={str(value).lower()} has no effect without model.{needed}; leave it out, or set both"


def architecture_of(shape: Shape, vocab_size: int) -> Architecture:
    """A new model's architecture: its family's ``config.json`` with these settings in it, and what is set besides."""
    row = FAMILIES[shape.family]
    config: dict[str, Any] = {
        "model_type": shape.family,
        "vocab_size": vocab_size,
        **{row.named[name].name: getattr(shape, name) for name in SIZES},
        "num_hidden_layers": shape.num_hidden_layers,
        "max_position_embeddings": shape.max_position_embeddings,
        "rope_theta": shape.rope_theta,
        "rope_parameters": {"rope_type": "default"},  # else the class's own
        "rope_scaling": shape.rope_scaling,
        "partial_rotary_factor": shape.partial_rotary_factor,
        "position_embedding_type": "rope",
        "sliding_window": shape.sliding_window,
        "use_sliding_window": shape.sliding_window is not None,
        "max_window_layers": 0,
        "sliding_window_pattern": shape.full_attention_every,
    }
    a = row.read(config)
    settings = {f.name: getattr(shape, f.name) for f in dataclasses.fields(shape) if hasattr(a, f.name)}
    changes = {name: value for name, value in settings.items() if value is not None and name != "num_hidden_layers"}
    if "qk_norm" in changes:
        changes["qk_norm"] = (a.qk_norm or "head") if shape.qk_norm else ""
    layers = a.layers
    if not any(layer.window for layer in layers):
        layers = tuple(_windowed(shape, n, layer) for n, layer in enumerate(layers))
    if shape.experts:
        changes["expert_size"] = shape.expert_size or shape.intermediate_size
    else:
        changes = {name: value for name, value in changes.items() if name not in OF_EXPERTS}
        changes |= dict.fromkeys(OF_EXPERTS[:4], 0)
    sparse = [shape.experts > 0 and n >= shape.dense_layers for n in range(len(layers))]
    layers = tuple(dataclasses.replace(layer, sparse=on) for layer, on in zip(layers, sparse, strict=True))
    return dataclasses.replace(a, **changes, layers=layers)


def _windowed(shape: Shape, number: int, layer: Layer) -> Layer:
    """Of a family that has no windows: what cannot be written is then named."""
    every = shape.full_attention_every
    full = every is not None and (number + 1) % every == 0
    return dataclasses.replace(layer, window=None if full else shape.sliding_window)


def stretched(a: Architecture, scaling: dict[str, Any]) -> Architecture:
    """A folder's architecture with another scaling of its rotation, and as many positions as that reaches.

    Layers with a window keep theirs: nothing that they see is further away than before.
    """
    positions = a.max_position_embeddings
    scaling = resolved(
        {"original_max_position_embeddings": positions, **scaling}, {"max_position_embeddings": positions}
    )
    by_type = FAMILIES[a.family].layers.rope == "by_type"
    layers = tuple(
        layer
        if layer.rope is None or (by_type and layer.window is not None)
        else dataclasses.replace(layer, rope=dataclasses.replace(layer.rope, scaling=scaling))
        for layer in a.layers
    )
    reach = scaling.get("factor", 1.0) * scaling.get("original_max_position_embeddings", positions)
    return dataclasses.replace(a, layers=layers, max_position_embeddings=max(positions, int(reach)))
