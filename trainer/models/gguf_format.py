"""GGUF files of the Llama family: their shape, weights and tokenizer, as a Hugging Face folder holds them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers

from trainer.config import InputError
from trainer.data.tokenizer import Tokenizer
from trainer.models import families
from trainer.models.architecture import Architecture
from trainer.models.hf_format import write_model
from trainer.models.transformer import Transformer

FAMILIES = {"llama": "llama", "mistral": "mistral", "qwen2": "qwen2", "qwen3": "qwen3"}
NAMES = {
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm", "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip
OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
CONTROL, USER = 3, 4
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
SPLITS = {
    "default": (GPT2, False),
    "gpt-2": (GPT2, False),
    "smollm": (GPT2, True),
    "llama-bpe": (LLAMA3, False),
    "qwen2": (QWEN2, False),
}
"""How text is cut before merging, by ``tokenizer.ggml.pre``: the pattern, and whether digits are cut apart first."""


class UnsupportedError(InputError):
    """A file that is no GGUF file, or one with something that is not supported here."""


class Gguf:
    """Metadata and tensors of a file."""

    def __init__(self, file: Path) -> None:
        try:
            from gguf import GGUFReader
        except ImportError:
            raise UnsupportedError("GGUF files need the package gguf; pip install 'onecurve[convert]'") from None
        try:
            self.reader = GGUFReader(file)
        except Exception as error:  # whatever numbers in a damaged header lead to
            raise UnsupportedError(f"{file} is not a GGUF file that can be read ({error}); give a .gguf file") from None
        self.kind = ""
        self.kind = str(self.get("general.architecture"))
        if self.kind not in FAMILIES:
            raise UnsupportedError(
                f"{file}: architecture {self.kind} is not supported; use one of {', '.join(FAMILIES)}"
            )

    def get(self, key: str, default: Any = None) -> Any:
        """A value of the metadata; ``{arch}`` stands for the architecture's name."""
        value = self.reader.fields.get(key.replace("{arch}", self.kind))
        return default if value is None else value.contents()

    def names(self) -> set[str]:
        return {tensor.name for tensor in self.reader.tensors}


def architecture_of(file: Gguf) -> Architecture:
    """The shape that the metadata describes."""
    heads = file.get("{arch}.attention.head_count")
    width = file.get("{arch}.embedding_length")
    family, names = FAMILIES[file.kind], file.names()
    if file.get("{arch}.rope.scaling.type", "none") not in ("none", None) or "rope_freqs.weight" in names:
        raise UnsupportedError("scaled rotary positions are not written in a form that this converter reads")
    size = file.get("{arch}.attention.key_length", width // heads)
    _validate_features(file, size)
    window = file.get("{arch}.attention.sliding_window") if family == "mistral" else None
    a = families.FAMILIES[family].read(
        {
            "model_type": family,
            "vocab_size": len(file.get("tokenizer.ggml.tokens")),
            "hidden_size": width,
            "intermediate_size": file.get("{arch}.feed_forward_length"),
            "num_hidden_layers": file.get("{arch}.block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": file.get("{arch}.attention.head_count_kv", heads),
            "head_dim": size,
            "max_position_embeddings": file.get("{arch}.context_length"),
            "rope_theta": float(file.get("{arch}.rope.freq_base", 10000.0)),
            # The file holds the float32 next to the number that was meant (1e-5): seven digits give it back.
            "rms_norm_eps": float(f"{file.get('{arch}.attention.layer_norm_rms_epsilon'):.7g}"),
            "tie_word_embeddings": "output.weight" not in names,
            "sliding_window": window,
        }
    )
    biased, normed = "blk.0.attn_q.bias" in names, "blk.0.attn_q_norm.weight" in names
    return dataclasses.replace(a, attention_bias=biased, qk_norm="head" if normed else "")


def _validate_features(file: Gguf, size: int) -> None:
    """Nothing is computed in another way than the file says.

    Raises:
        UnsupportedError: naming the key.
    """
    plain: dict[str, float] = {"rope.dimension_count": size, "attention.value_length": size}
    plain |= dict.fromkeys(("attention.scale", "logit_scale", "embedding_scale", "residual_scale"), 1.0)
    plain |= dict.fromkeys(
        ("expert_count", "expert_used_count", "attn_logit_softcapping", "final_logit_softcapping"), 0
    )
    for key, value in plain.items():
        if (stored := file.get(f"{{arch}}.{key}", value)) not in (value, 0):
            raise UnsupportedError(f"{file.kind}.{key}={stored} is not supported; only {value} is")


def hugging_face_name(name: str) -> str:
    """A tensor's name in Hugging Face's words.

    Raises:
        UnsupportedError: if none of the families has such a tensor.
    """
    match name.split("."):
        case ["blk", layer, part, kind] if part in NAMES:
            return f"model.layers.{layer}.{NAMES[part]}.{kind}"
        case [part, kind] if part in OUTER:
            return f"{OUTER[part]}.{kind}"
    raise UnsupportedError(f"it holds {name}, which no model of {', '.join(FAMILIES)} has; give a file of one of these")


def weights_of(file: Gguf, a: Architecture) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors under Hugging Face's names, float32."""
    from gguf import dequantize

    for tensor in file.reader.tensors:
        values = np.array(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
        parts, name = tensor.name.split("."), hugging_face_name(tensor.name)
        # llama.cpp turns neighbouring pairs where Hugging Face turns halves; its converter reordered the rows.
        if file.kind == "llama" and parts[-2] in ("attn_q", "attn_k"):
            heads = a.num_attention_heads if parts[-2] == "attn_q" else a.num_key_value_heads
            split = values.reshape(heads, a.head_dim // 2, 2, *values.shape[1:])
            values = split.swapaxes(1, 2).reshape(values.shape)
        yield name, torch.from_numpy(np.ascontiguousarray(values))


def tokenizer_of(file: Gguf) -> Tokenizer:
    """The byte-level BPE that the metadata holds."""
    kind, pre = file.get("tokenizer.ggml.model"), file.get("tokenizer.ggml.pre", "default")
    if kind != "gpt2" or pre not in SPLITS:
        raise UnsupportedError(f"tokenizer {kind}/{pre} is not supported; use gpt2 with one of {', '.join(SPLITS)}")
    pieces = file.get("tokenizer.ggml.tokens")
    merges = [tuple(m.split(" ", 1)) for m in file.get("tokenizer.ggml.merges")]
    backend = tokenizers.Tokenizer(models.BPE({p: n for n, p in enumerate(pieces)}, merges))
    pattern, digits = SPLITS[pre]
    cut = [pre_tokenizers.Digits(individual_digits=True)] if digits else []
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            *cut,
            pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    types = file.get("tokenizer.ggml.token_type")
    backend.add_special_tokens([_exact(p) for p, t in zip(pieces, types, strict=True) if t == CONTROL])
    backend.add_tokens([_exact(p) for p, t in zip(pieces, types, strict=True) if t == USER])
    roles = {"bos_token": "bos", "eos_token": "eos", "pad_token": "padding", "unk_token": "unknown"}
    ids = {role: file.get(f"tokenizer.ggml.{key}_token_id") for role, key in roles.items()}
    settings = {role: pieces[number] for role, number in ids.items() if number is not None}
    settings["model_max_length"] = file.get("{arch}.context_length")
    settings["add_bos_token"] = file.get("tokenizer.ggml.add_bos_token")
    if template := file.get("tokenizer.chat_template"):
        settings["chat_template"] = template
    return Tokenizer(backend.to_str(), settings)


def _exact(piece: str) -> tokenizers.AddedToken:
    return tokenizers.AddedToken(piece, normalized=False, special=True)


def convert(source: Path, folder: Path, dtype: torch.dtype) -> Architecture:
    """Write the Hugging Face folder ``folder``, which must not exist, from a GGUF file; gives the model's shape.

    Quantised weights are dequantised in float32 and rounded once.

    Raises:
        UnsupportedError: if the file is no GGUF file, or holds something that is not supported.
    """
    file = Gguf(source)
    try:
        architecture = architecture_of(file)
        tokenizer = tokenizer_of(file)
        _validate_tensors(file, architecture)
    except (KeyError, IndexError, TypeError, AttributeError, ArithmeticError) as error:  # metadata of any kind
        raise UnsupportedError(f"{source} is damaged ({type(error).__name__}: {error}); download it again") from None
    except ValueError as error:
        raise UnsupportedError(f"{source}: {error}") from None
    facts = {"converted_from": source.name, "license": file.get("general.license")}
    write_model(
        folder, architecture, weights_of(file, architecture), dtype=dtype, shard_bytes=5 * 10**9,
        tokenizer=tokenizer, facts=facts,
    )  # fmt: skip
    return architecture


def _validate_tensors(file: Gguf, a: Architecture) -> None:
    """The file holds the tensors of its metadata's model, in its shapes: else what is written could not be loaded.

    Raises:
        UnsupportedError: naming one that is missing, unexpected, or of another shape.
    """
    stored = {hugging_face_name(t.name): tuple(int(n) for n in reversed(t.shape)) for t in file.reader.tensors}
    layers = {name.split(".")[2] for name in stored if name.startswith("model.layers.")}
    if problems := list(families.problems_of(a, "")):
        raise UnsupportedError("; ".join(problems))
    if len(layers) != a.num_hidden_layers:  # before a model is built of so many
        raise UnsupportedError(f"it says {a.num_hidden_layers} layers and holds {len(layers)}; download it again")
    with torch.device("meta"):
        needed = {name: tuple(p.shape) for name, p in Transformer(a).named_parameters()}
    missing, unexpected = sorted(needed.keys() - stored.keys()), sorted(stored.keys() - needed.keys())
    wrong = [n for n in sorted(needed.keys() & stored.keys()) if needed[n] != stored[n]]
    parts = [f"missing {name}" for name in missing[:1]] + [f"unexpected {name}" for name in unexpected[:1]]
    parts += [f"{name} is {stored[name]} and should be {needed[name]}" for name in wrong[:1]]
    if parts:
        raise UnsupportedError(f"its tensors are not those of its metadata: {'; '.join(parts)}; download it again")
