"""Four-bit blocks made numbers."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from trainer.models.hf_format import FormatError, write_model
from trainer.models.load import Model, ModelLoader
from trainer.models.mxfp4 import from_mxfp4
from trainer.parallel.ddp import DDP


class NoTokenizer:
    bos = eos = pad = None
    stops = ()

    def save(self, folder) -> None:
        (folder / "tokenizer_config.json").write_text("{}")


def test_a_byte_holds_two_values_and_a_block_has_one_scale():
    blocks = torch.zeros(1, 1, 2, 16, dtype=torch.uint8)
    blocks[0, 0, 0, 0] = 0x7 | 0x9 << 4  # 6 and -0.5
    blocks[0, 0, 1, 15] = 0x1 << 4  # 0.5, the last of its block
    out = from_mxfp4(blocks, torch.tensor([[[128, 120]]], dtype=torch.uint8))
    assert out.shape == (1, 1, 64)
    assert out[0, 0, :2].tolist() == [12.0, -1.0]
    assert out[0, 0, 63].item() == 0.5 * 2**-7
    assert out.count_nonzero() == 3


def test_all_bytes_mean_what_they_mean_in_transformers():
    theirs = pytest.importorskip("transformers.integrations.mxfp4")
    draw = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, 256, (2, 5, 3, 16), dtype=torch.uint8, generator=draw)
    scales = torch.randint(100, 140, (2, 5, 3), dtype=torch.uint8, generator=draw)
    assert torch.equal(from_mxfp4(blocks, scales), theirs.convert_moe_packed_tensors(blocks, scales).transpose(1, 2))


def test_a_folder_of_four_bit_experts_is_read_as_numbers(tmp_path):
    shape = {
        "family": "gpt_oss", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 8, "experts": 3, "tie_word_embeddings": False,
    }  # fmt: skip
    plain, folder = ModelLoader(Model(**shape), DDP(), 0, 40), tmp_path / "model"
    write_model(
        folder, plain.architecture, plain.load().named_parameters(), dtype=torch.bfloat16, shard_bytes=10**9,
        tokenizer=NoTokenizer(), facts={},
    )  # fmt: skip
    tensors, draw = load_file(folder / "model.safetensors"), torch.Generator().manual_seed(0)
    for layer in range(2):
        for name, rows, groups in (("gate_up_proj", 128, 1), ("down_proj", 32, 2)):
            stem = f"model.layers.{layer}.mlp.experts.{name}"
            del tensors[stem]
            tensors[f"{stem}_blocks"] = torch.randint(0, 256, (3, rows, groups, 16), dtype=torch.uint8, generator=draw)
            tensors[f"{stem}_scales"] = torch.randint(120, 128, (3, rows, groups), dtype=torch.uint8, generator=draw)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4"}
    (folder / "config.json").write_text(json.dumps(config))
    experts = ModelLoader(Model(path=str(folder)), DDP(), 0, 40).load().model.layers[1].mlp.experts
    stem = "model.layers.1.mlp.experts"
    woven, down = (
        from_mxfp4(*(tensors[f"{stem}.{name}_{part}"] for part in ("blocks", "scales")))
        for name in ("gate_up_proj", "down_proj")
    )
    assert torch.equal(experts.down_proj.weight, down.float())
    # Gate and up alternate on disk, and are one below the other here.
    assert torch.equal(experts.gate_up_proj.weight, torch.cat([woven[:, ::2], woven[:, 1::2]], 1).float())
    config["quantization_config"] = {"quant_method": "fp8"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(FormatError, match="the weights are quantized"):
        ModelLoader(Model(path=str(folder)), DDP(), 0, 40).load()
