"""The chunked losses are the plain ones, with their gradients, in a fraction of the memory."""

import subprocess
import sys

import pytest
import torch
from torch.nn import functional as F

from trainer import functional
from trainer.functional import Head, cross_entropy, logits, logprobs, objective


@pytest.fixture(params=[(1, 1), (500, 1500), (1 << 20, 1 << 26)], ids=["one token a block", "some", "all at once"])
def chunks(request, monkeypatch):
    monkeypatch.setattr(functional.chunks, "BLOCK_BYTES", {"cpu": request.param[0]})
    monkeypatch.setattr(functional.chunks, "GROUP_BYTES", {"cpu": request.param[1]})


def inputs(dtype=torch.float32, tokens: int = 2 * 11, vocabulary: int = 37, width: int = 8):
    draw = torch.Generator().manual_seed(3)
    hidden = torch.randn(2, tokens // 2, width, generator=draw, dtype=dtype).requires_grad_()
    weight = torch.randn(vocabulary, width, generator=draw, dtype=dtype).requires_grad_()
    targets = torch.randint(0, vocabulary, (2, tokens // 2), generator=draw)
    mask = (torch.rand(2, tokens // 2, generator=draw) < 0.6).to(torch.float32)
    return hidden, weight, targets, mask


def plain(hidden, weight, targets, mask, z_loss=0.0, label_smoothing=0.0):
    scores = logits(hidden, Head(weight)).double().flatten(0, 1)
    nll = F.cross_entropy(scores, targets.flatten(), reduction="none", label_smoothing=label_smoothing)
    objective = nll + z_loss * scores.logsumexp(-1).square()
    return (objective * mask.flatten()).sum()


@pytest.mark.parametrize(("z_loss", "smoothing"), [(0.0, 0.0), (0.01, 0.0), (0.0, 0.1), (0.02, 0.3)])
def test_chunked_cross_entropy_is_the_plain_one(chunks, z_loss, smoothing):
    hidden, weight, targets, mask = inputs()
    loss, nll, z = cross_entropy(
        hidden, Head(weight), targets=targets, mask=mask, z_loss=z_loss, label_smoothing=smoothing
    )
    (3 * loss).backward()
    found = [t.grad.clone() for t in (hidden, weight)]
    hidden.grad = weight.grad = None
    expected = plain(hidden, weight, targets, mask, z_loss, smoothing)
    (3 * expected).backward()
    # Relative 1e-5: float32 sums in another order.
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
    for mine, theirs in zip(found, (hidden.grad, weight.grad), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5 * theirs.abs().max().item())
    rows = F.cross_entropy(logits(hidden, Head(weight)).flatten(0, 1), targets.flatten(), reduction="none").view(2, -1)
    torch.testing.assert_close(nll, (rows * mask).detach(), rtol=1e-5, atol=1e-6)
    lse = logits(hidden, Head(weight)).logsumexp(-1)
    torch.testing.assert_close(z, (lse.square() * mask).sum().detach(), rtol=1e-5, atol=0)


@pytest.fixture(params=["eager", "compiled"])
def in_place(request, chunks, monkeypatch):
    """What runs on CUDA, on CPU."""
    block = objective.GradientBlock()
    if request.param == "compiled":
        block.compile(backend="eager")
    monkeypatch.setattr(objective, "IN_PLACE", {"cpu"})
    monkeypatch.setattr(objective, "differentiate_block", block)


@pytest.mark.parametrize(("z_loss", "smoothing"), [(0.0, 0.0), (0.02, 0.3)])
def test_a_gradient_in_the_place_of_the_logits_is_the_plain_one(in_place, z_loss, smoothing):
    test_chunked_cross_entropy_is_the_plain_one(None, z_loss, smoothing)


def test_a_nearly_certain_token_keeps_its_gradient_in_bfloat16(in_place):
    # p = 1 / (1 + e**-8): 1 - p is 0.000335, which bfloat16 cannot tell from 0 beside 1.
    hidden = torch.tensor([[[8.0, 0.0]]], dtype=torch.bfloat16, requires_grad=True)
    weight = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.bfloat16)
    loss, _, _ = cross_entropy(hidden, Head(weight), targets=torch.tensor([[0]]), mask=torch.ones(1, 1))
    assert loss.item() == pytest.approx(0.00033541, rel=1e-3)
    loss.backward()
    assert hidden.grad[0, 0, 0].item() == pytest.approx(-0.00033535, rel=5e-3)


def test_places_that_the_host_counted_change_nothing():
    hidden, weight, targets, mask = inputs()
    counted = mask.flatten().nonzero().squeeze(1)
    given = cross_entropy(hidden, Head(weight), targets=targets, mask=mask, places=counted)
    searched = cross_entropy(hidden, Head(weight), targets=targets, mask=mask)
    assert all(torch.equal(a, b) for a, b in zip(given, searched, strict=True))


def test_a_mask_without_a_token_gives_a_zero_that_is_connected_to_the_graph():
    hidden, weight, targets, mask = inputs()
    loss, _, _ = cross_entropy(hidden, Head(weight), targets=targets, mask=torch.zeros_like(mask))
    assert loss.item() == 0
    loss.backward()
    assert hidden.grad.abs().sum() == 0
    assert weight.grad.abs().sum() == 0


def test_extreme_logits_neither_overflow_nor_vanish():
    hidden = torch.tensor([[[1e4, 0.0]]], requires_grad=True)
    weight = torch.tensor([[1.0, 0.0], [-1.0, 0.0]], requires_grad=True)
    loss, _, _ = cross_entropy(hidden, Head(weight), targets=torch.tensor([[1]]), mask=torch.ones(1, 1))
    assert loss.item() == pytest.approx(2e4)
    loss.backward()
    assert torch.isfinite(hidden.grad).all()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_and_entropies_and_their_gradients_are_the_plain_ones(chunks, temperature):
    hidden, weight, targets, _ = inputs()
    draw = torch.Generator().manual_seed(5)
    up, down = torch.randn(2, 11, generator=draw), torch.randn(2, 11, generator=draw)
    values, entropies = logprobs(hidden, Head(weight), targets=targets, temperature=temperature)
    ((values * up).sum() + (entropies * down).sum()).backward()
    found = [t.grad.clone() for t in (hidden, weight)]
    hidden.grad = weight.grad = None
    log_p = (logits(hidden, Head(weight)).double() / temperature).log_softmax(-1)
    expected = log_p.gather(-1, targets[..., None]).squeeze(-1)
    uncertain = -(log_p.exp() * log_p).sum(-1)
    ((expected * up).sum() + (uncertain * down).sum()).backward()
    torch.testing.assert_close(values.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(entropies.double(), uncertain, rtol=1e-5, atol=1e-5)
    for mine, theirs in zip(found, (hidden.grad, weight.grad), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5 * theirs.abs().max().item())


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_where_logits_stay_in_place_are_the_plain_ones(in_place, temperature):
    test_logprobs_and_entropies_and_their_gradients_are_the_plain_ones(None, temperature)


@pytest.mark.parametrize("kept", [0, 1 << 20], ids=["computed again", "kept"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_the_gradient_of_logprobs_in_the_place_of_logits_is_the_plain_one(
    in_place, kept, dtype, tolerance, monkeypatch
):
    test_the_gradient_of_logprobs_is_the_plain_one_whether_probabilities_are_kept(kept, dtype, tolerance, monkeypatch)


@pytest.mark.parametrize("kept", [0, 1 << 20], ids=["computed again", "kept"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_the_gradient_of_logprobs_is_the_plain_one_whether_probabilities_are_kept(kept, dtype, tolerance, monkeypatch):
    monkeypatch.setattr(functional, "KEPT_BYTES", kept)
    hidden, weight, targets, _ = inputs()
    with torch.no_grad():
        # The first token's target is nearly certain: 1 - p is about 0.004, which bfloat16 cannot tell from 1.
        hidden[0, 0] = weight[targets[0, 0]] * (9 / weight[targets[0, 0]].square().sum())
    up = torch.randn(2, 11, generator=torch.Generator().manual_seed(5))
    log_p = (logits(hidden.to(dtype).double(), Head(weight.to(dtype).double())) / 0.7).log_softmax(-1)
    expected = torch.autograd.grad((log_p.gather(-1, targets[..., None]).squeeze(-1) * up).sum(), (hidden, weight))
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16):
        values, _ = logprobs(hidden, Head(weight), targets=targets, temperature=0.7)
    found = torch.autograd.grad((values * up).sum(), (hidden, weight))
    for mine, theirs in zip(found, expected, strict=True):
        # bfloat16 holds 8 bits: a rounding of each factor is 0.4% of it.
        torch.testing.assert_close(
            mine.float(), theirs.float(), rtol=tolerance, atol=tolerance * theirs.abs().max().item()
        )
    # That token by itself: float32 gets p - 1 to 1e-3 of its value.
    certain = expected[0][0, 0].float()
    torch.testing.assert_close(
        found[0][0, 0], certain, rtol=0, atol=max(1e-3, 2 * tolerance) * certain.abs().max().item()
    )


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("kept", [0, 1 << 20], ids=["computed again", "kept"])
@pytest.mark.parametrize("place", ["blocks", "in_place"])
def test_bounded_logits_have_the_loss_logprobs_and_gradients_of_autograd(place, kept, temperature, monkeypatch):
    if place == "in_place":
        monkeypatch.setattr(objective, "IN_PLACE", {"cpu"})
    monkeypatch.setattr(functional, "KEPT_BYTES", kept)
    hidden, weight, targets, mask = inputs()
    head = Head(weight, cap=1.5)
    scores = (1.5 * torch.tanh(hidden @ weight.T / 1.5)).double()
    expected = (F.cross_entropy(scores.flatten(0, 1), targets.flatten(), reduction="none") * mask.flatten()).sum()
    loss = cross_entropy(hidden, head, targets=targets, mask=mask)[0]
    log_p = (scores / temperature).log_softmax(-1)
    chosen, entropy = log_p.gather(-1, targets[..., None]).squeeze(-1), -(log_p.exp() * log_p).sum(-1)
    values, entropies = logprobs(hidden, head, targets=targets, temperature=temperature)
    up = torch.randn(2, 11, generator=torch.Generator().manual_seed(5))
    pairs = [(loss, expected), ((values * up).sum(), (chosen * up).sum())]
    pairs += [((values * up + entropies).sum(), (chosen * up + entropy).sum())]
    for found, wanted in pairs:
        torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)
        mine, theirs = (torch.autograd.grad(t, (hidden, weight), retain_graph=True) for t in (found, wanted))
        for one, other in zip(mine, theirs, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5 * other.abs().max().item())


MEASURE = """
import sys, torch
from torch.nn import functional as F
from trainer.functional import Head, cross_entropy, logits
from trainer.tracking.throughput import host_peak_bytes
torch.set_num_threads(2)
hidden = torch.randn(1, 8192, 64).requires_grad_()
weight = (torch.randn(49152, 64) / 8).requires_grad_()
targets, mask = torch.randint(0, 49152, (1, 8192)), torch.ones(1, 8192)
before = host_peak_bytes()
if sys.argv[1] == "chunked":
    loss = cross_entropy(hidden, Head(weight), targets=targets, mask=mask)[0]
else:
    loss = F.cross_entropy(logits(hidden, Head(weight)).flatten(0, 1).float(), targets.flatten(), reduction="sum")
loss.backward()
print(loss.item(), (host_peak_bytes() - before) / 2**20)
"""


def test_the_chunked_loss_takes_a_fifth_of_the_memory_for_8192_tokens_of_49152_pieces():
    def measured(kind: str) -> tuple[float, float]:
        done = subprocess.run([sys.executable, "-c", MEASURE, kind], capture_output=True, text=True, check=True)
        loss, mebibytes = map(float, done.stdout.split())
        return loss, mebibytes

    # Other seeds on both sides: only the memory is compared. Plain: 1.5 GiB of logits, at least twice.
    _, chunked = measured("chunked")
    _, whole = measured("plain")
    assert whole > 5 * chunked
