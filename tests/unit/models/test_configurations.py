"""Spellings of `config.json`, old and new: each is read as transformers reads it, or refused in one sentence."""

import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.small_folder import write_folder
from trainer.batch import Documents
from trainer.functional import logits
from trainer.models.families import FAMILIES
from trainer.models.header import read_shape
from trainer.models.hf_format import FormatError, read_architecture, write_model
from trainer.models.load import Model, ModelLoader
from trainer.parallel.ddp import DDP

SIZES = {
    "vocab_size": 96, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 6,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LONG = {"type": "longrope", "short_factor": [1.0] * 3, "long_factor": [2.0] * 3}
SPELLINGS = {
    "mistral of earlier releases": ("mistral", {"rope_theta": 1e6, "sliding_window": 8}),
    "mistral without a window": ("mistral", {"sliding_window": None}),
    "mistral with types of layers": (
        "mistral", {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"] * 2},
    ),
    "yarn, type and not rope_type": ("qwen2", {"rope_theta": 1e6, "rope_scaling": {"type": "yarn", "factor": 4.0}}),
    "yarn beside other parameters": (
        "qwen3", {"rope_theta": 1e6, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, "rope_scaling": YARN},
    ),
    "yarn, its length at the top": (
        "llama", {"original_max_position_embeddings": 16, "rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
    ),
    "yarn, a factor by lengths": ("llama", {"rope_scaling": {**YARN, "factor": None}}),
    "a window from a layer on": ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 3}),
    "a window that is off": ("qwen2", {"use_sliding_window": False, "sliding_window": 8}),
    "longrope of Phi-3": (
        "phi3", {"original_max_position_embeddings": 32, "rope_scaling": LONG, "partial_rotary_factor": 0.75},
    ),
    "two bases of Gemma 3": (
        "gemma3_text", {"rope_theta": 1e6, "rope_local_base_freq": 5e3, "sliding_window": 8, "sliding_window_pattern": 2},
    ),
    "a scaling of OLMo 3": ("olmo3", {"rope_theta": 5e5, "rope_scaling": YARN, "sliding_window": 8}),
    "a pattern of Cohere 2": ("cohere2", {"sliding_window": 8, "sliding_window_pattern": 2}),
    "an activation of Gemma": ("gemma", {"hidden_act": "gelu", "hidden_activation": None}),
    "layers of SmolLM3": ("smollm3", {"no_rope_layers": [1, 0, 1, 0], "sliding_window": None}),
    "biases of Qwen3": ("qwen3", {"attention_bias": True}),
    "half a head of Nemotron": ("nemotron", {"partial_rotary_factor": 0.5, "rope_theta": 1e4}),
}  # fmt: skip


@pytest.mark.parametrize("name", SPELLINGS)
def test_a_spelling_is_read_as_transformers_reads_it(name, tmp_path):
    transformers = pytest.importorskip("transformers", minversion="5.0")
    kind, own = SPELLINGS[name]
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind, **SIZES, **own}))
    ours = read_architecture(tmp_path)
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    theirs.save_pretrained(tmp_path / "saved")
    # Types of layers make a ministral of a mistral there.
    saved = dataclasses.replace(read_architecture(tmp_path / "saved"), family=kind)

    assert ours == saved


def folder_with(tmp_path, **changes):
    folder = write_folder(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    return folder


def test_swish_is_silu(tmp_path):
    assert read_shape(folder_with(tmp_path, hidden_act="swish")).activation == "silu"


REFUSED = {
    "no window of nothing": ({"model_type": "mistral", "sliding_window": 0}, "sliding_window=0 is not a positive integer"),
    "a recurrence": (
        {"model_type": "qwen2", "layer_types": ["linear_attention"] * 2},
        "layer_types: linear_attention cannot be computed",
    ),
    "a list that is too short": ({"model_type": "qwen2", "layer_types": ["full_attention"]}, "is not a list of 2"),
    "an activation": ({"hidden_act": "xielu"}, "activation=xielu is not known; use one of silu, gelu"),
    "a rotation": ({"rope_scaling": {"rope_type": "mrope"}}, "rope_scaling.rope_type=mrope is not known"),
    "llama3 without its length": (
        {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}},
        "has missing keys original_max_position_embeddings",
    ),
    "experts nowhere": ({"model_type": "qwen3_moe", "decoder_sparse_step": 0}, "decoder_sparse_step=0 is not a positive"),
    "an MLP by name": ({"model_type": "qwen2_moe", "mlp_only_layers": ["0"]}, "is not a list of layers' numbers"),
    "dense layers of no number": (
        {"model_type": "glm4_moe", "first_k_dense_replace": None}, "first_k_dense_replace=null is not a number of layers"
    ),
    "attention both ways": (
        {"model_type": "gemma", "use_bidirectional_attention": True}, "use_bidirectional_attention=true cannot be computed"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_computed_is_one_sentence(name, tmp_path):
    changes, sentence = REFUSED[name]
    [problem] = Model(path=str(folder_with(tmp_path, **changes))).problems()
    assert sentence in problem
    assert "\n" not in problem


def test_embeddings_are_tied_where_nothing_is_said_only_in_families_that_do(tmp_path):
    config = {"model_type": "gemma", **SIZES}
    assert FAMILIES["gemma"].read(config).tie_word_embeddings
    assert not FAMILIES["llama"].read({**config, "model_type": "llama"}).tie_word_embeddings


def test_a_head_that_differs_from_the_tied_embeddings_is_the_models_own(tmp_path):
    transformers = pytest.importorskip("transformers", minversion="5.0")
    folder = write_folder(tmp_path / "model")
    stored = load_file(folder / "model.safetensors")
    assert "lm_head.weight" not in stored
    same = {**stored, "lm_head.weight": stored["model.embed_tokens.weight"].clone()}
    save_file(same, folder / "model.safetensors", metadata={"format": "pt"})
    assert read_shape(folder).tie_word_embeddings
    other = {**stored, "lm_head.weight": stored["model.embed_tokens.weight"].flip(0)}
    save_file(other, folder / "model.safetensors", metadata={"format": "pt"})
    ours = ModelLoader(Model(path=str(folder)), DDP(), 0, 265).load().eval()
    assert not ours.architecture.tie_word_embeddings
    tokens = torch.arange(12)[None]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        found = ours(tokens, Documents.from_lengths([12], 1), logits)
        torch.testing.assert_close(found, theirs(tokens).logits, rtol=0, atol=1e-5)  # float32, another order of sums


def test_a_base_model_opens_where_its_head_is_its_embeddings_else_it_is_one_short_sentence(tmp_path):
    folder = write_folder(tmp_path / "model")
    stored = {n.removeprefix("model."): t for n, t in load_file(folder / "model.safetensors").items()}
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    assert read_shape(folder).tie_word_embeddings
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    with pytest.raises(FormatError, match=r"missing keys lm_head\.weight$"):
        ModelLoader(Model(path=str(folder)), DDP(), 0, 265).load()


def test_a_scaling_beside_a_folder_is_computed_and_said_and_exported(tmp_path):
    folder = write_folder(tmp_path / "model")
    model = Model(path=str(folder), rope_scaling={"rope_type": "yarn", "factor": 2.0})
    assert list(model.problems()) == []
    assert list(Model.override_problems([f"model.path={folder}", "model.rope_scaling={rope_type: yarn}"])) == []
    load = ModelLoader(model, DDP(), 0, 265)
    [layer, _] = load.architecture.layers
    assert layer.rope.scaling == {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 2048}
    assert load.architecture.max_position_embeddings == 4096
    assert [line for line in model.decided(model) if "yarn in the place of the folder's own, up to 4096" in line]
    assert load.fingerprint() != ModelLoader(Model(path=str(folder)), DDP(), 0, 265).fingerprint()

    class NoTokenizer:
        bos = eos = pad = None
        stops = ()

        def save(self, folder) -> None:
            (folder / "tokenizer_config.json").write_text("{}")

    weights = load.load().named_parameters()
    write_model(
        tmp_path / "export", load.architecture, weights, dtype=torch.float32, shard_bytes=10**9, tokenizer=NoTokenizer(),
        facts={},
    )  # fmt: skip
    assert read_shape(tmp_path / "export") == load.architecture
