"""Image-text folders: their text part is read, what is left out is counted, and what is written is a model of text."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.chats import byte_tokenizer
from tests.small_folder import write_folder
from trainer.batch import Documents
from trainer.functional import logits
from trainer.generation.pretrained import ChatModel
from trainer.models.header import read_shape
from trainer.models.hf_format import FormatError, WeightFiles, read_architecture, write_model
from trainer.models.load import Model, ModelLoader
from trainer.models.text_part import text_names
from trainer.parallel.ddp import DDP

transformers = pytest.importorskip("transformers")
TEXT = {
    "vocab_size": 265, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "tie_word_embeddings": False,
    "pad_token_id": None, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
VISION = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip
QWEN = {
    "depth": 1, "num_heads": 2, "hidden_size": 16, "intermediate_size": 24, "patch_size": 14, "out_hidden_size": 32,
    "num_position_embeddings": 16,
}  # fmt: skip
DELTA = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 12,
    "layer_types": ["linear_attention", "full_attention"],
}  # fmt: skip
YARN = {
    "rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16,
    "llama_4_scaling_beta": 0.1,
}  # fmt: skip
WRAPPERS: dict[str, tuple[str, dict, dict]] = {
    "llava": ("llama", {}, {"model_type": "clip_vision_model", **VISION}),
    "gemma3": ("gemma3_text", {"sliding_window": 7}, {"model_type": "siglip_vision_model", **VISION}),
    "mistral3": ("ministral3", {"rope_parameters": YARN}, {"model_type": "pixtral", **VISION}),
    "qwen3_5": ("qwen3_5_text", DELTA, QWEN),
}


def wrapped(kind: str, folder: Path):
    """A tiny random image-text model, saved."""
    text, own, vision = WRAPPERS[kind]
    config = transformers.AutoConfig.for_model(
        kind, text_config={"model_type": text, **TEXT, **own}, vision_config=vision,
        tie_word_embeddings=False, image_token_index=5, image_token_id=5,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.AutoModelForImageTextToText.from_config(config, attn_implementation="eager").eval()
    model.save_pretrained(folder)
    return model


@torch.no_grad()
def ours(folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    model = ModelLoader(Model(path=str(folder)), DDP(), 0, 265).load().eval()
    return model(tokens, Documents.from_lengths([tokens.shape[1]], 1), logits)


@pytest.mark.parametrize("kind", WRAPPERS)
def test_the_text_part_computes_what_it_computes_in_its_model(kind, tmp_path):
    theirs = wrapped(kind, tmp_path / "model")
    tokens = torch.randint(6, 96, (1, 20))
    expected = theirs(tokens).logits
    torch.testing.assert_close(ours(tmp_path / "model", tokens), expected, rtol=1e-4, atol=2e-5)
    assert read_shape(tmp_path / "model").family == WRAPPERS[kind][0]
    [remark] = ModelLoader(Model(path=str(tmp_path / "model")), DDP(), 0, 265).remarks()
    others = [n for n, _ in theirs.named_parameters() if "language_model" not in n and "lm_head" not in n]
    assert f"only the text part is read: {len(others)} tensors of other parts are left out (" in remark
    assert "vision_tower" in remark or "visual" in remark


def test_a_model_that_is_opened_to_answer_says_what_is_not_read(tmp_path, capsys):
    wrapped("qwen3_5", tmp_path / "model")
    byte_tokenizer().save(tmp_path / "model")
    ChatModel.open(tmp_path / "model", "chatml")
    assert "only the text part is read: " in capsys.readouterr().err


def test_the_text_part_is_exported_as_a_model_of_text(tmp_path):
    theirs = wrapped("qwen3_5", tmp_path / "model")
    load = ModelLoader(Model(path=str(tmp_path / "model")), DDP(), 0, 265)
    write_model(
        tmp_path / "export", load.architecture, load.load().named_parameters(), dtype=torch.float32, shard_bytes=10**9,
        tokenizer=byte_tokenizer(), facts={},
    )  # fmt: skip
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "export", dtype=torch.float32).eval()
    tokens = torch.randint(6, 96, (1, 20))
    assert type(again).__name__ == "Qwen3_5ForCausalLM"
    torch.testing.assert_close(again(tokens).logits, theirs(tokens).logits, rtol=1e-5, atol=1e-5)


def test_sizes_that_gemma_3_leaves_out_are_its_own(tmp_path):
    # The text_config of google/gemma-3-4b-it.
    text = {
        "hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text", "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "gemma3", "text_config": text, "vision_config": {}})
    )
    a = read_architecture(tmp_path)
    assert (a.vocab_size, a.num_attention_heads, a.num_key_value_heads, a.head_dim) == (262208, 8, 4, 256)
    assert a.tie_word_embeddings
    assert [layer.window for layer in a.layers[:6]] == [1024] * 5 + [None]
    assert a.layers[5].rope.scaling == {"rope_type": "linear", "factor": 8.0}
    assert a.layers[0].rope.scaling == {}


@pytest.mark.parametrize("predicting", [0, 1])
def test_a_layer_that_predicts_further_ahead_is_left_out_and_counted(predicting, tmp_path):
    # As zai-org/GLM-4.5 has it: behind the last of num_hidden_layers, with an embedding, norms and a head of its own.
    folder = write_folder(tmp_path / "model")
    config, stored = json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")
    layer = {n.replace("layers.1.", "layers.2."): t + 1 for n, t in stored.items() if n.startswith("model.layers.1.")}
    layer |= {f"model.layers.2.{name}.weight": torch.ones(16) for name in ("enorm", "hnorm", "shared_head.norm")}
    save_file({**stored, **layer}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({**config, "num_nextn_predict_layers": predicting}))
    load = ModelLoader(Model(path=str(folder)), DDP(), 0, byte_tokenizer().vocab_size)
    if not predicting:
        with pytest.raises(FormatError, match="num_hidden_layers=2, and the files hold 3 layers"):
            read_shape(folder)
        return
    assert read_shape(folder).num_hidden_layers == 2
    assert {name: p.shape for name, p in load.load().named_parameters()} == {n: t.shape for n, t in stored.items()}
    [remark] = load.remarks()
    assert remark.endswith(f"model: {len(layer)} tensors of layers that predict tokens further ahead are left out")


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
