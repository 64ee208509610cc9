"""Groups, optimizers and schedules do what their names say, number by number."""

import math

import pytest
import torch
from torch import nn

from trainer.optim import AdamW, Constant, Cosine, Linear, Muon, WarmupStableDecay, create_state, gradient_norm


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.up = nn.Linear(4, 6)
        self.norm = nn.LayerNorm(6)
        self.lm_head = nn.Linear(6, 7, bias=False)


def test_norms_and_biases_are_not_decayed():
    model = Tiny()
    (optimizer,) = AdamW(lr=1e-3, weight_decay=0.3).build(model)
    decayed = {id(p) for g in optimizer.param_groups if g["weight_decay"] == 0.3 for p in g["params"]}
    free = {id(p) for g in optimizer.param_groups if g["weight_decay"] == 0 for p in g["params"]}
    assert decayed == {id(model.embed.weight), id(model.up.weight), id(model.lm_head.weight)}
    assert free == {id(model.up.bias), id(model.norm.weight), id(model.norm.bias)}


def test_frozen_parameters_are_in_no_group():
    model = Tiny()
    model.embed.weight.requires_grad_(False)
    held = {id(p) for o in AdamW(lr=1e-3).build(model) for g in o.param_groups for p in g["params"]}
    assert id(model.embed.weight) not in held
    assert len(held) == 5


def test_muon_takes_the_hidden_matrices_and_adamw_the_rest_with_its_own_rate():
    model = Tiny()
    muon, adamw = Muon(lr=0.02, adamw_lr=0.001).build(model)
    assert [id(p) for g in muon.param_groups for p in g["params"]] == [id(model.up.weight)]
    assert {id(p) for g in adamw.param_groups for p in g["params"]} == {
        id(p) for p in model.parameters() if p is not model.up.weight
    }
    assert {g["base_lr"] for g in muon.param_groups} == {0.02}
    assert {g["base_lr"] for g in adamw.param_groups} == {0.001}


@pytest.mark.parametrize("kind", [AdamW, Muon])
def test_created_state_changes_nothing_about_the_first_step(kind):
    def stepped(create: bool) -> list[torch.Tensor]:
        torch.manual_seed(0)
        model = Tiny()
        optimizers = kind(lr=0.01).build(model)
        for optimizer in optimizers:
            if create:
                create_state(optimizer)
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        for optimizer in optimizers:
            optimizer.step()
        return [p.detach().clone() for p in model.parameters()]

    assert all(torch.equal(a, b) for a, b in zip(stepped(True), stepped(False), strict=True))


def test_gradient_norm_is_that_of_all_gradients_together():
    a, b = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(1))
    a.grad, b.grad = torch.tensor([2.0, 3.0]), torch.tensor([6.0])
    assert gradient_norm([a, b]).item() == 7.0


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (Constant(warmup=2), {1: 0.5, 2: 1, 3: 1, 10: 1}),
        (Linear(warmup=2, floor=0.2), {1: 0.5, 2: 1, 6: 0.6, 10: 0.2}),
        (Cosine(warmup=2, floor=0.1), {1: 0.5, 2: 1, 6: 0.55, 10: 0.1}),
        (Cosine(floor=0.0), {5: 0.5, 10: 0.0}),
        # The last 4 of 10 steps decay as 1 - sqrt(part): at step 7 a quarter of them is over.
        (WarmupStableDecay(warmup=2, decay=0.4), {1: 0.5, 2: 1, 6: 1, 7: 0.5, 10: 0}),
        (WarmupStableDecay(decay=0.4, floor=0.1), {6: 1, 7: 0.55, 10: 0.1}),
    ],
)
def test_schedules_pass_through_hand_computed_points(schedule, expected):
    for step, factor in expected.items():
        assert math.isclose(schedule(step, 10), factor, abs_tol=1e-12), step
