"""A tiny random model of every family that is written as GGUF, with what is its own switched on."""

from functools import cache
from pathlib import Path
from typing import Any

import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers, trainers

from trainer.data.gguf_vocabulary import GPT2
from trainer.data.tokenizer import Tokenizer
from trainer.models.families import FAMILIES
from trainer.models.gguf_format import shapes_of
from trainer.models.hf_format import write_model

TINY: dict[str, Any] = {
    "vocab_size": 320, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 64, "sliding_window": None,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
HALF = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}}
SCALES = {
    "embedding_multiplier": 12.0,
    "residual_multiplier": 0.22,
    "attention_multiplier": 0.1,
    "logits_scaling": 1.25,
}
CASES: dict[str, dict[str, Any]] = {
    "llama": {"rope_parameters": LLAMA3, "attention_bias": True, "mlp_bias": True},
    "mistral": {"head_dim": 32, "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}},
    "ministral": {},
    "ministral3": {"rope_parameters": YARN | {
        "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1,
    }},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 32, "rope_parameters": YARN},
    "seed_oss": {},
    "internlm3": {"qkv_bias": True},
    "smollm3": {"use_sliding_window": False},
    "ernie4_5": {},
    "hunyuan_v1_dense": {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 1.0, "alpha": 50.0}},
    "helium": {"num_key_value_heads": 4},
    "granite": SCALES,
    "granitemoehybrid": SCALES | {
        "num_local_experts": 0, "position_embedding_type": None, "layer_types": ["full_attention"] * 4,
        "shared_intermediate_size": 96,
    },
    "olmo2": {"rope_parameters": YARN},
    "olmo3": {"sliding_window": 8, "rope_parameters": {
        "full_attention": YARN, "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }},
    "exaone4": {"rope_parameters": LLAMA3},
    "gemma": {"head_dim": 32},
    "gemma2": {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 8},
    "gemma3_text": {
        "query_pre_attn_scalar": 16, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "phi3": {"original_max_position_embeddings": 32, "rope_parameters": {
        "rope_type": "longrope", "rope_theta": 1e4, "partial_rotary_factor": 0.75, "original_max_position_embeddings": 32,
        "short_factor": [1.0, 1.1, 1.3, 1.4, 1.5, 1.6], "long_factor": [2.0, 3.0, 4.0, 4.5, 5.0, 6.0],
    }},
    "glm4": HALF,
    "cohere": {"logit_scale": 0.9},
    "cohere2": {"sliding_window": 8, "logit_scale": 0.9},
    "nemotron": HALF | {"attention_bias": True},
    "stablelm": HALF | {"use_qkv_bias": True},
    "mixtral": {"num_local_experts": 4},
    "qwen2_moe": {
        "num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32,
    },
    "qwen3_moe": {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 32, "norm_topk_prob": True},
    "olmoe": {"num_key_value_heads": 4, "num_experts": 8},
    "granitemoe": SCALES | {"num_local_experts": 4},
    "glm4_moe": {
        "n_routed_experts": 8, "n_shared_experts": 2, "moe_intermediate_size": 32, "num_experts_per_tok": 2,
        "routed_scaling_factor": 1.5, "use_qk_norm": True, "attention_bias": True,
    },
    "gpt_oss": {
        "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    },
}  # fmt: skip
"""What is set of a family beside `TINY`."""
TEXT = "One loop, one checkpoint and one loss curve on any number of ranks; 12 layers, 345 tokens. " * 4


@cache
def byte_level(*cuts: Any, direct: bool = False) -> Tokenizer:
    """A byte-level tokenizer of 300 pieces and three special tokens."""
    backend = tokenizers.Tokenizer(models.BPE(ignore_merges=direct))
    split = cuts or (pre_tokenizers.Split(tokenizers.Regex(GPT2), "isolated"),)
    ending = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*split, ending])
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=303, initial_alphabet=alphabet, special_tokens=["<s>", "</s>", "<|im_start|>"], show_progress=False
    )
    backend.train_from_iterator([TEXT], trainer)
    return Tokenizer(backend.to_str(), {"bos_token": "<s>", "eos_token": "</s>"})


def case_folder(family: str, folder: Path, **settings: Any) -> Path:
    """A folder of the family's tiny model, in float32."""
    a = FAMILIES[family].read({"model_type": family, **TINY, **CASES[family], **settings})
    write_model(
        folder,
        a,
        random_weights(shapes_of(a), a.norm_offset),
        dtype=torch.float32,
        shard_bytes=10**9,
        tokenizer=byte_level(),
        facts={},
    )
    return folder


def random_weights(shapes: dict[str, tuple[int, ...]], offset: float) -> Any:
    """Norms away from 1 and biases away from 0, so that a forgotten one shows."""
    generator = torch.Generator().manual_seed(3)
    for name, shape in shapes.items():
        values = torch.randn(shape, generator=generator)
        yield (
            name,
            values * (0.3 if len(shape) == 1 else 1.5 * shape[-1] ** -0.5)
            + (1 - offset) * name.endswith("norm.weight"),
        )
