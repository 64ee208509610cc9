"""What a decoder computes: its sizes, and features by name. Which family's words describe it is `families`' matter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Rope:
    """Rotary positions (Su et al. 2021, arXiv:2104.09864).

    ``theta``: base of the wavelengths.
    ``fraction``: part of a head that turns; its first dimensions do.
    ``scaling``: rope_type and its parameters, as in ``config.json``; empty = none.
    """

    theta: float
    fraction: float = 1.0
    scaling: Mapping[str, Any] = field(default_factory=dict, hash=False)


@dataclass(frozen=True)
class Layer:
    """What may differ between a model's layers.

    ``window``: tokens that attention looks back on, itself included; None = all.
    ``rope``: the rotation of queries and keys; None = no positions.
    ``sparse``: experts in the MLP's place.
    ``delta``: a gated delta rule in attention's place.
    """

    window: int | None = None
    rope: Rope | None = None
    sparse: bool = False
    delta: bool = False


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A decoder's features, everything that differs between layers resolved in ``layers``. The defaults are Llama's.

    Sizes are named as in Hugging Face's ``config.json``.

    Attributes:
        family: the row of `families` whose words it is written in.
        max_position_embeddings: longest document, tokens.
        layer_norm: LayerNorm rather than RMSNorm.
        norm_offset: added to a norm's stored weight (1: Gemma's ``1 + w``).
        norm_bias: whether norms have a bias.
        norm_before: whether attention and MLP read a norm.
        norm_after: whether what they give is normed before it is added.
        parallel: whether both read the same norm, and are added together.
        qk_norm: of queries and keys: "" none, "head" one weight for all heads, "heads" one a head, "width" over all at once.
        qk_norm_after_rope: whether they are turned first.
        interleaved_rope: whether neighbours turn together, rather than halves.
        attention_bias: of the query, key and value projections.
        attention_gate: whether the query projection also makes, head by head, a gate of what attention gives.
        attention_scale: factor of the scores; None = ``head_dim ** -0.5``.
        score_cap: bound of the scores, by a tanh (Gemma Team 2024, arXiv:2408.00118).
        sinks: whether every head has a score that no value belongs to.
        activation: of the MLP, one of `mlp.ACTIVATIONS`.
        gated: whether the MLP has a gate (Shazeer 2020, arXiv:2002.05202).
        embedding_scale: factor of the embeddings.
        residual_scale: factor of what attention and MLP add.
        logit_scale: factor of the logits.
        logit_cap: bound of the logits, by a tanh.
        experts: MLPs that a token is routed to some of; 0 = none.
        experts_per_token: of them, for each token.
        expert_size: width of an expert.
        expert_bias: whether router and experts have biases.
        shared_size: width of an MLP that every token goes through beside its experts; 0 = none.
        shared_gate: whether what it gives is weighed token by token.
        router_sigmoid: sigmoid scores, and a bias for balance that takes part in the choice; else a softmax.
        router_normalised: whether the chosen experts' weights are divided by their sum.
        router_scale: factor of the weights.
        glu_limit: bound of the experts' gate and input (gpt-oss).
        delta_key_heads: heads of keys of the gated delta rule.
        delta_value_heads: its heads of values.
        delta_key_size: width of a key.
        delta_value_size: width of a value.
        delta_width: tokens that its short convolution looks back on.
        scores: one score of a sequence instead of logits (``...ForSequenceClassification`` with ``num_labels`` 1).
        longest: tokens of the longest document that is computed, by which longrope chooses; None = the longest possible.
    """

    family: str = "llama"
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    layers: tuple[Layer, ...]
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-5
    layer_norm: bool = False
    norm_offset: float = 0.0
    norm_bias: bool = False
    norm_before: bool = True
    norm_after: bool = False
    parallel: bool = False
    qk_norm: str = ""
    qk_norm_after_rope: bool = False
    interleaved_rope: bool = False
    attention_bias: bool = False
    attention_output_bias: bool = False
    attention_gate: bool = False
    attention_scale: float | None = None
    score_cap: float | None = None
    sinks: bool = False
    activation: str = "silu"
    gated: bool = True
    mlp_bias: bool = False
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logit_scale: float = 1.0
    logit_cap: float | None = None
    experts: int = 0
    experts_per_token: int = 0
    expert_size: int = 0
    expert_bias: bool = False
    shared_size: int = 0
    shared_gate: bool = False
    router_sigmoid: bool = False
    router_normalised: bool = True
    router_scale: float = 1.0
    glu_limit: float | None = None
    delta_key_heads: int = 0
    delta_value_heads: int = 0
    delta_key_size: int = 0
    delta_value_size: int = 0
    delta_width: int = 0
    scores: bool = field(default=False, metadata={"feature": False})
    longest: int | None = field(default=None, metadata={"feature": False})

    @property
    def num_hidden_layers(self) -> int:
        """Blocks."""
        return len(self.layers)

    @property
    def ropes(self) -> list[Rope]:
        """The rotations that its layers have, each once."""
        distinct: list[Rope] = []
        for layer in self.layers:
            if layer.rope is not None and layer.rope not in distinct:
                distinct.append(layer.rope)
        return distinct
