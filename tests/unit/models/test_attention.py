"""Attention inside documents, against a dense mask."""

import dataclasses

import pytest
import torch
from torch.nn import functional as F

from tests.shapes import architecture
from trainer.batch import Documents
from trainer.functional import logits
from trainer.generation import cache, decoding
from trainer.generation.sampling import Sampling
from trainer.models import cpu_kernels
from trainer.models.attention import Scores, attend
from trainer.models.transformer import Transformer

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


@pytest.mark.parametrize("length", [1, 63, 64, 65, 200])
@pytest.mark.parametrize(("heads", "groups"), [(6, 2), (3, 3)])
def test_bfloat16_attention_without_gradients_is_as_exact_as_torch_s(length, heads, groups, monkeypatch):
    monkeypatch.setattr(cpu_kernels, "SCORES", 2 * heads * min(64, length) * length)  # two documents go together
    draw = torch.Generator().manual_seed(0)
    tensors = [torch.randn(3, length, n, 32, generator=draw).bfloat16() for n in (heads, groups, groups)]
    documents = Documents.from_lengths((length,) * 3, 3)
    expected = dense(*(t.double() for t in tensors), documents, None, 0.2)[0].view(3, length, heads, 32)
    ours = attend(*tensors, documents, Scores(0.2), forward=True)
    torch_s = dense(*tensors, documents, None, 0.2)[0].view(ours.shape)
    errors = [float((found.double() - expected).norm() / expected.norm()) for found in (ours, torch_s)]
    assert errors[0] < 0.004  # weights and outputs of 8 bits: 2**-9 each
    assert errors[0] <= 1.5 * errors[1]  # a single token is exact in both
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(attend(*tensors, documents, Scores(0.2), forward=True), ours)


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


@pytest.mark.parametrize("window", [None, 3])
def test_sinks_and_bounds_are_those_of_explicit_attention_in_training_and_through_a_cache(window):
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 11, heads, 8, generator=draw) for heads in (4, 2, 2))
    scores = Scores(0.4, window, cap=2.0, sinks=torch.randn(4, generator=draw).requires_grad_())
    q.requires_grad_()
    lengths = [7, 4]
    found = attend(q, k, v, Documents.from_lengths(lengths, 1), scores)
    parts = []
    for queries, keys, values in zip(*(t.split(lengths, 1) for t in (q, k, v)), strict=True):
        keys, values = (t.repeat_interleave(2, 2) for t in (keys, values))
        products = 2.0 * torch.tanh(torch.einsum("bqhd,bkhd->bhqk", queries, keys) * 0.4 / 2.0)
        back = torch.arange(keys.shape[1])[:, None] - torch.arange(keys.shape[1])
        products = products.masked_fill((back < 0) | (back >= (window or 99)), -torch.inf)
        sink = scores.sinks[None, :, None, None].expand(*products.shape[:3], 1)
        weights = torch.cat([products, sink], -1).softmax(-1)[..., :-1]
        parts.append(torch.einsum("bhqk,bkhd->bqhd", weights, values))
    expected = torch.cat(parts, 1)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)  # float32, another order of sums
    upstream = torch.randn(expected.shape, generator=draw)
    mine, theirs = (torch.autograd.grad(t, (q, scores.sinks), upstream, retain_graph=True) for t in (found, expected))
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("fixed", [False, True], ids=["blocks", "fixed"])
def test_a_model_with_sinks_decodes_as_it_is_trained(fixed, monkeypatch):
    monkeypatch.setattr(cache, "BLOCK", 8)
    a = dataclasses.replace(
        architecture(50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, head_dim=8, num_key_value_heads=2),
        sinks=True,
    )
    model = Transformer(a).eval()
    draw = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.3)
    prompts = [list(range(5, 5 + n)) for n in (1, 9, 17)]
    for sequence in decoding.Decoding(model, prompts, Sampling(12, temperature=0), stops=(), fixed=fixed):
        if sequence.done:
            ids = torch.tensor([[*sequence.prompt, *sequence.ids]])
            out = model(ids, Documents.from_lengths([ids.shape[1]], 1), logits)[0, len(sequence.prompt) - 1 : -1]
            expected = out.log_softmax(-1).amax(-1)
            torch.testing.assert_close(torch.tensor(sequence.logprobs), expected, rtol=0, atol=1e-5)
