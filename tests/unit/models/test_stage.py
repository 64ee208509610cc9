"""What a stage has of a decoder, by name."""

import pytest
import torch

from trainer.models.load import Model
from trainer.models.shape import architecture_of
from trainer.models.stage import keep_stage
from trainer.models.transformer import Transformer
from trainer.parallel.mesh import Axis

SHAPE = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 5, "num_attention_heads": 2}


def stages(tied: bool, count: int) -> list[set[str]]:
    """Beginnings of the names of the parameters that each stage has."""
    result = []
    for rank in range(count):
        shape = Model(**SHAPE, num_key_value_heads=1, head_dim=8, tie_word_embeddings=tied)
        with torch.device("meta"):
            model = Transformer(architecture_of(shape, 50))
        keep_stage(model, Axis(rank, count))
        names = (name.split(".") for name, _ in model.named_parameters())
        result.append({".".join(part for part in name[1:3] if part != "weight") or name[0] for name in names})
    return result


@pytest.mark.parametrize("tied", [True, False])
def test_layers_are_divided_and_the_ends_have_what_reads_tokens_and_writes_them(tied):
    first, middle, last = stages(tied, 3)
    # 5 layers in parts of 1, 2 and 2: 5 * n // 3.
    assert first == {"embed_tokens", "layers.0"}
    assert middle == {"layers.1", "layers.2"}
    assert last == {"layers.3", "layers.4", "norm", "embed_tokens" if tied else "lm_head"}


def test_one_stage_is_the_model():
    assert stages(True, 1) == [{"embed_tokens", *(f"layers.{n}" for n in range(5)), "norm"}]
