"""GGUF files: a whole one becomes a folder with the same weights, any other is refused by name before anything is written."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.command import onecurve

gguf = pytest.importorskip("gguf")
LAYER = {
    "attn_norm": (16,), "ffn_norm": (16,), "attn_q": (16, 16), "attn_k": (8, 16), "attn_v": (8, 16),
    "attn_output": (16, 16), "ffn_gate": (24, 16), "ffn_up": (24, 16), "ffn_down": (16, 24),
}  # fmt: skip
SHAPES = {
    "token_embd.weight": (6, 16), "output_norm.weight": (16,),
    **{f"blk.{n}.{name}.weight": shape for n in (0, 1) for name, shape in LAYER.items()},
}  # fmt: skip


def write(file, shapes):
    """A Llama of two layers, two heads of 8 and six tokens, whose every weight is another number."""
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_block_count(2)
    writer.add_context_length(64)
    writer.add_embedding_length(16)
    writer.add_feed_forward_length(24)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["a", "b", "c", "ab", "<s>", "</s>"])
    writer.add_token_merges(["a b"])
    writer.add_token_types([1, 1, 1, 1, 3, 3])
    writer.add_bos_token_id(4)
    writer.add_eos_token_id(5)
    weights = {}
    for name, shape in shapes.items():
        weights[name] = np.arange(np.prod(shape), dtype=np.float32).reshape(shape) / 8
        writer.add_tensor(name, weights[name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return weights


def test_a_whole_file_becomes_a_folder_with_its_weights_and_tokenizer(tmp_path):
    weights = write(tmp_path / "a.gguf", SHAPES)
    code, shown, _ = onecurve(tmp_path, "convert", "a.gguf", "model", "--dtype", "fp32")
    assert (code, shown) == (0, "model: a llama model of 2 layers, 4,016 parameters in fp32, converted from a.gguf\n")
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    assert torch.equal(tensors["model.embed_tokens.weight"], torch.from_numpy(weights["token_embd.weight"]))
    # llama.cpp turns rows 2i and 2i + 1 of a head by one angle, Hugging Face rows i and i + 4 of 8.
    queries = tensors["model.layers.1.self_attn.q_proj.weight"]
    assert queries[:, 0].tolist() == [2 * row for row in (0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15)]


@pytest.mark.parametrize(
    ("shapes", "sentence"),
    [
        ({k: v for k, v in SHAPES.items() if "attn_v" not in k}, "missing blk.0.attn_v.weight"),
        ({**SHAPES, "blk.1.attn_q_norm.weight": (8,)}, "unexpected blk.1.attn_q_norm.weight"),
        ({**SHAPES, "blk.0.ffn_up.weight": (20, 16)}, "blk.0.ffn_up.weight is (20, 16) and should be (24, 16)"),
        ({k: v for k, v in SHAPES.items() if "blk.1" not in k}, "it says 2 layers and holds 1"),
        (
            {**SHAPES, "blk.0.attn_z.weight": (4,)},
            "not those of its metadata: unexpected blk.0.attn_z.weight",
        ),
        ({**SHAPES, "v.patch": (4,)}, "not those of its metadata: unexpected v.patch"),
    ],
    ids=["missing", "unexpected", "another shape", "a layer less", "another name", "another form of name"],
)
def test_a_file_with_other_tensors_than_its_metadata_says_is_refused(shapes, sentence, tmp_path):
    write(tmp_path / "a.gguf", shapes)
    code, _, errors = onecurve(tmp_path, "convert", "a.gguf", "model")
    assert (code, errors.count("\n")) == (2, 1)
    assert "a.gguf" in errors
    assert sentence in errors
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("part", [0.1, 0.5, 0.99])
def test_a_file_that_was_cut_is_refused(part, tmp_path):
    write(tmp_path / "a.gguf", SHAPES)
    content = (tmp_path / "a.gguf").read_bytes()
    (tmp_path / "a.gguf").write_bytes(content[: int(len(content) * part)])
    code, _, errors = onecurve(tmp_path, "convert", "a.gguf", "model")
    assert (code, errors.count("\n")) == (2, 1)
    assert "a.gguf" in errors
