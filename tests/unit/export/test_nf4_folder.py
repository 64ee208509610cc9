"""Folders in bitsandbytes' layout: the bytes that transformers writes, and the model that it opens."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.shapes import architecture
from tests.small_folder import write_folder
from trainer.batch import Documents
from trainer.export.formats import FORMATS
from trainer.export.nf4_folder import nf4_problems, write_nf4
from trainer.functional import logits
from trainer.models.header import read_shape
from trainer.models.load import Model, ModelLoader
from trainer.models.nf4 import pack
from trainer.models.stored import StoredWeights
from trainer.parallel.ddp import DDP

pytest.importorskip("bitsandbytes", reason="needs bitsandbytes (extra: quant)")

SHAPE = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "initializer_range": 0.2,
}  # fmt: skip
TOKENS = torch.arange(24).view(2, 12) * 7 % 256


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return write_folder(tmp_path_factory.mktemp("source") / "model", shape=Model(**SHAPE), dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def written(source, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("written") / "model"
    assert write_nf4(source, out) == []
    return out


def model_of(folder: Path):
    """The folder's model as we compute it."""
    return ModelLoader(Model(path=str(folder)), DDP(), 0, 265).load()


def test_tensors_and_settings_are_those_that_transformers_writes(source, written, tmp_path):
    transformers = pytest.importorskip("transformers")
    settings = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype="bfloat16"
    )
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        source, quantization_config=settings, dtype=torch.bfloat16
    )
    theirs.save_pretrained(tmp_path / "theirs")
    one, other = (load_file(folder / "model.safetensors") for folder in (written, tmp_path / "theirs"))
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype, name
        assert torch.equal(tensor, other[name]), name
    of_ours, of_theirs = (
        json.loads((folder / "config.json").read_text())["quantization_config"]
        for folder in (written, tmp_path / "theirs")
    )
    assert {key: of_theirs[key] for key in of_ours if key != "llm_int8_skip_modules"} == {
        key: value for key, value in of_ours.items() if key != "llm_int8_skip_modules"
    }


def test_transformers_opens_the_folder_and_computes_our_logits(written):
    transformers = pytest.importorskip("transformers")
    # In training: on a CPU its evaluation has a kernel that rounds to bfloat16.
    theirs = transformers.AutoModelForCausalLM.from_pretrained(written).train()
    layers = [module for module in theirs.modules() if type(module).__name__ == "Linear4bit"]
    assert len(layers) == 14
    for layer in layers:
        layer.compute_dtype = torch.float32
    for parameter in theirs.parameters():
        if parameter.is_floating_point():  # what is not quantised stays as it is stored
            parameter.data = parameter.data.float()
    ours = model_of(written)(TOKENS, Documents.from_lengths([12, 12], 2), logits)
    # Two sums of 64 to 128 products in another order, through 2 layers.
    torch.testing.assert_close(ours, theirs(TOKENS).logits, rtol=0, atol=2e-5)


def test_what_is_read_again_is_what_was_packed(source, written):
    before, after = StoredWeights(source, read_shape(source)), StoredWeights(written, read_shape(written))
    assert before.files.files.keys() == after.files.files.keys()
    for name in before.files.files:
        tensor, packed = before.tensor(name), after.packed(name)
        if packed is None:
            assert torch.equal(after.tensor(name), tensor), name
        else:
            assert all(map(torch.equal, packed, pack(tensor))), name
    assert len(after.files.quantized) == 14


def test_layers_that_a_family_stores_as_one_are_packed_as_one(tmp_path):
    shape = Model(family="phi3", tie_word_embeddings=False, **SHAPE)
    source = write_folder(tmp_path / "source", shape=shape, dtype=torch.bfloat16)
    write_nf4(source, tmp_path / "out")
    files = StoredWeights(tmp_path / "out", read_shape(tmp_path / "out")).files
    kinds = {name.split(".", 3)[-1] for name in files.quantized}
    assert kinds == {
        f"{n}.weight" for n in ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
    }
    fused = files.tensor("model.layers.1.self_attn.qkv_proj.weight")
    parts = dict(model_of(tmp_path / "out").named_parameters())
    rows = [parts[f"model.layers.1.self_attn.{name}.weight"] for name in ("q_proj", "k_proj", "v_proj")]
    assert torch.equal(torch.cat(rows), fused)
    settings = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert settings["llm_int8_skip_modules"] == ["lm_head"]


def test_what_becomes_narrower_is_said_and_so_are_rows_misread_elsewhere(tmp_path):
    source = write_folder(tmp_path / "source")  # float32, rows of 16 and 24
    remarks = write_nf4(source, tmp_path / "out")
    assert len(remarks) == 2
    assert remarks[0].startswith("6 tensors that are not quantised are in bfloat16")
    assert "reads rows that 64 does not divide (16 of model.layers.0.self_attn.q_proj.weight)" in remarks[1]
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert {t.dtype for name, t in stored.items() if "norm" in name or "embed" in name} == {torch.bfloat16}
    # The weights were packed before they lost digits.
    original = load_file(source / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]
    assert torch.equal(stored["model.layers.0.mlp.up_proj.weight"].flatten(), pack(original).codes)


def test_experts_are_refused_before_anything_is_written():
    mixture = architecture(50, family="mixtral", experts=4, **SHAPE)
    assert list(FORMATS["nf4"].problems(mixture, None)) == list(nf4_problems(mixture, None)) != []
    assert FORMATS["nf4"].packages == ("bitsandbytes",)
    assert list(nf4_problems(architecture(50, **SHAPE), None)) == []
