"""What a user's own module adds in one file: a model family. docs/extending.md shows the same."""

import pytest
import torch

from tests.parity.test_transformers import SMALL, perturbed, write
from trainer.batch import Documents
from trainer.functional import logits
from trainer.models.architecture import Architecture
from trainer.models.hf_format import FormatError, read_architecture
from trainer.models.load import Model, ModelLoader
from trainer.parallel.ddp import DDP

transformers = pytest.importorskip("transformers")

MODULE = '''
"""Seed-OSS (ByteDance, 2025): a Llama whose output projection has a bias of its own."""

from trainer.models.architecture import FAMILIES, Family

FAMILIES["seed_oss"] = Family(
    "SeedOss",
    bias_keys={
        "attention_bias": "attention_bias",
        "attention_output_bias": "attention_out_bias",
        "mlp_bias": "mlp_bias",
    },
    default_head_dim=128,
)
'''


@pytest.fixture
def family(clean_registries):
    exec(compile(MODULE, "seed_oss.py", "exec"), {})


def test_a_family_of_ones_own_computes_what_transformers_does(family, tmp_path):
    architecture = Architecture(**SMALL, head_dim=16, family="seed_oss", attention_bias=True, tie_word_embeddings=False)
    assert list(architecture.problems()) == []
    shape = {**SMALL, "head_dim": 16, "attention_bias": True, "tie_word_embeddings": False}
    ours = perturbed(ModelLoader(Model(**shape, family="seed_oss"), DDP(), 0, 101).load()).eval()
    write(architecture, ours, tmp_path / "export")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "export").eval()
    assert type(theirs).__name__ == "SeedOssForCausalLM"
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        expected = theirs(tokens).logits
        found = ours(tokens, Documents.from_lengths([20], 1), logits)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)  # float32, another order of sums
    assert read_architecture(tmp_path / "export") == architecture


def test_a_family_refuses_what_its_configuration_cannot_express(family):
    architecture = Architecture(**SMALL, family="seed_oss", qk_norm=True, sliding_window=8)
    assert list(architecture.problems()) == [
        "model.qk_norm=True cannot be written as family seed_oss; use model.family=qwen3",
        "model.sliding_window=8 is not family seed_oss's; use model.family=mistral",
    ]


def test_an_unknown_family_is_refused_with_those_that_there_are(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "seed_oss"}')
    with pytest.raises(
        FormatError, match="model_type=seed_oss is not supported; use one of llama, mistral, qwen2, qwen3"
    ):
        read_architecture(tmp_path)
