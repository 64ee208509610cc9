"""Attention inside documents, against a dense mask."""

import pytest
import torch
from torch.nn import functional as F

from trainer.batch import Documents
from trainer.models.attention import Scores, attend

CASES = [
    ((7, 9, 3, 5, 17, 1, 6), 2, None),
    ((24, 24), 2, None),
    ((7, 9, 3, 5, 17, 1, 6), 2, 4),
    ((24, 24), 2, 5),
    ((48,), 1, 100),
    ((1,) * 48, 2, None),
]


def dense(q, k, v, documents, window, scale):
    """Every pair of tokens, with a mask."""
    length = sum(documents.lengths)
    owner = torch.repeat_interleave(torch.arange(len(documents.lengths)), torch.tensor(documents.lengths))
    at = torch.arange(length)
    seen = (owner[:, None] == owner[None]) & (at[None] <= at[:, None])
    if window is not None:
        seen &= at[None] > at[:, None] - window
    q, k, v = (t.flatten(0, 1)[None].transpose(1, 2) for t in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale, enable_gqa=True)
    return out.transpose(1, 2)


@pytest.mark.parametrize(("lengths", "rows", "window"), CASES)
def test_packed_attention_is_the_dense_one_with_its_gradients(lengths, rows, window):
    draw = torch.Generator().manual_seed(0)
    documents = Documents.from_lengths(lengths, rows)
    shapes = [(rows, 48 // rows, heads, 8) for heads in (4, 2, 2)]
    tensors = [torch.randn(*s, generator=draw, dtype=torch.float64).requires_grad_() for s in shapes]
    up = torch.randn(*shapes[0], generator=draw, dtype=torch.float64)
    out = attend(*tensors, documents, Scores(0.3, window))
    (out * up).sum().backward()
    found = [t.grad.clone() for t in tensors]
    for t in tensors:
        t.grad = None
    expected = dense(*tensors, documents, window, 0.3).view(out.shape)
    (expected * up).sum().backward()
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-9)  # float64: sums in another order
    for mine, t in zip(found, tensors, strict=True):
        torch.testing.assert_close(mine, t.grad, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("heads", "groups"), [(6, 2), (3, 3)])
def test_the_bfloat16_backward_on_cpu_is_as_exact_as_torch_s(heads, groups):
    draw = torch.Generator().manual_seed(0)
    exact = [torch.randn(2, 256, n, 32, generator=draw, dtype=torch.float64) for n in (heads, groups, groups)]
    up = torch.randn(2, 256, heads, 32, generator=draw, dtype=torch.float64)
    documents = Documents.from_lengths((256, 256), 2)

    def gradients(dtype, attention) -> list[torch.Tensor]:
        tensors = [t.to(dtype, copy=True).requires_grad_() for t in exact]
        (attention(*tensors) * up.to(dtype)).sum().backward()
        return [t.grad.double() for t in tensors]

    def torch_s(q, k, v):
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.2, enable_gqa=True).transpose(1, 2)

    def ours(q, k, v):
        return attend(q, k, v, documents, Scores(0.2))

    expected = gradients(torch.float64, torch_s)
    errors = {
        name: sum(float((g - e).norm() / e.norm()) for g, e in zip(gradients(torch.bfloat16, f), expected, strict=True))
        for name, f in {"ours": ours, "torch": torch_s}.items()
    }
    assert errors["ours"] < 0.03  # three tensors of 8 bits: 2**-8 each, a few roundings deep
    assert errors["ours"] < 1.5 * errors["torch"]


def test_no_mask_over_the_row_is_made():
    """Attention over 64 documents of a long row looks at their pairs, not at all pairs of the row."""
    from torch.utils.flop_counter import FlopCounterMode

    documents = Documents.from_lengths((64,) * 64, 1)
    q = torch.randn(1, 4096, 2, 16)
    with FlopCounterMode(display=False) as counter:
        attend(q, q, q, documents, Scores(1.0))
    assert counter.get_total_flops() <= 4 * 2 * 16 * 64 * 64 * 64  # 4 * heads * width for every pair inside a document


def test_positions_restart_in_every_document():
    documents = Documents.from_lengths((3, 2, 5), 2)
    assert documents.positions.tolist() == [[0, 1, 2, 0, 1], [0, 1, 2, 3, 4]]
    assert documents.offsets.tolist() == [0, 3, 5, 10]
