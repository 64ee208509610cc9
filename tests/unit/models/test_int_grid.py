"""The grid of integer exports, by numbers derived by hand."""

import pytest
import torch

from trainer.models.int_grid import dequantise, fake, group_size, quantise, scales


def test_a_group_has_sixteen_steps_and_its_largest_weight_lies_half_a_step_outside():
    # Largest magnitudes 7.5 and 15: steps of 1 and of 2. 7.5 steps round to 8, which only the negative side has.
    weight = torch.tensor([[7.5, -7.5, 1.4, 0.6, -15.0, 14.0, 2.9, -1.1]])
    codes, scale = quantise(weight, 4, 4)
    assert (codes.dtype, scale.dtype) == (torch.int8, torch.bfloat16)
    assert codes.tolist() == [[7, -8, 1, 1, -8, 7, 1, -1]]
    assert scale.tolist() == [[1.0, 2.0]]
    assert dequantise(codes, scale).tolist() == [[7, -8, 1, 1, -16, 14, 2, -2]]


def test_in_eight_bits_a_row_has_one_scale():
    weight = torch.tensor([[127.5, -127.5, 1.6, -0.4], [255.0, 0.0, 0.0, 2.9]])
    codes, scale = quantise(weight, 8, 0)
    assert codes.tolist() == [[127, -128, 2, 0], [127, 0, 0, 1]]
    assert scale.tolist() == [[1.0], [2.0]]


def test_a_group_of_zeros_stays_one():
    codes, scale = quantise(torch.zeros(2, 32), 4, 32)
    assert not codes.any()
    assert fake(torch.zeros(2, 32), 4, 32).eq(0).all()
    assert scale.eq(1).all()


def test_a_float32_master_its_bfloat16_copy_and_a_stack_have_the_same_codes():
    weight = torch.randn(3, 8, 64, generator=torch.Generator().manual_seed(0))
    codes, scale = quantise(weight, 4, 32)
    assert torch.equal(quantise(weight.bfloat16(), 4, 32)[0], codes)
    assert torch.equal(quantise(weight[1], 4, 32)[0], codes[1])
    assert torch.equal(scales(weight.bfloat16(), 4, 32), scale)
    assert scale.shape == (3, 8, 2)
    assert torch.equal(fake(weight, 4, 32, torch.bfloat16), dequantise(codes, scale).bfloat16())


def test_no_weight_is_off_by_more_than_half_a_step():
    weight = torch.randn(16, 128, generator=torch.Generator().manual_seed(1))
    codes, scale = quantise(weight, 4, 64)
    off = (dequantise(codes, scale) - weight).abs().view(16, 2, 64) / scale.float()[..., None]
    # Plus what bfloat16 rounds: up to 2**-8 of a weight, which is 7.5 steps at most, and of a scale.
    assert 0.45 < off.max() <= 0.5 + 2 * 7.5 * 2**-8


@pytest.mark.parametrize(
    ("widths", "bits", "group"), [([128, 192], 4, 64), ([128, 96], 4, 32), ([128, 80], 4, None), ([80], 8, 0)]
)
def test_the_largest_group_that_divides_every_row_is_taken(widths, bits, group):
    assert group_size(widths, bits) == group


def test_compiled_code_rounds_to_the_same_numbers():
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(2))
    compiled = torch.compile(lambda w: fake(w, 4, 32) * 2, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(weight), fake(weight, 4, 32) * 2)
