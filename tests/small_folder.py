"""A model of a few hundred weights as a Hugging Face folder, written without training one."""

from pathlib import Path

import torch

from tests.chats import byte_tokenizer
from trainer.models.hf_format import write_model
from trainer.models.load import Model, ModelLoader
from trainer.parallel.ddp import DDP

SHAPE = Model(
    hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=8
)


def write_folder(
    folder: Path,
    *,
    scores: bool = False,
    template: str | None = None,
    shape: Model = SHAPE,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """The folder, with the tokenizer whose ids are bytes; ``scores``: a reward model's."""
    tokenizer = byte_tokenizer(template=template)
    load = ModelLoader(shape, DDP(), 0, tokenizer.vocab_size, scores=scores)
    write_model(
        folder, load.architecture, load.load().named_parameters(), dtype=dtype, shard_bytes=10**9,
        tokenizer=tokenizer, facts={},
    )  # fmt: skip
    return folder
