"""The architectures that llama.cpp and this decoder both compute: one row each, by which GGUF files are read and written.

A row says what llama.cpp computes of a file. A model that computes anything else is not written.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from trainer.models.architecture import Rope

Sizes = Mapping[str, Any]
"""Features that are known so far, and the number of ``layers``."""
Turns = Callable[[int, bool, bool], bool]
"""Whether a layer's queries and keys turn: its number, whether it has a window, whether any has."""


@dataclass(frozen=True)
class Entry:
    """A feature in a file's metadata.

    ``key``: without the architecture's name. ``absent``: the feature where it is not there. ``inverse``: whether one divided
    by it is there. ``times``: another feature, that it is counted in.
    """

    key: str
    absent: Any = None
    inverse: bool = False
    times: str = ""


@dataclass(frozen=True)
class GgufArchitecture:
    """What llama.cpp computes under one name.

    ``families``: ours whose models it computes; the first that has words for a file's model is what it is read as.
    ``interleaved``: whether neighbours of a head turn together, rather than halves.
    ``fixed``: features that no metadata tells of, or how they follow from the others.
    ``optional``: features that a model has if it has their tensor.
    ``entries``: features with a key of their own.
    ``modules``: names of a layer's modules, where they differ from `MODULES`.
    ``fused``: tensors that are several of ours, one below the other.
    ``scaling``: kinds of rotary scaling.
    ``period``: with windows, every n-th layer sees all; 0 = llama.cpp computes no windows.
    ``window``: tokens of a window that the metadata does not name; None = then there is none.
    ``always``: whether llama.cpp fails on a model without windows.
    ``depth``: layers of the only models that have windows; 0 = any.
    ``local``: the rotation of layers with a window, by that of the others and ``rope.freq_base_swa``.
    ``turns``: which layers turn at all.
    ``partial``: whether a part of a head may turn.
    ``unturned``: whether nothing turns where ``rope.scaling.finetuned`` is false.
    ``dense_first``: whether its first layers may have no experts.
    """

    families: tuple[str, ...]
    interleaved: bool = False
    fixed: Mapping[str, Any] = field(default_factory=dict)
    optional: Mapping[str, Any] = field(default_factory=dict)
    entries: Mapping[str, Entry] = field(default_factory=dict)
    modules: Mapping[str, str] = field(default_factory=dict)
    fused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    scaling: tuple[str, ...] = ("linear", "yarn")
    period: int = 0
    window: int | None = None
    always: bool = False
    depth: int = 0
    local: Callable[[Rope, float | None], Rope] = lambda rope, theta: rope
    turns: Turns = lambda number, slides, windows: True
    partial: bool = False
    unturned: bool = False
    dense_first: bool = False


MODULES = {
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm", "self_attn.sinks": "attn_sinks", "attention_output_norm": "post_attention_norm",
    "post_attention_layernorm": "ffn_norm", "mlp_output_norm": "post_ffw_norm", "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "mlp.router": "ffn_gate_inp", "mlp.router.balance": "exp_probs_b",
    "mlp.experts.down_proj": "ffn_down_exps", "mlp.shared.gate_proj": "ffn_gate_shexp",
    "mlp.shared.up_proj": "ffn_up_shexp", "mlp.shared.down_proj": "ffn_down_shexp", "mlp.shared_gate": "ffn_gate_inp_shexp",
}  # fmt: skip
"""Modules of a layer, by llama.cpp's names."""
GATE_UP, HALVES = "mlp.experts.gate_up_proj", ("ffn_gate_exps", "ffn_up_exps")
"""Ours of all experts, and the two tensors that its halves are."""
OUTER = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
PROBES = {
    "attention_bias": "blk.0.attn_q.bias", "attention_output_bias": "blk.0.attn_output.bias",
    "mlp_bias": "blk.0.ffn_up.bias", "qk_norm": "blk.0.attn_q_norm.weight",
}  # fmt: skip
"""The tensor by which an optional feature is there."""

BIAS = {"attention_bias": True}
BIASES = {**BIAS, "attention_output_bias": True, "mlp_bias": True}
LLAMA3 = ("linear", "yarn", "llama3")
GATED_UP = {"ffn_up": ("mlp.gate_proj", "mlp.up_proj")}
POST = {"post_attention_layernorm": "post_attention_norm"}
AFTER = {"norm_before": False, "norm_after": True}
OWN_HEAD = {"tie_word_embeddings": False}


def _square(sizes: Sizes) -> Any:
    """Heads that are as wide together as the model."""
    return sizes["hidden_size"] // sizes["num_attention_heads"]


def _gemma_scale(depth: int) -> Callable[[Sizes], Any]:
    """Gemma's factor of the scores; llama.cpp tells the 27B models by their layers."""
    return lambda sizes: (_square(sizes) if sizes["layers"] == depth else sizes["head_dim"]) ** -0.5


SQUARE = {"head_dim": _square}
GEMMA = {
    "norm_offset": 1.0, "activation": "gelu_pytorch_tanh", "tie_word_embeddings": True,
    "embedding_scale": lambda sizes: sizes["hidden_size"] ** 0.5,
}  # fmt: skip
COHERE = {**SQUARE, "layer_norm": True, "parallel": True, "tie_word_embeddings": True}
LOGIT_SCALE = {"logit_scale": Entry("logit_scale")}
MULTIPLIERS = {
    "attention_scale": Entry("attention.scale"), "embedding_scale": Entry("embedding_scale", 1.0),
    "residual_scale": Entry("residual_scale", 1.0), "logit_scale": Entry("logit_scale", inverse=True),
}  # fmt: skip
EXPERTS = {"experts": Entry("expert_count", 0), "experts_per_token": Entry("expert_used_count", 0)}
SIZED_EXPERTS = {**EXPERTS, "expert_size": Entry("expert_feed_forward_length")}
WIDE_EXPERTS = {"expert_size": lambda sizes: sizes["intermediate_size"] if sizes["experts"] else 0}


def _norms_of_plus(sizes: Sizes) -> Any:
    """Command R+ norms queries and keys; llama.cpp tells it by its layers."""
    return "heads" if sizes["layers"] >= 64 else ""


def _sliding(number: int, slides: bool, windows: bool) -> bool:
    return slides or not windows


GGUF_ARCHITECTURES: dict[str, GgufArchitecture] = {
    "llama": GgufArchitecture(
        ("llama", "mistral", "ministral", "internlm3", "helium", "mixtral"), True, WIDE_EXPERTS, BIASES, EXPERTS,
        scaling=LLAMA3,
    ),
    "mistral3": GgufArchitecture(("ministral3",), True, scaling=("yarn", "growth")),
    "qwen2": GgufArchitecture(("qwen2",), fixed=BIAS),
    "qwen3": GgufArchitecture(("qwen3",), fixed={"qk_norm": "head"}),
    "seed_oss": GgufArchitecture(("seed_oss",), optional=BIAS, modules=POST),
    "smollm3": GgufArchitecture(("smollm3",), True, turns=lambda number, slides, windows: (number + 1) % 4 != 0),
    "ernie4_5": GgufArchitecture(("ernie4_5",), True),
    "hunyuan-dense": GgufArchitecture(("hunyuan_v1_dense",), fixed={"qk_norm": "head", "qk_norm_after_rope": True}),
    "granite": GgufArchitecture(
        ("granite", "granitemoehybrid"), True, optional=BIASES, entries=MULTIPLIERS, scaling=LLAMA3, unturned=True,
    ),
    "granitemoe": GgufArchitecture(
        ("granitemoe",), True, WIDE_EXPERTS, entries={**MULTIPLIERS, **EXPERTS}, scaling=LLAMA3
    ),
    "olmo2": GgufArchitecture(
        ("olmo2", "olmo3"), fixed={**AFTER, **SQUARE, **OWN_HEAD, "qk_norm": "width"}, period=4,
        local=lambda rope, theta: Rope(rope.theta, rope.fraction),
    ),
    "exaone4": GgufArchitecture(
        ("exaone4",), fixed={**AFTER, "qk_norm": "head"}, scaling=LLAMA3, period=4, window=4096, depth=64, turns=_sliding,
    ),
    "gemma": GgufArchitecture(("gemma",), fixed=GEMMA),
    "gemma2": GgufArchitecture(
        ("gemma2",), fixed={**GEMMA, "norm_after": True, "attention_scale": _gemma_scale(46)},
        entries={
            "score_cap": Entry("attn_logit_softcapping", 50.0), "logit_cap": Entry("final_logit_softcapping", 30.0),
        }, scaling=("linear",), period=2, window=4096, always=True,
    ),
    "gemma3": GgufArchitecture(
        ("gemma3_text",),
        fixed={**GEMMA, "norm_after": True, "qk_norm": "head", "attention_scale": _gemma_scale(62)},
        scaling=("linear",), period=6, always=True,
        local=lambda rope, theta: Rope(10000.0 if theta is None else theta, rope.fraction),
    ),
    "phi3": GgufArchitecture(
        ("phi3",), fixed=SQUARE, scaling=("linear", "longrope"), partial=True,
        fused={"attn_qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), **GATED_UP},
    ),
    "glm4": GgufArchitecture(("glm4",), True, {"norm_after": True}, BIAS, fused=GATED_UP, partial=True),
    "command-r": GgufArchitecture(("cohere",), True, {**COHERE, "qk_norm": _norms_of_plus}, entries=LOGIT_SCALE),
    "cohere2": GgufArchitecture(
        ("cohere2",), True, COHERE, entries=LOGIT_SCALE, period=4, window=4096, always=True,
        turns=lambda number, slides, windows: slides,
    ),
    "nemotron": GgufArchitecture(
        ("nemotron",), fixed={
            **OWN_HEAD, "layer_norm": True, "norm_bias": True, "norm_offset": 1.0, "gated": False, "activation": "relu2",
        }, optional=BIASES, partial=True,
    ),
    "stablelm": GgufArchitecture(
        ("stablelm",), fixed={**OWN_HEAD, **SQUARE, "layer_norm": True, "norm_bias": True}, optional=BIAS, partial=True,
    ),
    "qwen2moe": GgufArchitecture(
        ("qwen2_moe",), fixed={**OWN_HEAD, **SQUARE, "shared_gate": True, "router_normalised": False}, optional=BIAS,
        entries={**SIZED_EXPERTS, "shared_size": Entry("expert_shared_feed_forward_length")},
    ),
    "qwen3moe": GgufArchitecture(("qwen3_moe",), fixed={"qk_norm": "head"}, entries=SIZED_EXPERTS),
    "olmoe": GgufArchitecture(
        ("olmoe",), fixed={
            **OWN_HEAD, **SQUARE, **WIDE_EXPERTS, "qk_norm": "width", "router_normalised": False,
            "num_key_value_heads": lambda sizes: sizes["num_attention_heads"],
        }, entries=EXPERTS,
    ),
    "glm4moe": GgufArchitecture(
        ("glm4_moe",), fixed={"router_sigmoid": True}, optional={**BIAS, "qk_norm": "head"}, entries={
            **SIZED_EXPERTS, "shared_size": Entry("expert_shared_count", 0, times="expert_size"),
            "router_scale": Entry("expert_weights_scale", 1.0), "router_normalised": Entry("expert_weights_norm", False),
        }, modules=POST, partial=True, dense_first=True,
    ),
    "gpt-oss": GgufArchitecture(
        ("gpt_oss",), fixed={
            **OWN_HEAD, "sinks": True, "expert_bias": True, "attention_bias": True, "attention_output_bias": True,
            "glu_limit": 7.0,
        }, entries=SIZED_EXPERTS, modules=POST, period=2, window=128, always=True,
    ),
}  # fmt: skip
"""By ``general.architecture``."""


def architecture_for(family: str) -> str | None:
    """llama.cpp's name for what computes a family's models, None if nothing does."""
    return next((name for name, row in GGUF_ARCHITECTURES.items() if family in row.families), None)


GGUF_FAMILIES = tuple(sorted(family for row in GGUF_ARCHITECTURES.values() for family in row.families))
