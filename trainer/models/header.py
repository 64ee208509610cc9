"""What the headers of a model's files say of its sizes: compared with ``config.json`` before anything is built by it."""

from __future__ import annotations

import re
from pathlib import Path

from trainer.models.architecture import Architecture
from trainer.models.hf_format import FormatError, WeightFiles, read_architecture

LAYER = re.compile(r"model\.layers\.(\d+)\.")


def read_shape(folder: Path) -> Architecture:
    """The architecture of a folder whose files have the sizes that ``config.json`` names.

    A size that only the configuration names could take all memory before a tensor is read.

    Raises:
        FormatError: naming the first size that differs, or what keeps the folder from being read.
    """
    a, files = read_architecture(folder), WeightFiles(folder)
    layers = {int(match[1]) for name in files.files if (match := LAYER.match(name))}
    if len(layers) != a.num_hidden_layers or max(layers, default=-1) + 1 != len(layers):
        raise FormatError(
            f"{folder}/config.json: num_hidden_layers={a.num_hidden_layers}, and the files hold {len(layers)} layers; "
            "download the folder again"
        )
    heads, groups = a.num_attention_heads * a.head_dim, a.num_key_value_heads * a.head_dim
    needed = {
        "model.embed_tokens.weight": (a.vocab_size, a.hidden_size),
        "model.norm.weight": (a.hidden_size,),
        "model.layers.0.self_attn.q_proj.weight": (heads, a.hidden_size),
        "model.layers.0.self_attn.k_proj.weight": (groups, a.hidden_size),
        "model.layers.0.mlp.gate_proj.weight": (a.intermediate_size, a.hidden_size),
    }
    for name in needed.keys() & files.files.keys():
        if (stored := files.shape(name)) != needed[name]:
            raise FormatError(
                f"{folder}: {name} is {stored}, and by config.json it should be {needed[name]}; download the folder again"
            )
    return a
