"""Rotations of queries and keys."""

import torch

from trainer.models.rope import Rotation, rotate


def test_the_rotation_in_fewer_kernels_is_the_plain_one_with_its_gradient():
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(2, 5, 3, 8, dtype=torch.float64, generator=draw).requires_grad_()
    angles = torch.randn(2, 5, 1, 4, dtype=torch.float64, generator=draw)
    up = torch.randn(2, 5, 3, 8, dtype=torch.float64, generator=draw)
    plain, fused = rotate(x, angles.cos(), angles.sin()), Rotation.apply(x, angles.cos(), angles.sin())
    torch.testing.assert_close(fused, plain, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(
        torch.autograd.grad(fused, x, up), torch.autograd.grad(plain, x, up), rtol=1e-14, atol=1e-14
    )
