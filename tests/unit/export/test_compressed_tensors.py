"""Folders of integers, opened by transformers, and what each block of GPTQ was calibrated on."""

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.small_folder import write_folder
from trainer.batch import Documents
from trainer.config import InputError
from trainer.export.compressed_tensors import int_problems, write_int
from trainer.export.formats import FORMATS
from trainer.export.gptq import _batches, calibrated, clipped_scales, gptq
from trainer.export.matrices import matrices_of
from trainer.functional import logits
from trainer.models.header import read_shape
from trainer.models.int_grid import dequantise, quantise
from trainer.models.load import Model, ModelLoader
from trainer.models.sizes import linear_widths
from trainer.models.stored import StoredWeights
from trainer.parallel.ddp import DDP

transformers = pytest.importorskip("transformers", minversion="5.0")

TINY: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 64, "pad_token_id": None, "bos_token_id": None,
    "eos_token_id": None,
}  # fmt: skip
OWN: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": True, "attention_bias": True},
    "phi3": {},  # queries, keys and values are one matrix on disk, gate and up another
    "cohere": {},  # attention and MLP read the same
    "gemma2": {"sliding_window": 5},
    "qwen3_5_text": {
        "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
        "layer_types": ["linear_attention", "full_attention"],
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
    },
}  # fmt: skip
ROWS = torch.randint(96, (12, 24), generator=torch.Generator().manual_seed(3)).tolist()
TOKENS = torch.tensor(ROWS[:2])


@pytest.fixture(scope="module", params=sorted(OWN))
def family(request, tmp_path_factory) -> Path:
    return written(request.param, tmp_path_factory.mktemp(request.param) / "theirs")


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    return written("llama", tmp_path_factory.mktemp("llama") / "theirs")


def written(kind: str, folder: Path, dtype: torch.dtype = torch.float32, **keys: Any) -> Path:
    """A family's model with random weights."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **TINY | OWN[kind] | keys)
    model = transformers.AutoModelForCausalLM.from_config(config).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.2 * torch.randn_like(parameter) + (parameter.dim() == 1) * parameter)
    model.save_pretrained(folder)
    (folder / "tokenizer_config.json").write_text("{}")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    return folder


def opened(folder: Path) -> torch.nn.Module:
    """Our model of a folder, dequantised."""
    return ModelLoader(Model(path=str(folder)), DDP(), 0, 96).load().eval()


@torch.no_grad()
def ours_on(model: torch.nn.Module) -> torch.Tensor:
    return model(TOKENS, Documents.from_lengths([TOKENS.shape[1]] * len(TOKENS), len(TOKENS)), logits)


@torch.no_grad()
def theirs_on(folder: Path) -> torch.Tensor:
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    return model.eval()(TOKENS).logits


def apart(logits: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference, as a part of the spread of what is expected."""
    return float((logits - expected).abs().max() / expected.std())


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_int4_opens_in_transformers_with_our_logits(method, family, tmp_path):
    pytest.importorskip("compressed_tensors")
    write_int(4, method, family, tmp_path / "out", ROWS)
    ours = ours_on(opened(tmp_path / "out"))
    # float32 on both sides: sums in another order.
    assert apart(theirs_on(tmp_path / "out"), ours) < 1e-4
    original = ours_on(opened(family))
    assert apart(ours, original) > 0.02


def test_int8_opens_in_transformers_which_rounds_each_token_s_activations(family, tmp_path):
    pytest.importorskip("compressed_tensors")
    write_int(8, "rtn", family, tmp_path / "out")
    model = opened(tmp_path / "out")
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(lambda _, x: by_token(x[0]))
    # Of the mean, since an activation between two steps may fall on either side. Unrounded ones are 0.02 off.
    theirs, ours = theirs_on(tmp_path / "out"), ours_on(model)
    assert (theirs - ours).abs().mean() < 2e-3 * ours.std()


def by_token(x: torch.Tensor) -> torch.Tensor:
    """Each token's values on 256 steps, of which its largest lies half a step outside."""
    step = x.abs().amax(-1, keepdim=True) / 127.5
    return (x / step).round().clamp(-128, 127) * step


def test_rounding_is_to_the_grid_of_training(llama, tmp_path):
    write_int(4, "rtn", llama, tmp_path / "out")
    rounded, original = opened(tmp_path / "out").state_dict(), load_file(llama / "model.safetensors")
    for name in linear_widths(read_shape(llama)):
        assert torch.equal(rounded[name], dequantise(*quantise(original[name], 4, 32))), name


@torch.no_grad()
def test_a_block_is_calibrated_on_what_the_rounded_ones_before_it_give(llama, tmp_path):
    write_int(4, "gptq", llama, tmp_path / "out", ROWS)
    written, original = opened(tmp_path / "out").state_dict(), load_file(llama / "model.safetensors")
    model = opened(tmp_path / "out")
    last = {name: tensor for name, tensor in original.items() if name.startswith("model.layers.1.")}
    model.load_state_dict(last, strict=False)
    read: dict[str, torch.Tensor] = {}
    for name in last:
        if name in linear_widths(read_shape(llama)):
            layer = model.get_submodule(name.removesuffix(".weight"))
            layer.register_forward_pre_hook(lambda _, x, name=name: read.update({name: x[0].flatten(0, 1)}))
    model(torch.tensor(ROWS).view(1, -1), Documents.from_lengths([24] * 12, 1), logits)
    assert len(read) == 7
    for name, x in read.items():
        scale = clipped_scales(original[name], (x.T @ x).diagonal(), 4, 32)
        codes = gptq(original[name], x.T @ x, 4, scale)
        assert torch.equal(written[name], dequantise(codes, scale)), name


@torch.no_grad()
def test_rows_of_several_forwards_count_like_those_of_one(llama, monkeypatch):
    stored = StoredWeights(llama, read_shape(llama))
    one = [codes for _, codes, _ in calibrated(stored, matrices_of(stored), 4, 32, ROWS)]
    monkeypatch.setattr("trainer.export.gptq.FORWARD", 60)  # two rows of 24, and no third
    forwards = [batch.documents.lengths for batch in _batches([*ROWS, [], [5] * 99], 96)]
    assert forwards == [(24, 24)] * 6 + [(99,)]
    several = [codes for _, codes, _ in calibrated(stored, matrices_of(stored), 4, 32, ROWS)]
    # Sums in another order may move what lies between two codes, and then what comes after it.
    same = sum(int((a == b).sum()) for a, b in zip(one, several, strict=True)) / sum(a.numel() for a in one)
    assert same > 0.999


@torch.no_grad()
def test_a_reward_model_s_head_stays_as_it_was(tmp_path):
    source = write_folder(tmp_path / "source", scores=True)
    write_int(8, "rtn", source, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["ignore"] == ["score"]
    before, after = (load_file(folder / "model.safetensors") for folder in (source, tmp_path / "out"))
    assert torch.equal(before["score.weight"], after["score.weight"])
    model = ModelLoader(Model(path=str(tmp_path / "out")), DDP(), 0, 265, scores=True).load()
    name = "model.layers.1.mlp.up_proj.weight"
    assert torch.equal(model.get_parameter(name), dequantise(*quantise(before[name], 8, 0)))


def test_what_is_no_linear_layer_s_stays_as_it_was(llama, tmp_path):
    remarks = write_int(4, "rtn", llama, tmp_path / "out")
    after, before = load_file(tmp_path / "out" / "model.safetensors"), load_file(llama / "model.safetensors")
    plain = [name for name in after if not name.endswith(("_packed", "_scale", "_shape"))]
    assert len(plain) == 1 + 1 + 2 * (2 + 4)  # embedding and last norm; norms and biases of the blocks
    assert all(torch.equal(after[name], before[name]) for name in plain)
    assert "a scale for every 32 inputs" in remarks[0]
    assert "stay in float32" in remarks[1]
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "{{ messages }}"
    old, new = (json.loads((folder / "config.json").read_text()) for folder in (llama, tmp_path / "out"))
    assert new.pop("quantization_config")["config_groups"]["group_0"]["weights"]["group_size"] == 32
    assert new == old


def test_a_folder_of_several_files_becomes_one_of_several(llama, tmp_path, monkeypatch):
    monkeypatch.setattr("trainer.export.rounded_folder.SHARD_BYTES", 60_000)
    write_int(8, "rtn", llama, tmp_path / "parts")
    monkeypatch.undo()
    write_int(8, "rtn", llama, tmp_path / "one")
    index = json.loads((tmp_path / "parts" / "model.safetensors.index.json").read_text())["weight_map"]
    parts = {name: t for file in set(index.values()) for name, t in load_file(tmp_path / "parts" / file).items()}
    expected = load_file(tmp_path / "one" / "model.safetensors")
    assert len(set(index.values())) > 1
    assert parts.keys() == index.keys() == expected.keys()
    assert all(torch.equal(parts[name], expected[name]) for name in expected)


def test_gptq_says_how_far_it_is(llama, tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        write_int(4, "gptq", llama, tmp_path / "out", ROWS)
    assert [r.message for r in caplog.records if "GPTQ" in r.message] == ["GPTQ: block 1 of 2", "GPTQ: block 2 of 2"]


@pytest.mark.parametrize("rows", [[], [[]]], ids=["none", "empty"])
def test_gptq_without_rows_names_the_way_to_give_some(rows, llama, tmp_path):
    with pytest.raises(InputError, match=r"--calibration FILE\.jsonl, or use int4-rtn"):
        write_int(4, "gptq", llama, tmp_path / "out", rows)


@pytest.mark.parametrize("token", [96, -1])
def test_rows_of_another_tokenizer_are_refused(token, llama, tmp_path):
    with pytest.raises(InputError, match=f"holds token {token}, and the model has 96"):
        write_int(4, "gptq", llama, tmp_path / "out", [[1, token]])


def test_rows_that_no_group_divides_are_refused_by_name(llama):
    a = dataclasses.replace(read_shape(llama), intermediate_size=100)
    assert list(int_problems(8, a, None)) == []
    [problem] = int_problems(4, a, None)
    assert "the 100 of model.layers.0.mlp.down_proj.weight; use int8" in problem


def test_the_formats_are_in_the_table(llama, tmp_path):
    a = dataclasses.replace(read_shape(llama), intermediate_size=100)
    refused = {name: list(FORMATS[name].problems(a, None)) for name in ("int4", "int4-rtn", "int8")}
    assert [len(problems) for problems in refused.values()] == [1, 1, 0]
    assert [FORMATS[name].calibrated for name in refused] == [True, False, False]
    for name, (bits, method) in {"int4": (4, "gptq"), "int4-rtn": (4, "rtn"), "int8": (8, "rtn")}.items():
        FORMATS[name].write(llama, tmp_path / name, ROWS)
        write_int(bits, method, llama, tmp_path / f"{name}-expected", ROWS)
        after, expected = opened(tmp_path / name), opened(tmp_path / f"{name}-expected")
        assert all(torch.equal(tensor, expected.state_dict()[n]) for n, tensor in after.state_dict().items())


def test_experts_are_refused(llama):
    a = read_shape(llama)
    layers = tuple(dataclasses.replace(layer, sparse=True) for layer in a.layers)
    a = dataclasses.replace(a, layers=layers, experts=4, experts_per_token=2, expert_size=32)
    assert "use a GGUF format" in next(int_problems(8, a, None))
