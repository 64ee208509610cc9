"""Folders that are opened to be used."""

import torch

from tests.unit.models.test_transformer import built
from trainer.generation.pretrained import narrowed


def test_a_model_in_bf16_keeps_its_wavelengths_in_float32():
    model = narrowed(built(), torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert {b.dtype for b in model.buffers()} == {torch.float32}
    assert model.lm_head.weight is model.model.embed_tokens.weight
