"""What a user's own module adds in one file: a model family. docs/extending.md shows the same."""

import dataclasses
import json

import pytest
import torch

from tests.parity.test_transformers import SMALL, perturbed, write
from tests.shapes import architecture
from trainer.batch import Documents
from trainer.functional import logits
from trainer.models.families import problems_of
from trainer.models.hf_format import FormatError, read_architecture
from trainer.models.load import Model, ModelLoader
from trainer.parallel.ddp import DDP

transformers = pytest.importorskip("transformers")

MODULE = '''
"""AFM (Arcee, 2025): a Llama whose MLP has no gate and a squared ReLU."""

from trainer.models.families import BIAS, EPS, FAMILIES, MLP_BIAS
from trainer.models.family import Family, Key

FAMILIES["arcee"] = Family(
    "Arcee",
    features={"gated": False},
    keys={**BIAS, **MLP_BIAS, **EPS, "activation": Key("hidden_act", "relu2")},
)
'''


@pytest.fixture
def family(clean_registries):
    exec(compile(MODULE, "arcee.py", "exec"), {})


def test_a_family_of_ones_own_computes_what_transformers_does(family, tmp_path):
    settings = {**SMALL, "head_dim": 16, "family": "arcee", "tie_word_embeddings": False}
    ours = perturbed(ModelLoader(Model(**settings), DDP(), 0, 101).load()).eval()
    assert list(problems_of(ours.architecture)) == []
    write(ours.architecture, ours, tmp_path / "export")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "export").eval()
    assert type(theirs).__name__ == "ArceeForCausalLM"
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        expected = theirs(tokens).logits
        found = ours(tokens, Documents.from_lengths([20], 1), logits)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)  # float32, another order of sums
    assert read_architecture(tmp_path / "export") == ours.architecture


def test_a_family_refuses_what_its_configuration_cannot_express(family):
    shape = architecture(101, family="arcee", qk_norm=True)
    assert list(problems_of(shape)) == ["model.qk_norm cannot be written as family arcee; leave it at its default"]
    windowed = architecture(101, sliding_window=8)
    [problem] = problems_of(windowed)
    assert problem.startswith("model.sliding_window cannot be written as family llama; use model.family=mistral or ")
    assert list(problems_of(dataclasses.replace(windowed, family="mistral"))) == []


@pytest.mark.parametrize(
    ("config", "needs"),
    [
        ({"model_type": "deepseek_v3", "kv_lora_rank": 512}, "it needs multi-head latent attention, which the decoder"),
        ({"model_type": "bamba", "mamba_d_state": 256, "mamba_d_conv": 4}, "it needs Mamba layers, which the decoder"),
        ({"model_type": "bert", "architectures": ["BertForMaskedLM"]}, "it needs an encoder, which the decoder lacks"),
        (
            {"model_type": "arcee"},
            "no row of trainer/models/families.py describes it; add one as docs/extending.md shows",
        ),
    ],
    ids=lambda value: value["model_type"] if isinstance(value, dict) else "",
)
def test_an_unknown_family_is_refused_with_what_it_needs(tmp_path, config, needs):
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(FormatError) as refused:
        read_architecture(tmp_path)
    assert f"model_type={config['model_type']} is not supported: {needs}" in str(refused.value)
    assert "docs/families.md" in str(refused.value)
