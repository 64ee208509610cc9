"""Image-text folders: their text part is read, what is left out is counted, and what is written is a model of text."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.small_folder import write_folder
from trainer.batch import Documents
from trainer.functional import logits
from trainer.models.header import read_shape
from trainer.models.hf_format import FormatError, WeightFiles
from trainer.models.load import Model, ModelLoader
from trainer.models.text_part import text_names
from trainer.parallel.ddp import DDP

transformers = pytest.importorskip("transformers")
TEXT = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "tie_word_embeddings": False,
    "pad_token_id": None, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
VISION = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip
WRAPPERS = {"mistral3": ("mistral", "pixtral"), "llava": ("llama", "clip_vision_model")}


def wrapped(kind: str, folder: Path):
    """A tiny random image-text model, saved."""
    text, vision = WRAPPERS[kind]
    config = transformers.AutoConfig.for_model(
        kind, text_config={"model_type": text, **TEXT}, vision_config={"model_type": vision, **VISION},
        tie_word_embeddings=False, image_token_index=5, image_token_id=5,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.AutoModelForImageTextToText.from_config(config, attn_implementation="eager").eval()
    model.save_pretrained(folder)
    return model


@torch.no_grad()
def ours(folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    model = ModelLoader(Model(path=str(folder)), DDP(), 0, 96).load().eval()
    return model(tokens, Documents.from_lengths([tokens.shape[1]], 1), logits)


@pytest.mark.parametrize("kind", WRAPPERS)
def test_the_text_part_computes_what_it_computes_in_its_model(kind, tmp_path):
    theirs = wrapped(kind, tmp_path / "model")
    tokens = torch.randint(6, 96, (1, 20))
    expected = theirs(tokens).logits
    torch.testing.assert_close(ours(tmp_path / "model", tokens), expected, rtol=1e-5, atol=1e-5)
    assert read_shape(tmp_path / "model").family == WRAPPERS[kind][0]
    [remark] = ModelLoader(Model(path=str(tmp_path / "model")), DDP(), 0, 96).remarks()
    others = [n for n, _ in theirs.named_parameters() if "language_model" not in n and "lm_head" not in n]
    assert f"only the text part is read: {len(others)} tensors of other parts are left out (" in remark
    assert "vision_tower" in remark


@pytest.mark.parametrize("begin", ["model.language_model.", "language_model.model.", "language_model.", ""])
def test_names_of_every_release_are_read(begin, tmp_path):
    folder = write_folder(tmp_path / "model")
    stored, expected = load_file(folder / "model.safetensors"), WeightFiles(folder)
    head = "language_model.lm_head.weight" if begin.startswith("language_model.model") else "lm_head.weight"
    again = {n.replace("model.", begin, 1) if n.startswith("model.") else head: t for n, t in stored.items()}
    save_file({**again, **({"vision_tower.a": torch.ones(1)} if begin else {})}, folder / "model.safetensors")
    files = WeightFiles(folder)
    assert files.files.keys() == expected.files.keys()
    assert all(torch.equal(files.tensor(name), stored[name]) for name in stored)
    assert (files.left_out is None) == (not begin)


def test_a_text_model_s_names_stay_and_nothing_of_it_is_left_out():
    names = ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight", "model.language_model.x"]
    assert text_names(names) == {name: name for name in names}


def test_weights_in_fp8_are_refused_with_the_command_that_widens_them(tmp_path):
    folder = write_folder(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "fp8"}}))
    with pytest.raises(
        FormatError, match=r"quant_method=fp8.*FineGrainedFP8Config as C.*save_original_format=False.*model-bf16/"
    ):
        read_shape(folder)
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "awq"}}))
    with pytest.raises(FormatError, match=r"quant_method=awq.*use the folder of plain weights that it was made from$"):
        read_shape(folder)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("pytorch_model.bin", r"pytorch_model\.bin, a pickle, .* nothing opens it here; get safetensors of it"),
        ("consolidated.safetensors", r"Mistral's own layout; download the model\*\.safetensors"),
        ("notes.txt", "has neither model.safetensors nor"),
    ],
)
def test_weights_in_other_formats_are_refused_with_a_remedy(name, sentence, tmp_path):
    folder = write_folder(tmp_path / "model")
    (folder / "model.safetensors").rename(folder / name)
    with pytest.raises(FormatError, match=sentence):
        read_shape(folder)
