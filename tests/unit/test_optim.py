"""Groups, optimizers and schedules do what their names say, number by number."""

import math
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from torch import nn

from tests.mixtures import small
from trainer.models.experts import MixtureOfExperts
from trainer.optim import AdamW, Constant, Cosine, Linear, Muon, WarmupStableDecay, gradient_norm
from trainer.optim.muon import BatchedMuon, Replicas, _newton_schulz
from trainer.optim.state import create_state


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


THEIRS = partial(torch.optim.Muon, adjust_lr_fn="match_rms_adamw")
SHAPES = [(6, 4), (6, 4), (4, 6), (5, 5), (6, 4)]


def matrices(optimizer, *, steps: int = 3, **attributes) -> list[torch.Tensor]:
    """Matrices, and their momentum, after steps along drawn gradients."""
    draw = torch.Generator().manual_seed(1)
    parameters = [nn.Parameter(torch.randn(shape, generator=draw)) for shape in SHAPES]
    made = optimizer(parameters, lr=0.02, weight_decay=0.1, momentum=0.9)
    for name, value in attributes.items():
        setattr(made, name, value)
    for _ in range(steps):
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=draw)
        made.step()
    return [p.detach() for p in parameters] + [made.state[p]["momentum_buffer"] for p in parameters]


def test_batched_muon_is_pytorchs_bit_for_bit():
    for mine, theirs in zip(matrices(BatchedMuon), matrices(THEIRS), strict=True):
        assert torch.equal(mine, theirs)


def test_each_matrix_of_a_stack_is_updated_by_itself():
    draw = torch.Generator().manual_seed(1)
    stack = nn.Parameter(torch.randn(3, 6, 4, generator=draw))
    alone = [nn.Parameter(matrix.clone()) for matrix in stack.detach()]
    gradient = torch.randn(3, 6, 4, generator=draw)
    gradient[1] = 0  # an expert that no token went to
    stack.grad = gradient.clone()
    for parameter, own in zip(alone, gradient, strict=True):
        parameter.grad = own.clone()
    for parameters in ([stack], alone):
        BatchedMuon(parameters, lr=0.02, weight_decay=0.1, momentum=0.9).step()
    assert torch.equal(stack.detach(), torch.stack([parameter.detach() for parameter in alone]))
    assert torch.isfinite(stack).all()


def test_stacked_experts_go_with_muon_and_routers_and_biases_do_not():
    model = MixtureOfExperts(small(expert_bias=True))
    muon, adamw = Muon(lr=0.02).build(model)
    shapes = [tuple(p.shape) for group in muon.param_groups for p in group["params"]]
    assert shapes == [(4, 32, 16), (4, 16, 16)]
    names = {id(p): name for name, p in model.named_parameters()}
    decay = {names[id(p)]: group["weight_decay"] for group in adamw.param_groups for p in group["params"]}
    biases = ("router.bias", "experts.gate_up_proj.bias", "experts.down_proj.bias")
    assert decay == {"router.weight": 0.1, **dict.fromkeys(biases, 0.0)}


def test_batched_muon_divides_by_the_scale_and_skips_by_a_tensor():
    halved = matrices(BatchedMuon, grad_scale=torch.tensor(2.0), found_inf=torch.tensor(0.0))
    # Orthogonalisation ignores the size of a gradient; momentum is halved exactly.
    for mine, theirs in zip(halved[5:], matrices(THEIRS)[5:], strict=True):
        assert torch.equal(2 * mine, theirs)
    skipped = matrices(BatchedMuon, grad_scale=torch.tensor(math.nan), found_inf=torch.tensor(1.0))
    draw = torch.Generator().manual_seed(1)
    for mine, shape in zip(skipped, SHAPES, strict=False):
        assert torch.equal(mine, torch.randn(shape, generator=draw))
    assert not any(buffer.any() for buffer in skipped[5:])


def test_many_matrices_at_once_are_orthogonalised_as_one_by_one():
    stack = torch.randn(3, 8, 5, generator=torch.Generator().manual_seed(0))
    coefficients = (3.4445, -4.775, 2.0315)
    at_once = _newton_schulz(stack, coefficients, 5, 1e-7)
    for matrix, mine in zip(stack, at_once, strict=True):
        # bfloat16 holds 8 bits, and five steps of it round several times.
        torch.testing.assert_close(mine, _newton_schulz(matrix, coefficients, 5, 1e-7), rtol=0, atol=0.05)
        torch.testing.assert_close(torch.linalg.svdvals(mine.float()), torch.ones(5), rtol=0, atol=0.35)


def test_replicas_that_divide_muons_work_come_to_the_same_matrices():
    meeting, given = threading.Barrier(2, timeout=30), {}

    def run(rank: int) -> list[torch.Tensor]:
        def stack(mine: torch.Tensor) -> torch.Tensor:
            given[rank] = mine
            meeting.wait()
            both = torch.stack([given[0], given[1]])
            meeting.wait()
            return both

        return matrices(BatchedMuon, replicas=Replicas(rank, 2, stack))

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(run, range(2))
    for a, b, alone in zip(first, second, matrices(BatchedMuon), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, alone)


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


@pytest.mark.parametrize(
    "schedule", [Constant(), Linear(), Cosine(), WarmupStableDecay(), Linear(warmup=1), Cosine(warmup=9)]
)
def test_a_run_of_one_step_takes_it_at_the_base_rate(schedule):
    assert schedule(1, 1) == 1


@pytest.mark.parametrize(
    ("warmup", "steps", "taken"),
    [(0.03, 1000, 30), (0.03, 100, 3), (0.03, 4, 1), (0.5, 7, 4), (5, 4, 1), (500, 400, 12), (1, 4, 1), (4, 4, 4)],
)
def test_a_warm_up_below_1_or_that_does_not_fit_is_a_part_of_the_run(warmup, steps, taken):
    assert Cosine(warmup=warmup).warmup_steps(steps) == taken
    assert Constant(warmup=warmup)(1, steps) == 1 / taken
    assert bool(list(Cosine(warmup=warmup).remarks(steps))) == (warmup > steps)
