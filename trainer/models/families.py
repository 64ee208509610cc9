"""The families of models that the decoder computes: one row each. Another one is a row more."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from trainer.models.architecture import Architecture
from trainer.models.expert_families import EXPERT_FAMILIES
from trainer.models.family import ACTIVATION, Family, Key, fused, power, renamed, switch
from trainer.models.keys import ALL_BIAS, BIAS, EPS, HEAD_DIM, IN_BIAS, MLP_BIAS, MULTIPLIERS, TIED
from trainer.models.layers import LINEAR, Layers
from trainer.models.mlp import ACTIVATIONS
from trainer.models.rope import NEEDED, turned_size


def _of_gemma(name: str) -> str:
    """Its first releases write gelu and mean the approximation."""
    return "gelu_pytorch_tanh" if name == "gelu" else str(ACTIVATION.read(name))


AFTER = {"norm_before": False, "norm_after": True}
SANDWICH = renamed(
    {
        "attention_output_norm": "post_attention_layernorm",
        "post_attention_layernorm": "pre_feedforward_layernorm",
        "mlp_output_norm": "post_feedforward_layernorm",
    }
)
GEMMA = {"norm_offset": 1.0}
GEMMA_KEYS = {
    **BIAS, **TIED, "head_dim": Key("head_dim", 256), "embedding_scale": power("hidden_size", 0.5),
    "activation": dataclasses.replace(ACTIVATION, name="hidden_activation", alias="hidden_act", absent="gelu_pytorch_tanh"),
}  # fmt: skip
GEMMA_CAPS = {
    "attention_scale": power("query_pre_attn_scalar", -0.5, 256), "score_cap": Key("attn_logit_softcapping"),
    "logit_cap": Key("final_logit_softcapping"),
}  # fmt: skip
GEMMA3_SIZES = {
    name: Key(name, size)
    for name, size in {
        "vocab_size": 262208, "num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 131072,
    }.items()
}  # fmt: skip
"""Image-text models of it leave these out."""
CAUSAL = {"use_bidirectional_attention": False}
COHERE = {"layer_norm": True, "parallel": True, "interleaved_rope": True}
COHERE_KEYS = {
    **BIAS, **TIED, "rms_norm_eps": Key("layer_norm_eps", 1e-5), "logit_scale": Key("logit_scale", 0.0625)
}  # fmt: skip
QKV = fused("self_attn.qkv_proj.weight", *(f"self_attn.{p}_proj.weight" for p in "qkv"))
GATE_UP = fused("mlp.gate_up_proj.weight", "mlp.gate_proj.weight", "mlp.up_proj.weight")
DELTA = {
    "delta_key_heads": Key("linear_num_key_heads", 16), "delta_key_size": Key("linear_key_head_dim", 128),
    "delta_value_heads": Key("linear_num_value_heads", 32), "delta_value_size": Key("linear_value_head_dim", 128),
    "delta_width": Key("linear_conv_kernel_dim", 4),
}  # fmt: skip
MINISTRAL_YARN = {
    "rope_type": "yarn", "rope_theta": 1e6, "factor": 16.0, "original_max_position_embeddings": 16384,
    "max_position_embeddings": None, "beta_fast": 32.0, "beta_slow": 1.0, "mscale_all_dim": 1.0, "mscale": 1.0,
    "llama_4_scaling_beta": 0.1,
}  # fmt: skip
QWEN = Layers(slide=True, window=4096, switched=True)

FAMILIES: dict[str, Family] = {
    "llama": Family("Llama", {}, {**BIAS, **MLP_BIAS}),
    "mistral": Family("Mistral", layers=Layers(slide=True, window=4096, mixed=True)),
    "ministral": Family("Ministral", layers=Layers(slide=True, window=4096, mixed=True)),
    "ministral3": Family(
        "Ministral3", {}, {**EPS, **HEAD_DIM}, Layers(slide=True, thetas=(1e6, 1e6), scaling=MINISTRAL_YARN),
    ),
    "qwen2": Family("Qwen2", {"attention_bias": True}, layers=QWEN),
    "qwen3": Family("Qwen3", {"qk_norm": "head"}, {**BIAS, **HEAD_DIM}, QWEN),
    "qwen3_5_text": Family(
        "Qwen3_5", {"norm_offset": 1.0, "qk_norm": "head", "attention_gate": True},
        {**BIAS, **DELTA, "head_dim": Key("head_dim", 256)}, Layers(full_every=4, other=LINEAR, fraction=0.25),
    ),
    "seed_oss": Family("SeedOss", {}, {
        **HEAD_DIM, **MLP_BIAS, "attention_bias": Key("attention_bias", True),
        "attention_output_bias": Key("attention_out_bias", False),
    }, written={"residual_dropout": 0.0}),
    "internlm3": Family("InternLM3", {}, {
        **HEAD_DIM, **EPS, "attention_bias": Key("attention_bias", False, "qkv_bias"),
        "attention_output_bias": Key("attention_bias", False, "qkv_bias"), "mlp_bias": Key("mlp_bias", False, "bias"),
    }),
    "smollm3": Family(
        "SmolLM3", {}, {**BIAS, **MLP_BIAS, **TIED},
        Layers(slide=True, switched=True, rope="listed", thetas=(2e6, 2e6)),
    ),
    "ernie4_5": Family(
        "Ernie4_5", {"interleaved_rope": True}, {**ALL_BIAS, **EPS, **HEAD_DIM, **TIED}, Layers(thetas=(5e5, 5e5)),
    ),
    "hunyuan_v1_dense": Family(
        "HunYuanDenseV1", {"qk_norm": "head", "qk_norm_after_rope": True}, {**BIAS, **EPS},
        tensors=renamed({f"self_attn.{n[0]}_norm": f"self_attn.{n}_layernorm" for n in ("query", "key")}),
    ),
    "helium": Family("Helium", {"interleaved_rope": True}, {
        **IN_BIAS, **MLP_BIAS, **HEAD_DIM, "rms_norm_eps": Key("rms_norm_eps", 1e-8),
    }, Layers(thetas=(1e5, 1e5))),
    "granite": Family("Granite", {}, {**BIAS, **MLP_BIAS, **MULTIPLIERS}),
    "granitemoehybrid": Family(  # Granite 4's dense models
        "GraniteMoeHybrid", {}, {**BIAS, **MULTIPLIERS, "intermediate_size": Key("shared_intermediate_size", 1024)},
        Layers(full_every=1, rope="named"), (
            fused("shared_mlp.input_linear.weight", "mlp.gate_proj.weight", "mlp.up_proj.weight"),
            *renamed({"mlp.down_proj": "shared_mlp.output_linear"}),
        ), {"num_local_experts": 0}, {"mamba_n_heads": 1},
    ),
    "olmo2": Family("Olmo2", {**AFTER, "qk_norm": "width"}, {**BIAS, **EPS}, tensors=SANDWICH),
    "olmo3": Family(
        "Olmo3", {**AFTER, "qk_norm": "width"}, {**BIAS, **EPS},
        Layers(slide=True, window=4096, full_every=4, rope="by_type", thetas=(5e5, 5e5)), SANDWICH,
    ),
    "exaone4": Family(
        "Exaone4", {**AFTER, "qk_norm": "head"}, EPS, Layers(slide=True, window=4096, full_every=4, rope="sliding"),
        SANDWICH,
    ),
    "gemma": Family("Gemma", GEMMA, {
        **GEMMA_KEYS, "activation": Key("hidden_act", "gelu_pytorch_tanh", "hidden_activation", _of_gemma),
    }, only=CAUSAL),
    "gemma2": Family("Gemma2", {**GEMMA, "norm_after": True}, {
        **GEMMA_KEYS, **GEMMA_CAPS, "score_cap": Key("attn_logit_softcapping", 50.0),
        "logit_cap": Key("final_logit_softcapping", 30.0),
    }, Layers(slide=True, window=4096, full_every=2), SANDWICH, CAUSAL),
    "gemma3_text": Family(
        "Gemma3", {**GEMMA, "norm_after": True, "qk_norm": "head"}, {**GEMMA_KEYS, **GEMMA_CAPS, **GEMMA3_SIZES}, Layers(
            slide=True, window=4096, full_every=6, rope="by_type", thetas=(1e6, 1e4), local_theta="rope_local_base_freq",
        ), SANDWICH, CAUSAL,
    ),
    "phi3": Family("Phi3", {}, EPS, Layers(slide=True), (QKV, GATE_UP)),
    "glm4": Family(
        "Glm4", {"norm_after": True, "interleaved_rope": True},
        {**HEAD_DIM, "attention_bias": Key("attention_bias", True), "rms_norm_eps": Key("rms_norm_eps", 1.5625e-7)},
        Layers(fraction=0.5), (GATE_UP, *renamed({
            "attention_output_norm": "post_self_attn_layernorm", "mlp_output_norm": "post_mlp_layernorm",
        })),
    ),
    "cohere": Family(
        "Cohere", COHERE, {**COHERE_KEYS, "qk_norm": switch("use_qk_norm", "heads")}, Layers(thetas=(5e5, 5e5)),
    ),
    "cohere2": Family("Cohere2", COHERE, COHERE_KEYS, Layers(slide=True, window=4096, full_every=4, rope="sliding")),
    "nemotron": Family(
        "Nemotron", {"layer_norm": True, "norm_bias": True, "norm_offset": 1.0, "gated": False}, {
            **BIAS, **MLP_BIAS, "rms_norm_eps": Key("norm_eps", 1e-5),
            "activation": dataclasses.replace(ACTIVATION, absent="relu2"),
            "initializer_range": Key("initializer_range", 0.0134),
        }, Layers(fraction=0.5),
    ),
    "stablelm": Family("StableLm", {"layer_norm": True, "norm_bias": True}, {
        "attention_bias": Key("use_qkv_bias", False), "rms_norm_eps": Key("layer_norm_eps", 1e-5),
    }, Layers(fraction=0.25), only={"qk_layernorm": False, "use_parallel_residual": False}),
    **EXPERT_FAMILIES,
}  # fmt: skip
"""Families by ``model_type``. A user's module may add its own."""


def problems_of(a: Architecture, prefix: str = "model.") -> Iterator[str]:
    """What of an architecture cannot be computed, or not be written as its family; ``prefix``: of the settings' names."""
    heads, groups = a.num_attention_heads, a.num_key_value_heads
    if heads % groups:
        yield (
            f"{prefix}num_attention_heads={heads} is not a multiple of {prefix}num_key_value_heads={groups}; "
            f"use {prefix}num_key_value_heads={next(g for g in range(groups, 0, -1) if heads % g == 0)}"
        )
    if a.delta_key_heads and a.delta_value_heads % a.delta_key_heads:
        yield (
            f"{prefix}delta_value_heads={a.delta_value_heads} is not a multiple of "
            f"{prefix}delta_key_heads={a.delta_key_heads}; use {prefix}delta_value_heads={2 * a.delta_key_heads}"
        )
    if a.experts_per_token > a.experts:
        yield f"{prefix}experts_per_token={a.experts_per_token} is more than {prefix}experts={a.experts}; use at most as many"
    if a.activation not in ACTIVATIONS:
        yield f"{prefix}activation={a.activation} is not known; use one of {', '.join(ACTIVATIONS)}"
    if a.ropes and a.head_dim % 2:
        yield f"{prefix}head_dim={a.head_dim} is odd and rotary positions turn pairs; use {a.head_dim + 1}"
    for rope in a.ropes:
        kind = rope.scaling.get("rope_type", "default")
        if kind not in NEEDED:
            yield f"{prefix}rope_scaling.rope_type={kind} is not known; use one of {', '.join(NEEDED)}"
        elif missing := [key for key in NEEDED[kind] if key not in rope.scaling]:
            yield f"{prefix}rope_scaling of type {kind} has missing keys {', '.join(missing)}"
        elif not a.head_dim % 2 and turned_size(rope, a) % 2:
            yield f"{prefix}partial_rotary_factor={rope.fraction} of {a.head_dim} dimensions is odd, and pairs turn"
        else:
            yield from _stretches(rope.scaling, turned_size(rope, a), prefix)
    yield from _inexpressible(a, prefix)


def _stretches(scaling: Mapping[str, Any], size: int, prefix: str) -> Iterator[str]:
    """Longrope has a factor for every pair."""
    for key in ("short_factor", "long_factor"):
        if key in NEEDED.get(scaling.get("rope_type", ""), ()) and len(scaling[key]) != size // 2:
            yield f"{prefix}rope_scaling.{key} has {len(scaling[key])} numbers, and {size // 2} pairs turn"


def _inexpressible(a: Architecture, prefix: str) -> Iterator[str]:
    lost = FAMILIES[a.family].lost(a)
    if not lost:
        return
    others = [name for name, row in FAMILIES.items() if not row.lost(dataclasses.replace(a, family=name))]
    remedy = f"use {prefix}family={' or '.join(others[:3])}" if others else "leave it at its default"
    names = ", ".join(f"{prefix}{name}" for name in lost)
    yield f"{names} cannot be written as family {a.family}; {remedy}"
