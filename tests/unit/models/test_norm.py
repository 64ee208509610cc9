"""RMSNorm against numbers by hand and finite differences."""

import math

import torch
from torch.autograd import gradcheck

from trainer.models.cpu_kernels import rms_norm
from trainer.models.norm import RMSNorm


def test_a_norm_divides_by_the_root_mean_square_and_multiplies_by_its_weight():
    norm = RMSNorm(2, eps=0.5)
    norm.weight.data = torch.tensor([1.0, 2.0])
    root = math.sqrt((9 + 16) / 2 + 0.5)
    expected = torch.tensor([[3 / root, 8 / root]])
    torch.testing.assert_close(norm(torch.tensor([[3.0, 4.0]])), expected, rtol=1e-6, atol=0)


def test_the_fused_gradient_is_that_of_finite_differences():
    x = torch.randn(2, 3, 5, dtype=torch.double, requires_grad=True)
    weight = torch.randn(5, dtype=torch.double, requires_grad=True)
    assert gradcheck(lambda x, weight: rms_norm(x, weight, 1e-5), (x, weight))


def test_the_fused_form_equals_the_plain_one_that_other_formats_take():
    x = torch.randn(4, 7, 64)
    fused, plain = RMSNorm(64, 1e-5), RMSNorm(64, 1e-5).double()
    torch.testing.assert_close(fused(x), plain(x.double()).float(), rtol=1e-6, atol=1e-6)  # float32 rounding


def test_a_norm_hands_its_result_over_in_the_format_of_autocast():
    with torch.autocast("cpu", torch.bfloat16):
        assert RMSNorm(4, 1e-5)(torch.ones(1, 4)).dtype is torch.bfloat16
