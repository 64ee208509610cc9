"""Integers in compressed-tensors' layout: by hand, and by that library."""

import pytest
import torch

from trainer.models.compressed_format import dequantised, pack, settings_of, unpack, unread


def test_eight_codes_of_four_bits_are_a_word_the_first_lowest():
    codes = torch.tensor([[-8, -7, -6, -5, -4, -3, -2, -1], [0, 1, 2, 3, 4, 5, 6, 7]], dtype=torch.int8)
    # 8 is added: 0 to 7, and 8 to 15. The second word's highest bit makes it negative.
    assert pack(codes, 4).tolist() == [[0x76543210], [0xFEDCBA98 - 2**32]]


def test_four_codes_of_eight_bits_are_a_word_the_first_lowest():
    codes = torch.tensor([[-128, -1, 0, 127]], dtype=torch.int8)
    assert pack(codes, 8).tolist() == [[0xFF807F00 - 2**32]]


@pytest.mark.parametrize("bits", [4, 8])
def test_what_was_packed_comes_back(bits):
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1)
    codes = torch.randint(low, high, (5, 64), dtype=torch.int8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(unpack(pack(codes, bits), bits, 64), codes)


def test_what_pads_the_last_word_of_a_row_is_left_out():
    words = torch.tensor([[0x76543210], [0x01234567]], dtype=torch.int32)
    assert unpack(words, 4, 5).tolist() == [[-8, -7, -6, -5, -4], [-1, -2, -3, -4, -5]]


def test_a_weight_is_each_code_times_the_scale_of_its_group():
    settings = settings_of(4, 4, "lm_head")
    tensors = {
        "weight_packed": pack(torch.tensor([[1, 2, 3, 4, -1, -2, -3, -4]]), 4),
        "weight_scale": torch.tensor([[0.5, 2.0]], dtype=torch.bfloat16),
        "weight_shape": torch.tensor([1, 8]),
    }
    assert dequantised(tensors, settings).tolist() == [[0.5, 1.0, 1.5, 2.0, -2.0, -4.0, -6.0, -8.0]]
    by_row = {
        "weight": torch.tensor([[100, -128], [1, 2]], dtype=torch.int8),
        "weight_scale": torch.tensor([[0.25], [3.0]]),
    }
    assert dequantised(by_row, settings_of(8, 0, "lm_head")).tolist() == [[25.0, -32.0], [3.0, 6.0]]


def test_scales_that_do_not_fit_are_refused():
    tensors = {"weight": torch.zeros(2, 6, dtype=torch.int8), "weight_scale": torch.ones(2, 4)}
    with pytest.raises(ValueError, match="scales"):
        dequantised(tensors, settings_of(8, 0, "lm_head"))


@pytest.mark.parametrize("bits", [4, 8])
def test_the_library_reads_the_same_codes(bits):
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1)
    codes = torch.randint(low, high, (6, 96), dtype=torch.int8, generator=torch.Generator().manual_seed(1))
    assert torch.equal(helpers.pack_to_int32(codes, bits), pack(codes, bits))
    assert torch.equal(helpers.unpack_from_int32(pack(codes, bits), bits, codes.shape), codes)


def test_what_we_write_is_what_we_read():
    assert unread(settings_of(4, 64, "lm_head")) is None
    assert unread(settings_of(8, 0, "score")) is None


UNREAD = {
    "format=float-quantized": {"format": "float-quantized"},
    "float of 4 bits": {"type": "float"},
    "int of 3 bits": {"num_bits": 3},
    "zero points": {"symmetric": False},
    "strategy=block": {"strategy": "block"},
    "actorder=group": {"actorder": "group"},
}


@pytest.mark.parametrize("words", UNREAD)
def test_what_is_not_read_is_named(words):
    settings = settings_of(4, 64, "lm_head")
    change = dict(UNREAD[words])
    settings["format"] = change.pop("format", settings["format"])
    settings["config_groups"]["group_0"]["weights"] |= change
    assert words in unread(settings)


def test_groups_of_layers_of_other_widths_are_not_read():
    settings = settings_of(4, 64, "lm_head")
    settings["config_groups"]["group_1"] = settings_of(8, 0, "lm_head")["config_groups"]["group_0"]
    assert "several widths" in unread(settings)
    assert "name no weights" in unread({"quant_method": "compressed-tensors"})
