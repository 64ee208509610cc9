"""CUDA's branch of attention, on emulated kernels: the numbers of the CPU's branch, and only what the kernels take."""

from types import SimpleNamespace

import pytest
import torch

from tests.cuda.emulated_varlen import emulated
from tests.unit.models.test_branches import PAIRS, scored, two_rows
from tests.unit.models.test_transformer import built, gradients
from trainer.batch import Documents
from trainer.data.pairs import collate
from trainer.models.attention import Scores, attend, has_varlen

RAGGED = (7, 9, 3, 5, 17, 1, 6)


def inputs(heads: tuple[int, int], width: int, dtype: torch.dtype) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 24, n, width, generator=draw).to(dtype) for n in (heads[0], heads[1], heads[1]))
    return [t.requires_grad_() for t in (q, k, v)]


def attended(tensors: list[torch.Tensor], window: int | None) -> list[torch.Tensor]:
    """The output and three gradients, float32."""
    # Small integers, which every format holds.
    up = torch.randint(-4, 5, tensors[0].shape, generator=torch.Generator().manual_seed(1)).to(tensors[0].dtype)
    out = attend(*tensors, Documents.from_lengths(RAGGED, 2), Scores(0.3, window))
    return [t.float() for t in (out, *torch.autograd.grad(out, tensors, up))]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("heads", "width"), [((4, 4), 16), ((4, 2), 64), ((6, 1), 8), ((2, 2), 256)])
@pytest.mark.parametrize("window", [None, 5, 64])
def test_it_is_the_cpu_s_attention_with_its_gradients(heads, width, window, dtype):
    tensors = inputs(heads, width, dtype)
    with emulated() as calls:
        found = attended(tensors, window)
    assert [(call.heads, call.longest, call.lengths) for call in calls] == [(heads, 17, RAGGED)]
    expected = attended([t.detach().float().requires_grad_() for t in tensors], window)
    for mine, theirs in zip(found, expected, strict=True):
        # Both compute in float32 from the same numbers; the kernels round each result once. What nearly cancels is a
        # difference of float32 sums of 256 products, each up to a hundred.
        torch.testing.assert_close(mine, theirs, rtol=2**-8, atol=1e-4)


def test_a_window_is_its_tokens_and_a_wider_one_than_any_document_is_none():
    with emulated() as calls:
        for window in (5, 17, None):
            attended(inputs((2, 2), 8, torch.bfloat16), window)
    assert [call.window for call in calls] == [(4, 0), (-1, 0), (-1, 0)]


@pytest.mark.parametrize(("width", "dtype"), [(20, torch.bfloat16), (264, torch.float16), (64, torch.float32)])
def test_what_the_kernels_do_not_take_goes_by_length(width, dtype):
    tensors = inputs((4, 2), width, dtype)
    with emulated() as calls:
        found = attended(tensors, 5)
    assert calls == []
    assert all(torch.equal(*both) for both in zip(found, attended(tensors, 5), strict=True))


def test_gpus_before_ampere_go_by_length(monkeypatch):
    device = torch.device("cuda", 0)
    for major, expected in {7: False, 8: True, 9: True, 10: True}.items():
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _, major=major: SimpleNamespace(major=major))
        assert has_varlen(device, torch.bfloat16, 64) is expected


@pytest.mark.parametrize("window", [None, 3])
def test_a_shared_prompt_is_attended_to_whole_with_its_gradients(window):
    results = []
    for pairs in (PAIRS, two_rows(PAIRS)):
        model = built(sliding_window=window, family="mistral")
        with emulated() as calls, torch.autocast("cpu", torch.bfloat16):
            sums = scored(model, collate(pairs, [0, 1]))
            (sums * torch.tensor([1.0, -2.0, 0.5, 3.0])).sum().backward()
        assert [call.lengths for call in calls] == [(6, 5, 3, 8)] * 3
        results.append([sums.detach(), *(p.grad for p in model.parameters())])
    for shared, separate in zip(*results, strict=True):
        # Gradients of a shared token are added up in another order, in bfloat16.
        torch.testing.assert_close(shared, separate, rtol=2e-2, atol=2e-2 * float(separate.abs().max()))


def test_a_model_s_gradient_is_the_cpu_s():
    with torch.autocast("cpu", torch.bfloat16):
        expected = gradients(built())
        with emulated() as calls:
            found = gradients(built())
    assert len(calls) == 3
    for name, gradient in expected.items():
        # Attention is rounded to 8 bits in other places: a few roundings deep, relative to the largest entry.
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=2e-2 * float(gradient.abs().max()))
