"""Model folders from strangers: what is wrong with one is a sentence with the file's name, before anything is built."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests.small_folder import write_folder
from trainer.config import ConfigError
from trainer.data.tokenizer import open_tokenizer
from trainer.generation.pretrained import scoring_problem
from trainer.models.header import read_shape
from trainer.models.hf_format import FormatError, WeightFiles
from trainer.models.load import Model


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    return write_folder(tmp_path_factory.mktemp("original") / "model")


@pytest.fixture
def folder(original, tmp_path) -> Path:
    """A copy that may be damaged."""
    return Path(shutil.copytree(original, tmp_path / "model"))


VALUES = [
    ("vocab_size", 10**12, "embed_tokens.weight is (265, 16), and by config.json it should be (1000000000000, 16)"),
    ("num_hidden_layers", 10**9, "num_hidden_layers=1000000000 is not a positive integer below 10000"),
    ("num_hidden_layers", 3, "num_hidden_layers=3, and the files hold 2 layers"),
    ("hidden_size", 32, "should be"),
    ("intermediate_size", 10**9, "gate_proj.weight is (24, 16)"),
    ("num_attention_heads", 10**6, "q_proj.weight is (16, 16)"),
    ("num_key_value_heads", 0, "num_key_value_heads=0 is not a positive integer"),
    ("num_attention_heads", "two", 'num_attention_heads="two" is not a positive integer'),
    ("head_dim", 8.5, "head_dim=8.5 is not a positive integer"),
    ("max_position_embeddings", True, "max_position_embeddings=true is not a positive integer"),
    ("rms_norm_eps", -1, "rms_norm_eps=-1 is not a positive number"),
    ("rms_norm_eps", float("nan"), "rms_norm_eps=NaN is not a positive number"),
    ("rope_theta", "much", 'rope_theta="much" is not a positive number'),
    ("rope_parameters", [1], "rope_parameters=[1] is not an object"),
    ("tie_word_embeddings", "false", 'tie_word_embeddings="false" is not true or false'),
    ("architectures", "LlamaForCausalLM", "is not a list"),
]


@pytest.mark.parametrize(("key", "value", "sentence"), VALUES, ids=[f"{k}-{v}" for k, v, _ in VALUES])
def test_a_size_that_the_files_do_not_have_is_refused(key, value, sentence, folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, key: value}))
    with pytest.raises(FormatError) as error:
        read_shape(folder)
    assert sentence in str(error.value)
    assert "config.json" in str(error.value)


TEXTS = [
    ("config.json", "null", "holds NoneType, not a JSON object"),
    ("config.json", '{"model_type": "lla', "is no JSON that can be read"),
    ("model.safetensors.index.json", '{"weight_map": {"a"', "is no JSON that can be read"),
    ("model.safetensors.index.json", '{"weight_map": []}', "has no weight_map from tensors to files"),
    ("model.safetensors.index.json", '{"weight_map": {"a": "../outside.safetensors"}}', "is outside of"),
    ("model.safetensors.index.json", '{"weight_map": {"a": "/etc/passwd"}}', "is outside of"),
    ("model.safetensors.index.json", '{"weight_map": {"a": "gone.safetensors"}}', "which are missing"),
    ("model.safetensors", "no tensors", "is damaged"),
]


@pytest.mark.parametrize(("name", "text", "sentence"), TEXTS, ids=[f"{n}-{t[:24]}" for n, t, _ in TEXTS])
def test_a_damaged_file_of_a_model_is_named(name, text, sentence, folder):
    (folder / name).write_text(text)
    [problem] = Model(path=str(folder)).problems()
    assert f"{folder / name}" in problem
    assert sentence in problem


def test_a_fingerprint_is_of_all_weights_and_the_shape(folder):
    before = WeightFiles(folder).fingerprint()
    assert WeightFiles(folder).fingerprint() == before
    stored = load_file(folder / "model.safetensors")
    stored["model.norm.weight"][7] *= -1  # one of some thousand
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    assert WeightFiles(folder).fingerprint() != before


def test_a_tensor_that_only_the_index_names_is_missed(folder):
    stored = load_file(folder / "model.safetensors")
    index = {"weight_map": dict.fromkeys(stored, "model.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert list(Model(path=str(folder)).problems()) == []
    del stored["model.embed_tokens.weight"]
    save_file(stored, folder / "model.safetensors")
    [problem] = Model(path=str(folder)).problems()
    assert "lacks model.embed_tokens.weight, which model.safetensors.index.json says it holds" in problem


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "tokenizer.model"]
)
def test_a_damaged_file_of_a_tokenizer_is_named(name, folder):
    if name == "tokenizer.model":
        (folder / "tokenizer.json").unlink()
    (folder / name).write_text('{"cut')
    tokenizer_refused(folder)


def tokenizer_refused(folder: Path) -> None:
    with pytest.raises(ConfigError) as error:
        open_tokenizer(folder)
    assert f"{folder}/" in str(error.value)
    assert "\n" not in str(error.value)


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22e\nsize 12345\n"
FORMS = {
    "a pointer": ("tokenizer.json", POINTER.encode()),
    "a template of Latin-1": ("chat_template.jinja", b"{{ '\xe9' }}"),
    "a template that is a number": ("tokenizer_config.json", b'{"chat_template": 3}'),
    "templates without names": ("tokenizer_config.json", b'{"chat_template": [{"template": "a"}]}'),
    "tokens by no number": ("tokenizer_config.json", b'{"added_tokens_decoder": {"a": {"content": "<a>"}}}'),
    "tokens without a name": ("tokenizer_config.json", b'{"added_tokens_decoder": {"1": {}}}'),
    "a role without a name": ("special_tokens_map.json", b'{"eos_token": {"lstrip": false}}'),
    "ids that are no numbers": ("added_tokens.json", b'{"<a>": "many"}'),
    "a list": ("generation_config.json", b"[]"),
    "nested too deep": ("generation_config.json", b"[" * 100_000),
}


@pytest.mark.parametrize("name", FORMS)
def test_a_file_of_another_form_beside_a_tokenizer_is_named(name, folder):
    file, content = FORMS[name]
    (folder / file).write_bytes(content)
    tokenizer_refused(folder)


def test_a_pointer_in_place_of_weights_is_called_one(folder):
    (folder / "model.safetensors").write_text(POINTER)
    [problem] = Model(path=str(folder)).problems()
    assert f"{folder / 'model.safetensors'} is a pointer of Git LFS, not the file; run git lfs pull" in problem


def test_a_damaged_record_of_a_reward_model_is_seen_before_it_scores(tmp_path):
    scorer = write_folder(tmp_path / "scorer", scores=True)
    assert scoring_problem(scorer) is None
    (scorer / "onecurve.json").write_text('{"reward": [1, 2]}')
    assert "onecurve.json: reward=[1, 2] is no mean and std" in str(scoring_problem(scorer))
