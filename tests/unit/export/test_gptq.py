"""GPTQ against the paper's algorithm, written down plainly, and block by block through a model."""

import pytest
import torch

from trainer.export.gptq import COLUMNS, clipped_scales, gptq
from trainer.models.int_grid import dequantise, quantise, scales

GROUP = 32


def correlated(inputs: int, tokens: int, seed: int = 0) -> torch.Tensor:
    """Inputs ``(tokens, inputs)`` of which a few directions explain most."""
    draw = torch.Generator().manual_seed(seed)
    mixed = torch.randn(tokens, inputs, dtype=torch.float64, generator=draw)
    return mixed @ torch.randn(inputs, inputs, dtype=torch.float64, generator=draw)


def weight_of(outputs: int, inputs: int) -> torch.Tensor:
    """Values that bfloat16 holds, so that both ways to round see the same numbers."""
    draw = torch.Generator().manual_seed(7)
    return torch.randn(outputs, inputs, generator=draw).bfloat16().double()


def plainly(weight: torch.Tensor, hessian: torch.Tensor, bits: int, scale: torch.Tensor) -> torch.Tensor:
    """Equations 2 and 3 with an explicit inverse, from which a rounded column's row and column are taken."""
    left, codes, group = weight.clone(), torch.zeros_like(weight), weight.shape[1] // scale.shape[1]
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=hessian.dtype)
    inverse = torch.linalg.inv(damped)
    for n in hessian.diagonal().argsort(descending=True).tolist():
        step = scale[:, n // group].double()
        codes[:, n] = (left[:, n] / step).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        error = (left[:, n] - codes[:, n] * step) / inverse[n, n]
        left -= error[:, None] * inverse[n]
        inverse = inverse - inverse[:, n : n + 1] @ inverse[n : n + 1] / inverse[n, n]
    return codes


@pytest.mark.parametrize(("bits", "group"), [(4, GROUP), (8, 0)])
def test_codes_are_those_of_the_papers_algorithm(bits, group):
    inputs = COLUMNS + GROUP  # two rounds of columns
    x, weight = correlated(inputs, 400), weight_of(6, inputs)
    scale = scales(weight, bits, group)
    assert torch.equal(gptq(weight, x.T @ x, bits, scale).double(), plainly(weight, x.T @ x, bits, scale))


def test_a_layer_gives_less_error_than_with_each_weight_rounded():
    x, weight = correlated(128, 1000), weight_of(32, 128)
    expected = x @ weight.T
    rounded, scale = quantise(weight, 4, GROUP)
    of_gptq, of_rounding = (
        float((x @ dequantise(codes, scale).double().T - expected).norm() / expected.norm())
        for codes in (gptq(weight, x.T @ x, 4, scale), rounded)
    )
    assert of_gptq < 0.75 * of_rounding


def test_inputs_that_have_nothing_in_common_leave_every_weight_rounded():
    weight = weight_of(8, 64)
    rounded, scale = quantise(weight, 4, GROUP)
    assert torch.equal(gptq(weight, torch.eye(64, dtype=torch.float64), 4, scale), rounded)


def test_a_column_whose_input_is_always_0_is_rounded_alone():
    x, weight = correlated(64, 300), weight_of(8, 64)
    x[:, 5] = 0
    rounded, scale = quantise(weight, 4, GROUP)
    codes = gptq(weight, x.T @ x, 4, scale)
    others = [n for n in range(64) if n != 5]
    assert torch.equal(codes[:, 5], rounded[:, 5])
    assert not torch.equal(codes[:, others], rounded[:, others])


def test_fewer_tokens_than_inputs_are_enough():
    x, weight = correlated(128, 5).float(), weight_of(8, 128).float()
    rounded, scale = quantise(weight, 4, GROUP)
    of_gptq, of_rounding = (
        (x @ (dequantise(codes, scale) - weight).T).norm() for codes in (gptq(weight, x.T @ x, 4, scale), rounded)
    )
    assert of_gptq < 0.5 * of_rounding


def test_inputs_that_are_no_numbers_are_refused():
    hessian = torch.eye(64)
    hessian[3, 3] = torch.nan
    with pytest.raises(ValueError, match="no numbers"):
        gptq(weight_of(8, 64).float(), hessian, 4, torch.ones(8, 2))


def test_a_step_is_smaller_where_that_rounds_a_group_better():
    weight = torch.full((2, GROUP), 1.6)
    weight[1] = 1.0
    weight[:, 0] = 7.5  # half a step of 1 outside of code 7
    # Squared errors of the first row by step: 1: 0.25 + 31 * 0.16 = 5.2; 0.95: 3.5; 0.9: 1.5 + 31 * 0.039 = 2.67;
    # 0.85: 2.4 + 31 * 0.011 = 2.70; 0.8: 3.6. The second row's others are whole steps of 1.
    squares = torch.ones(GROUP)
    assert clipped_scales(weight, squares, 4, GROUP).tolist() == [[0.8984375], [1.0]]  # 0.9 in bfloat16
    squares[0] = 100.0  # what the clipped weight multiplies: 1: 25 + 5.0, and 0.95: 72
    assert clipped_scales(weight, squares, 4, GROUP).tolist() == [[1.0], [1.0]]
