"""Moments in 8 bits: bitsandbytes' own steps bit for bit, and what a checkpoint makes of them."""

import math
import sys

import pytest
import torch
from torch import nn

from trainer.config import ConfigError
from trainer.optim import AdamW, Muon
from trainer.optim.eight_bit import BLOCK, BOUND, PIECE, EightBitAdamW, Moment
from trainer.optim.state import create_state, elements, moments, settle
from trainer.parallel.zero import Offload, Zero2

pytest.importorskip("bitsandbytes")


class Two(nn.Module):
    """A hidden matrix of 96 * 64 = 6144 elements, and what is never in 8 bits."""

    def __init__(self) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        self.embed_tokens = nn.Embedding(100, 64)
        self.hidden = nn.Linear(64, 96)
        self.norm = nn.LayerNorm(5000)
        self.small = nn.Linear(64, 63, bias=False)
        self.lm_head = nn.Linear(64, 100, bias=False)
        for p in self.parameters():
            p.data = torch.randn(p.shape, generator=draw)


def gradient(step: int, shape: torch.Size) -> torch.Tensor:
    """Drawn, of very different sizes from block to block."""
    draw = torch.Generator().manual_seed(step)
    return torch.randn(shape, generator=draw) * torch.rand(shape[0], 1, generator=draw) ** 4


def stepped(optimizer, weight: nn.Parameter, first: int, last: int) -> None:
    for step in range(first, last + 1):
        weight.grad = gradient(step, weight.shape)
        optimizer.step()


def ours(weight: nn.Parameter) -> EightBitAdamW:
    groups = [{"params": [weight], "weight_decay": 0.1, "eight_bit": True}]
    return EightBitAdamW(groups, lr=0.01, betas=(0.9, 0.95), eps=1e-8)


def matrix(shape: tuple[int, ...] = (96, 65)) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(9)))


def test_every_step_is_that_of_bitsandbytes_bit_for_bit(monkeypatch):
    import bitsandbytes as bnb

    monkeypatch.setitem(PIECE, "cpu", 512)  # several pieces, the last of them and its last block not full
    weight, theirs = matrix(), matrix()
    mine = ours(weight)
    reference = bnb.optim.AdamW8bit([theirs], lr=0.01, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    for step in range(1, 11):
        stepped(mine, weight, step, step)
        stepped(reference, theirs, step, step)
        assert torch.equal(weight, theirs), step
    state, expected = mine.state[weight], reference.state[theirs]
    for name, number in (("exp_avg", 1), ("exp_avg_sq", 2)):
        assert torch.equal(state[name].codes, expected[f"state{number}"])
        assert torch.equal(state[name].maxima, expected[f"absmax{number}"])


def test_hidden_matrices_of_4096_elements_alone_are_in_8_bits():
    model = Two()
    [optimizer] = AdamW(lr=0.01, state="8bit").build(model)
    create_state(optimizer)
    kinds = {name: type(optimizer.state[p]["exp_avg"]) for name, p in model.named_parameters()}
    assert [name for name, kind in kinds.items() if kind is Moment] == ["hidden.weight"]
    decay = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    assert [name for name, p in model.named_parameters() if decay[id(p)]] == [
        "embed_tokens.weight", "hidden.weight", "small.weight", "lm_head.weight",
    ]  # fmt: skip
    # 6144 of 6400 + 6144 + 96 + 2 * 5000 + 4032 + 6400 elements.
    [remark] = AdamW(lr=0.01, state="8bit").remarks(model)
    assert remark.startswith(
        "8-bit states: 19% of 33,072 trained elements; embeddings, heads, norms, biases and matrices"
    )


def test_a_moment_in_8_bits_takes_a_byte_and_a_sixty_fourth_an_element():
    weight = matrix((64, 1024))
    optimizer = ours(weight)
    create_state(optimizer)
    state = optimizer.state[weight]
    assert [state[name].nbytes for name in moments(optimizer)] == [65536 + 4 * 256, 65536 + 4 * 256]


def test_what_stays_in_float32_is_pytorchs_fused_adamw():
    model, other = Two(), Two()
    [mine], [theirs] = AdamW(lr=0.01, state="8bit").build(model), AdamW(lr=0.01).build(other)
    for step in range(3):
        for a, b in zip(model.parameters(), other.parameters(), strict=True):
            a.grad = torch.randn(a.shape, generator=torch.Generator().manual_seed(step))
            b.grad = a.grad.clone()
        mine.step()
        theirs.step()
    for (name, a), b in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b) != (name == "hidden.weight"), name


def test_a_gradient_is_divided_by_the_scale_and_a_step_skipped_by_a_tensor():
    weight, halved, skipped = matrix(), matrix(), matrix()
    stepped(ours(weight), weight, 1, 1)
    scaled = ours(halved)
    scaled.grad_scale, scaled.found_inf = torch.tensor(0.5), torch.tensor(0.0)
    halved.grad = gradient(1, halved.shape) / 2
    scaled.step()
    assert torch.equal(halved, weight)
    optimizer = ours(skipped)
    stepped(optimizer, skipped, 1, 2)
    before = [skipped.detach().clone(), *(optimizer.state[skipped][n].values(0, 6240) for n in moments(optimizer))]
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(math.nan), torch.tensor(1.0)
    stepped(optimizer, skipped, 3, 3)
    after = [skipped, *(optimizer.state[skipped][n].values(0, 6240) for n in moments(optimizer))]
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
    assert float(optimizer.state[skipped]["step"]) == 2


def test_what_a_checkpoint_has_of_a_moment_is_held_again_byte_for_byte():
    weight, other = matrix(), matrix()
    optimizer, restored = ours(weight), ours(other)
    stepped(optimizer, weight, 1, 7)
    create_state(restored)
    for name in moments(optimizer):
        mine, theirs = optimizer.state[weight][name], restored.state[other][name]
        for first, last in ((0, 100), (100, 5000), (5000, 6240)):  # no edges of blocks
            elements(theirs, first, last, restoring=True).copy_(elements(mine, first, last, restoring=False))
    assert settle([restored]) == 0
    for name in moments(optimizer):
        mine, theirs = optimizer.state[weight][name], restored.state[other][name]
        assert torch.equal(mine.codes, theirs.codes)
        assert torch.equal(mine.maxima, theirs.maxima)
    # Some block's largest element is negative, where the table ends at -0.993.
    least = optimizer.state[weight]["exp_avg"].codes.view(-1)[:6144].view(-1, BLOCK).amax(1)
    assert (least < 255).any()


@pytest.mark.parametrize("name", ["exp_avg", "exp_avg_sq"])
def test_values_of_other_blocks_move_by_half_a_step_of_the_table_at_most(name):
    weight = matrix()
    optimizer = ours(weight)
    stepped(optimizer, weight, 1, 7)
    values = optimizer.state[weight][name].values(0, 6240)
    other = matrix((6237,))
    shifted = ours(other)
    create_state(shifted)
    shifted.state[other][name].incoming(0, 6237).copy_(values[3:])
    moved = settle([shifted])
    assert 0 < moved <= BOUND
    state = shifted.state[other][name]
    off = (state.values(0, 6237) - values[3:]).abs()
    most = state.maxima.repeat_interleave(BLOCK)[:6237]
    assert (off <= (BOUND * most).clamp(min=1e-30)).all()


def losses(state: str) -> list[float]:
    """Of 100 steps of a network with two hidden matrices of 65536 elements."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(128, 512), nn.SiLU(), nn.Linear(512, 128))
    target = nn.Sequential(nn.Linear(128, 256), nn.Tanh(), nn.Linear(256, 128))
    [optimizer] = AdamW(lr=1e-3, weight_decay=0.01, state=state).build(net)
    draw, found = torch.Generator().manual_seed(1), []
    for _ in range(100):
        x = torch.randn(64, 128, generator=draw)
        loss = (net(x) - 3 * target(x).detach()).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


def test_the_curve_is_that_of_float32_moments():
    wide, narrow = losses("fp32"), losses("8bit")
    assert narrow != wide
    assert wide[-1] < wide[0] / 5
    assert narrow == pytest.approx(wide, rel=3e-3)  # what bitsandbytes' own optimizer was measured at on this network


def test_what_this_machine_lacks_is_refused_by_name(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="paged8bit pages the memory of a GPU, and this machine has none; use opt"):
        AdamW(lr=1.0, state="paged8bit").check_machine()
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ConfigError, match=r"8bit needs the package bitsandbytes: pip install 'onecurve\[quant\]'"):
        AdamW(lr=1.0, state="8bit").check_machine()
    AdamW(lr=1.0).check_machine()


def test_combinations_without_a_meaning_are_refused_by_name():
    [problem] = Muon(lr=1.0, state="8bit").problems()
    assert problem.startswith(
        "optimizer.state=8bit is for the moments of hidden matrices, of which optimizer=muon keeps"
    )
    paged = AdamW(lr=1.0, state="paged8bit")
    [problem] = Zero2(offload=Offload.optimizer).validate_optimizer(paged)
    assert "strategy.offload=optimizer keeps optimizer state in CPU memory already; use optimizer.state=8bit" in problem
    assert not list(Zero2().validate_optimizer(paged))
    assert not list(Zero2(offload=Offload.optimizer).validate_optimizer(AdamW(lr=1.0, state="8bit")))
