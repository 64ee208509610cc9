"""Families of models with experts, rows as in `families`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trainer.models.architecture import Architecture
from trainer.models.family import Family, Key, Tensors, renamed, switch
from trainer.models.keys import BIAS, EPS, IN_BIAS, MULTIPLIERS
from trainer.models.layers import LISTED, Layers
from trainer.models.mxfp4 import from_mxfp4

GATE_UP, DOWN = "mlp.experts.gate_up_proj", "mlp.experts.down_proj"


@dataclass(frozen=True)
class Multiple(Key):
    """A number of experts that every token goes to, for their width together; ``one``: the key of one's width."""

    one: Key = Key("moe_intermediate_size")

    def value(self, config: Mapping[str, Any], feature: str) -> Any:
        return super().value(config, feature) * self.one.value(config, feature)

    def written(self, a: Architecture, feature: str) -> Any:
        return getattr(a, feature) // max(a.expert_size, 1)


def groups(absent: int) -> dict[str, Key]:
    """Key and value heads."""
    return {"num_key_value_heads": Key("num_key_value_heads", absent)}


def stacked(ours: str, *theirs: str) -> tuple[Tensors, ...]:
    """Each expert's tensors (gate and up, one below the other) are a slice of ours; or all are one tensor, as in memory.

    The first rule is named again at the end: there the names of what is missing come from.
    """

    def load(tensors: list[Tensor], a: Architecture) -> list[Tensor]:
        parts = [torch.stack(tensors[n : n + a.experts]) for n in range(0, len(tensors), a.experts)]
        return [torch.cat(parts, 1)]

    def store(tensors: list[Tensor], a: Architecture) -> list[Tensor]:
        return [expert for part in tensors[0].chunk(len(theirs), 1) for expert in part]

    one_by_one = Tensors((f"{ours}.weight",), theirs, load, store)
    return one_by_one, Tensors((f"{ours}.weight",), (ours,)), dataclasses.replace(one_by_one)


def either(ours: str, *theirs: str) -> tuple[Tensors, ...]:
    """All experts in one tensor, by its name on disk, or by that in memory."""
    rules = [Tensors((f"{ours}.weight",), (name,)) for name in theirs]
    return (*rules, dataclasses.replace(rules[0]))


def router(*theirs: str) -> tuple[Tensors, ...]:
    """The router's weight, by its name on disk, or by that in memory."""
    rules = [Tensors(("mlp.router.weight",), (f"{name}.weight",)) for name in theirs]
    return (*rules, dataclasses.replace(rules[0]))


def turned(name: str, *, woven: bool) -> tuple[Tensors, ...]:
    """gpt-oss's: inputs before outputs, or as four-bit blocks outputs before inputs; ``woven``: gate and up alternate."""

    def unwoven(t: Tensor) -> Tensor:
        return torch.cat([t[:, ::2], t[:, 1::2]], 1) if woven else t

    def rewoven(t: Tensor) -> Tensor:
        return torch.stack(t.chunk(2, 1), 2).flatten(1, 2) if woven else t

    weight, bias, quantized = f"{name}.weight", f"{name}.bias", (f"{name}_blocks", f"{name}_scales")
    plain = Tensors(
        (weight,), (name,), lambda t, a: [unwoven(t[0].transpose(1, 2))], lambda t, a: [rewoven(t[0]).transpose(1, 2)]
    )
    return (
        plain,
        Tensors((weight,), quantized, lambda t, a: [unwoven(from_mxfp4(*t))]),
        dataclasses.replace(plain),
        Tensors((bias,), (f"{name}_bias",), lambda t, a: [unwoven(t[0])], lambda t, a: [rewoven(t[0])]),
    )


def shared(theirs: str) -> tuple[Tensors, ...]:
    """The expert that every token goes to."""
    return renamed({f"mlp.shared.{p}_proj": f"{theirs}.{p}_proj" for p in ("gate", "up", "down")})


EXPERTS = {
    "experts": Key("num_local_experts", 8), "experts_per_token": Key("num_experts_per_tok", 2),
    "expert_size": Key("intermediate_size"),
}  # fmt: skip
QWEN_EXPERTS = {
    "experts": Key("num_experts", 128, "num_local_experts"), "experts_per_token": Key("num_experts_per_tok", 8),
    "expert_size": Key("moe_intermediate_size", 768), "router_normalised": Key("norm_topk_prob", False),
}  # fmt: skip
GLM_SIZE = Key("moe_intermediate_size", 1408)
GLM_EXPERTS = {
    **QWEN_EXPERTS, "experts": Key("n_routed_experts", 128, "num_local_experts"),
    "expert_size": GLM_SIZE, "router_normalised": Key("norm_topk_prob", True),
    "router_scale": Key("routed_scaling_factor", 1.0),
    "shared_size": Multiple("n_shared_experts", 1, one=GLM_SIZE),
}  # fmt: skip
QWEN_TENSORS = (
    *router("mlp.gate"),
    *stacked(GATE_UP, "mlp.experts.{}.gate_proj.weight", "mlp.experts.{}.up_proj.weight"),
    *stacked(DOWN, "mlp.experts.{}.down_proj.weight"),
)
QWEN_LAYERS = Layers(dense=LISTED)
GPT_OSS_YARN = {
    "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
    "original_max_position_embeddings": 4096,
}  # fmt: skip

EXPERT_FAMILIES: dict[str, Family] = {
    "mixtral": Family("Mixtral", {}, {**EXPERTS, **EPS, **groups(8)}, Layers(slide=True, dense="", thetas=(1e6, 1e6)), (
        *router("block_sparse_moe.gate", "mlp.gate"),
        *stacked(GATE_UP, "block_sparse_moe.experts.{}.w1.weight", "block_sparse_moe.experts.{}.w3.weight"),
        *stacked(DOWN, "block_sparse_moe.experts.{}.w2.weight"),
    ), peft_experts=True),
    "qwen2_moe": Family(
        "Qwen2Moe", {"shared_gate": True}, {
            **QWEN_EXPERTS, **groups(16), "experts": Key("num_experts", 60, "num_local_experts"),
            "attention_bias": Key("qkv_bias", True),
            "experts_per_token": Key("num_experts_per_tok", 4), "expert_size": Key("moe_intermediate_size", 1408),
            "shared_size": Key("shared_expert_intermediate_size", 5632),
        }, QWEN_LAYERS, (
            *QWEN_TENSORS, *shared("mlp.shared_expert"), *renamed({"mlp.shared_gate": "mlp.shared_expert_gate"}),
        ), {"use_sliding_window": False}, peft_experts=True,
    ),
    "qwen3_moe": Family(
        "Qwen3Moe", {"qk_norm": "head"}, {**BIAS, **QWEN_EXPERTS, **groups(4)}, QWEN_LAYERS, QWEN_TENSORS,
        {"use_sliding_window": False}, peft_experts=True,
    ),
    "olmoe": Family("Olmoe", {"qk_norm": "width"}, {
        **BIAS, **EPS, **QWEN_EXPERTS, "experts": Key("num_experts", 64, "num_local_experts"),
        "expert_size": Key("intermediate_size"),
    }, Layers(dense=""), QWEN_TENSORS, {"clip_qkv": None}, peft_experts=True),
    "granitemoe": Family("GraniteMoe", {}, {**BIAS, **MULTIPLIERS, **EXPERTS}, Layers(dense=""), (
        *router("block_sparse_moe.router.layer", "block_sparse_moe.router"),
        *either(GATE_UP, "block_sparse_moe.input_linear.weight", "block_sparse_moe.experts.gate_up_proj"),
        *either(DOWN, "block_sparse_moe.output_linear.weight", "block_sparse_moe.experts.down_proj"),
    )),
    "glm4_moe": Family(
        "Glm4Moe", {"router_sigmoid": True},
        {**IN_BIAS, **EPS, **GLM_EXPERTS, **groups(8), "qk_norm": switch("use_qk_norm", "head")},
        Layers(dense="first_k_dense_replace", fraction=0.5), (
            *QWEN_TENSORS, *shared("mlp.shared_experts"),
            Tensors(("mlp.router.balance",), ("mlp.gate.e_score_correction_bias",)),
        ), {"n_group": 1, "topk_group": 1}, peft_experts=True,
    ),
    "gpt_oss": Family(
        "GptOss", {"sinks": True, "expert_bias": True}, {
            **EPS, **EXPERTS, **groups(8), "attention_bias": Key("attention_bias", True),
            "glu_limit": Key("swiglu_limit", 7.0),
            "attention_output_bias": Key("attention_bias", True), "head_dim": Key("head_dim", 64),
            "experts": Key("num_local_experts", 128), "experts_per_token": Key("num_experts_per_tok", 4),
        }, Layers(slide=True, window=128, full_every=2, dense="", thetas=(150000.0, 150000.0), scaling=GPT_OSS_YARN),
        (*turned(GATE_UP, woven=True), *turned(DOWN, woven=False)), {"swiglu_alpha": 1.702}, quantized=("mxfp4",),
    ),
}  # fmt: skip
"""Families by ``model_type``."""
