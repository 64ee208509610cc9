"""What the headers of a model's files say of its sizes: compared with ``config.json`` before anything is built by it."""

from __future__ import annotations

import dataclasses
import re
from functools import lru_cache
from pathlib import Path

import torch

from trainer.models.architecture import Architecture
from trainer.models.hf_format import FormatError, WeightFiles, read_architecture
from trainer.models.stored import StoredWeights

LAYER = re.compile(r"model\.layers\.(\d+)\.")
TABLE, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def read_shape(folder: Path) -> Architecture:
    """The architecture of a folder whose files have the sizes that ``config.json`` names.

    A size that only the configuration names could take all memory before a tensor is read.

    Raises:
        FormatError: naming the first size that differs, or what keeps the folder from being read.
    """
    a = read_architecture(folder)
    stored = StoredWeights(folder, a)
    names = stored.files.files
    layers = {int(match[1]) for name in names if (match := LAYER.match(name))}
    if len(layers) != a.num_hidden_layers or max(layers, default=-1) + 1 != len(layers):
        raise FormatError(
            f"{folder}/config.json: num_hidden_layers={a.num_hidden_layers}, and the files hold {len(layers)} layers; "
            "download the folder again"
        )
    heads, groups = a.num_attention_heads * a.head_dim, a.num_key_value_heads * a.head_dim
    needed = {
        TABLE: (a.vocab_size, a.hidden_size),
        "model.norm.weight": (a.hidden_size,),
        "model.layers.0.self_attn.q_proj.weight": (heads * (1 + a.attention_gate), a.hidden_size),
        "model.layers.0.self_attn.k_proj.weight": (groups, a.hidden_size),
        "model.layers.0.mlp.gate_proj.weight": (a.intermediate_size, a.hidden_size),
        "model.layers.0.mlp.up_proj.weight": (a.intermediate_size, a.hidden_size),
    }
    for name, shape in needed.items():
        if name in stored and (have := stored.shape(name)) != shape:
            raise FormatError(
                f"{folder}: {name} is {have}, and by config.json it should be {shape}; download the folder again"
            )
    if a.tie_word_embeddings and not a.scores and _has_own_head(folder, _modified(folder)):
        a = dataclasses.replace(a, tie_word_embeddings=False)
    return a


def _modified(folder: Path) -> int:
    return max(file.stat().st_mtime_ns for file in folder.iterdir())


@lru_cache(maxsize=64)
def _has_own_head(folder: Path, _: int) -> bool:
    """Whether the files of a model that ties its embeddings hold another head, which it then has (as in transformers)."""
    files = WeightFiles(folder)
    if TABLE not in files.files or HEAD not in files.files or files.shape(TABLE) != files.shape(HEAD):
        return False
    table, head = files.tensor(TABLE), files.tensor(HEAD)
    return not torch.equal(table, head.to(table.dtype))
