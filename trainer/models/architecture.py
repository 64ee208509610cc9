"""The shape of a decoder, in Hugging Face's words, and which family of theirs can express it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum, auto
from itertools import product
from typing import Any

from trainer.config import setting

BIASES = ("attention_bias", "attention_output_bias", "mlp_bias")


class Sliding(Enum):
    """The layers that a family's sliding window can be of."""

    none = auto()
    every_layer = auto()
    some_layers = auto()


@dataclass(frozen=True)
class Family:
    """An architecture of Hugging Face's that this decoder computes.

    ``classes``: what the names of its classes begin with, as in ``LlamaForCausalLM``.
    ``bias_keys``: the key of ``config.json`` for each of `BIASES` that a model of this family may have.
    ``always_biased``: those of `BIASES` that every model of it has.
    ``qk_norm``: whether its queries and keys are normalised.
    ``sliding``: the layers that its window is of.
    ``default_window``: its sliding window where ``config.json`` names none, tokens.
    ``default_head_dim``: its heads' width where ``config.json`` names none; None = hidden size over heads.
    """

    classes: str
    bias_keys: Mapping[str, str] = field(default_factory=dict)
    always_biased: tuple[str, ...] = ()
    qk_norm: bool = False
    sliding: Sliding = Sliding.none
    default_window: int | None = None
    default_head_dim: int | None = None

    def read_biases(self, config: Mapping[str, Any]) -> dict[str, bool]:
        """Which biases a model has, by its ``config.json``."""
        return {
            name: name in self.always_biased or bool(name in self.bias_keys and config.get(self.bias_keys[name], False))
            for name in BIASES
        }

    def possible_biases(self) -> list[dict[str, bool]]:
        """Every set of biases that its ``config.json`` can express."""
        keys = list(dict.fromkeys(self.bias_keys.values()))
        values = product([False, True], repeat=len(keys))
        return [self.read_biases(dict(zip(reversed(keys), choice, strict=True))) for choice in values]


BOTH_PROJECTIONS = {"attention_bias": "attention_bias", "attention_output_bias": "attention_bias"}
FAMILIES: dict[str, Family] = {
    "llama": Family("Llama", bias_keys={**BOTH_PROJECTIONS, "mlp_bias": "mlp_bias"}),
    "mistral": Family("Mistral", sliding=Sliding.every_layer, default_window=4096),
    "qwen2": Family("Qwen2", always_biased=("attention_bias",), sliding=Sliding.some_layers),
    "qwen3": Family(
        "Qwen3", bias_keys=BOTH_PROJECTIONS, qk_norm=True, sliding=Sliding.some_layers, default_head_dim=128
    ),
}
"""Families by ``model_type``. A user's module may add its own."""

SCALINGS = ("default", "linear", "llama3", "yarn")


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
    rope_scaling: dict[str, Any] | None = setting(None, "null, or rope_type (linear, llama3, yarn) and its parameters")
    rms_norm_eps: float = setting(1e-5, "added to the mean square", above=0)
    tie_word_embeddings: bool = setting(True, "whether input and output embeddings are one tensor")
    attention_bias: bool = setting(False, "biases of the query, key and value projections")
    attention_output_bias: bool = setting(False, "bias of the output projection")
    mlp_bias: bool = setting(False, "biases of the MLP")
    qk_norm: bool = setting(False, "normalise queries and keys (Qwen3)")
    sliding_window: int | None = setting(
        None, "tokens that attention looks back on, itself included; null = all", least=1
    )
    initializer_range: float = setting(0.02, "standard deviation of new matrices", above=0)


@dataclass(frozen=True, kw_only=True)
class Architecture(Shape):
    """A decoder's whole shape.

    ``sliding_layers``: numbers of the layers that ``sliding_window`` holds for; None = all.
    ``scores``: one score of a sequence instead of logits (``...ForSequenceClassification`` with ``num_labels`` 1).
    """

    vocab_size: int
    sliding_layers: tuple[int, ...] | None = None
    scores: bool = False

    def window(self, layer: int) -> int | None:
        """The sliding window of a layer, tokens."""
        slides = self.sliding_layers is None or layer in self.sliding_layers
        return self.sliding_window if slides else None

    def problems(self, prefix: str = "model.") -> Iterator[str]:
        """Yield what cannot be computed, or not be written as the chosen family."""
        heads, groups = self.num_attention_heads, self.num_key_value_heads
        if heads % groups:
            yield (
                f"{prefix}num_attention_heads={heads} is not a multiple of {prefix}num_key_value_heads={groups}; "
                f"use {prefix}num_key_value_heads={next(g for g in range(groups, 0, -1) if heads % g == 0)}"
            )
        if self.head_dim % 2:
            yield f"{prefix}head_dim={self.head_dim} is odd and rotary positions turn pairs; use {self.head_dim + 1}"
        kind = (self.rope_scaling or {}).get("rope_type", "default")
        if kind not in SCALINGS:
            yield f"{prefix}rope_scaling.rope_type={kind} is not known; use one of {', '.join(SCALINGS)}"
        needed = {"linear": ["factor"], "yarn": ["factor"], "llama3": list(LLAMA3_KEYS)}.get(kind, [])
        missing = [key for key in needed if key not in (self.rope_scaling or {})]
        if missing:
            yield f"{prefix}rope_scaling of type {kind} has missing keys {', '.join(missing)}"
        yield from self._inexpressible(prefix)

    def _inexpressible(self, prefix: str) -> Iterator[str]:
        name, family = self.family, FAMILIES[self.family]
        if self.qk_norm != family.qk_norm:
            others = [other for other, row in FAMILIES.items() if row.qk_norm]
            remedy = f"family={others[0]}" if self.qk_norm else "qk_norm=true"
            yield f"{prefix}qk_norm={self.qk_norm} cannot be written as family {name}; use {prefix}{remedy}"
        if self.sliding_window is not None and family.sliding is Sliding.none:
            yield f"{prefix}sliding_window={self.sliding_window} is not family {name}'s; use {prefix}family=mistral"
        if self.sliding_layers is not None and family.sliding is Sliding.every_layer:
            yield f"{prefix}sliding_layers cannot be written as family {name}; use {prefix}family=qwen2"
        biases, possible = {key: bool(getattr(self, key)) for key in BIASES}, family.possible_biases()
        if biases not in possible:
            words = [", ".join(f"{key}={str(on).lower()}" for key, on in each.items()) for each in [biases, *possible]]
            yield f"{prefix}{words[0]} cannot be written as family {name}; use {' or '.join(words[1:])}"


LLAMA3_KEYS = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
