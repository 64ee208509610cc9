"""The shape of a decoder, in Hugging Face's words, and which family of theirs can express it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum, auto
from typing import Any


class Family(StrEnum):
    """Architectures that Hugging Face knows and this decoder computes."""

    llama = auto()
    mistral = auto()
    qwen2 = auto()
    qwen3 = auto()


SCALINGS = ("default", "linear", "llama3", "yarn")


@dataclass(frozen=True)
class Architecture:
    """A decoder's shape; names are those of Hugging Face's ``config.json``.

    ``rope_scaling``: None, or a mapping with ``rope_type`` (linear, llama3, yarn) and that type's parameters.
    ``sliding_layers``: numbers of the layers that ``sliding_window`` holds for; None = all.
    """

    vocab_size: int
    family: Family = Family.llama
    hidden_size: int = 256
    intermediate_size: int = 704
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int = 4
    head_dim: int = 64
    max_position_embeddings: int = 2048
    rope_theta: float = 10000.0
    rope_scaling: dict[str, Any] | None = field(default=None, hash=False)
    rms_norm_eps: float = 1e-5
    tie_word_embeddings: bool = True
    attention_bias: bool = False
    attention_output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    sliding_window: int | None = None
    sliding_layers: tuple[int, ...] | None = None
    initializer_range: float = 0.02
    scores: bool = False
    """One score of a sequence instead of logits: Hugging Face's ``...ForSequenceClassification`` with ``num_labels`` 1."""

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
            yield f"{prefix}rope_scaling of type {kind} lacks {', '.join(missing)}"
        yield from self._inexpressible(prefix)

    def _inexpressible(self, prefix: str) -> Iterator[str]:
        family = self.family
        if self.qk_norm != (family is Family.qwen3):
            remedy = "family=qwen3" if self.qk_norm else "qk_norm=true"
            yield f"{prefix}qk_norm={self.qk_norm} cannot be written as family {family}; use {prefix}{remedy}"
        if self.sliding_window is not None and family is Family.llama:
            yield f"{prefix}sliding_window={self.sliding_window} is not family llama's; use {prefix}family=mistral"
        if self.sliding_layers is not None and family is Family.mistral:
            yield f"{prefix}sliding_layers cannot be written as family mistral; use {prefix}family=qwen2"
        biases = (self.attention_bias, self.attention_output_bias, self.mlp_bias)
        possible = {
            Family.llama: [(False, False, False), (True, True, False), (False, False, True), (True, True, True)],
            Family.mistral: [(False, False, False)],
            Family.qwen2: [(True, False, False)],
            Family.qwen3: [(False, False, False), (True, True, False)],
        }[family]
        if biases not in possible:
            names = ("attention_bias", "attention_output_bias", "mlp_bias")
            say = [
                ", ".join(f"{n}={str(b).lower()}" for n, b in zip(names, c, strict=True)) for c in [biases, *possible]
            ]
            yield f"{prefix}{say[0]} cannot be written as family {family}; use {' or '.join(say[1:])}"


LLAMA3_KEYS = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
