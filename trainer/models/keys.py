"""Keys of ``config.json`` that many families share, by feature."""

from __future__ import annotations

from trainer.models.family import Key, power

HEAD_DIM = {"head_dim": Key("head_dim", 128)}
EPS = {"rms_norm_eps": Key("rms_norm_eps", 1e-5)}
TIED = {"tie_word_embeddings": Key("tie_word_embeddings", True)}
IN_BIAS = {"attention_bias": Key("attention_bias", False)}
BIAS = {**IN_BIAS, "attention_output_bias": Key("attention_bias", False)}
MLP_BIAS = {"mlp_bias": Key("mlp_bias", False)}
ALL_BIAS = {feature: Key("use_bias", False) for feature in ("attention_bias", "attention_output_bias", "mlp_bias")}
MULTIPLIERS = {
    "embedding_scale": Key("embedding_multiplier", 1.0), "residual_scale": Key("residual_multiplier", 1.0),
    "attention_scale": Key("attention_multiplier", 1.0), "logit_scale": power("logits_scaling", -1),
}  # fmt: skip
