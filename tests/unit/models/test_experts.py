"""Routers and experts against sums written out token by token, and what a router's losses do to the gradient."""

import pytest
import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from tests.mixtures import mixture, small
from trainer.models.balance import Balancer, BalanceRates
from trainer.models.experts import Experts, MixtureOfExperts, Router
from trainer.models.grouped import Assignment, grouped_product, has_grouped_product
from trainer.models.load import Model


def one_by_one(experts: Experts, x, chosen, weights):
    """Every token through its experts, alone."""
    gate_up, down, out = experts.gate_up_proj, experts.down_proj, []
    for token, numbers, shares in zip(x, chosen.tolist(), weights, strict=True):
        total = torch.zeros_like(token)
        for e, share in zip(numbers, shares, strict=True):
            both = gate_up.weight[e] @ token + (0 if gate_up.bias is None else gate_up.bias[e])
            gate, up = both.chunk(2)
            if experts.limit is None:
                hidden = F.silu(gate) * up
            else:
                gate, up = gate.clamp(max=experts.limit), up.clamp(-experts.limit, experts.limit)
                hidden = gate * torch.sigmoid(1.702 * gate) * (up + 1)
            total = total + share * (down.weight[e] @ hidden + (0 if down.bias is None else down.bias[e]))
        out.append(total)
    return torch.stack(out)


@pytest.mark.parametrize(
    ("dtype", "size", "features"),
    [
        (torch.float32, 16, {}),
        (torch.float32, 16, {"expert_bias": True, "glu_limit": 0.3}),
        (torch.float32, 6, {}),  # rows of 24 bytes, which the grouped product does not take
        (torch.float64, 16, {}),
    ],
)
def test_experts_and_their_gradients_are_those_of_tokens_alone(dtype, size, features):
    experts = mixture(hidden_size=size, expert_size=size, **features).experts.to(dtype)
    assert has_grouped_product(dtype, size, 2 * size) is (dtype is torch.float32 and size == 16)
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(7, size, dtype=dtype, generator=draw).requires_grad_()
    chosen = torch.tensor([[0, 1], [3, 1], [1, 0], [0, 3], [3, 0], [1, 3], [0, 1]])  # nobody goes to expert 2
    weights = torch.rand(7, 2, dtype=dtype, generator=draw).requires_grad_()
    leaves = [x, weights, *experts.parameters()]
    ours, expected = experts(x, chosen, weights), one_by_one(experts, x, chosen, weights)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)
    factors = torch.randn(ours.shape, dtype=dtype, generator=draw)
    for mine, theirs in zip(
        torch.autograd.grad((ours * factors).sum(), leaves),
        torch.autograd.grad((expected * factors).sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    assert not torch.autograd.grad(experts(x, chosen, weights).sum(), experts.down_proj.weight)[0][2].any()


def test_tokens_are_laid_out_by_expert_and_come_back_to_their_places():
    chosen = torch.tensor([[2, 0], [0, 3], [2, 3]])
    assignment = Assignment.of(chosen, 4)
    assert assignment.expert.tolist() == [0, 0, 2, 2, 3, 3]
    assert assignment.ends.tolist() == [2, 2, 4, 6]
    rows = assignment.dispatch(torch.tensor([[10.0], [20.0], [30.0]]))
    assert rows.flatten().tolist() == [10, 20, 10, 30, 20, 30]
    assert assignment.combine(rows + assignment.expert[:, None]).squeeze(-1).tolist() == [[12, 10], [20, 23], [32, 33]]


def test_grouped_products_of_either_kind_agree_bit_for_bit():
    draw = torch.Generator().manual_seed(0)
    x, matrices = torch.randn(10, 8, generator=draw), torch.randn(3, 8, 4, generator=draw)
    ends = torch.tensor([4, 4, 10], dtype=torch.int32)
    alone = torch.cat([x[:4] @ matrices[0], x[4:] @ matrices[2]])
    assert torch.equal(grouped_product(x, matrices, ends), alone)


def router(weight: list[list[float]], **features) -> Router:
    """A router of three experts whose logits of the token (1, 0) are those of ``weight``'s first column."""
    made = Router(small(hidden_size=2, experts=3, experts_per_token=2, **features))
    made.weight.data = torch.tensor(weight)
    return made


TOKEN = torch.tensor([[1.0, 0.0]])
LOGS = [[torch.log(torch.tensor(odds)).item(), 0.0] for odds in (1.0, 3.0, 4.0)]
"""Probabilities of 1/8, 3/8 and 4/8."""


@pytest.mark.parametrize(
    ("features", "expected"),
    [
        ({"router_normalised": False}, [4 / 8, 3 / 8]),
        ({"router_normalised": True}, [4 / 7, 3 / 7]),
        ({"router_normalised": True, "router_scale": 2.0}, [8 / 7, 6 / 7]),
    ],
)
def test_a_softmax_router_weighs_the_likeliest_experts(features, expected):
    chosen, weights = router(LOGS, **features)(TOKEN)
    assert chosen.tolist() == [[2, 1]]
    assert weights[0].tolist() == pytest.approx(expected)


def test_a_sigmoid_router_chooses_by_the_bias_and_weighs_without_it():
    made = router(LOGS, router_sigmoid=True)  # sigmoids 1/2, 3/4, 4/5
    made.balance.copy_(torch.tensor([1.0, 0.0, 0.0]))
    chosen, weights = made(TOKEN)
    assert chosen.tolist() == [[0, 2]]
    assert weights[0].tolist() == pytest.approx([0.5 / 1.3, 0.8 / 1.3])


def test_a_shared_expert_is_added_and_its_gate_weighs_it():
    layer = mixture(shared_size=8, shared_gate=True)
    x = torch.randn(1, 3, 16, generator=torch.Generator().manual_seed(2))
    tokens = x[0]
    routed = layer.experts(tokens, *layer.router(tokens))
    gate = torch.sigmoid(tokens @ layer.shared_gate.weight[0])[:, None]
    torch.testing.assert_close(layer(x)[0], routed + gate * layer.shared(tokens))


RATES = BalanceRates(balance_loss=0.3, z_loss=0.2)


def explicit(layer: MixtureOfExperts, tokens, factor: float, real=None):
    """The router's losses, as a term of the objective."""
    logits = tokens @ layer.router.weight.T
    real = torch.ones(len(tokens)) if real is None else real.float()
    balance = (logits.softmax(-1) * layer.router.load).sum(-1) * len(layer.router.load)
    return factor * ((0.3 * balance + 0.2 * logits.logsumexp(-1).square()) * real).sum()


@pytest.mark.parametrize("recomputed", [False, True])
def test_router_losses_reach_the_gradient_once_whatever_is_recomputed(recomputed):
    layer, x = mixture(), torch.randn(1, 6, 16, generator=torch.Generator().manual_seed(3), requires_grad=True)
    layer.router.load.copy_(torch.tensor([0.5, 0.25, 0.125, 0.125]))
    wanted = [x, *layer.parameters()]
    expected = torch.autograd.grad(layer(x).square().sum() + explicit(layer, x[0], 0.1), wanted)
    balancer = Balancer(layer, RATES)
    balancer.begin(torch.tensor(0.1))
    leaves = balancer.open()
    out = checkpoint(layer, x, use_reentrant=False) if recomputed else layer(x)
    out.square().sum().backward()
    for tensor, gradient in zip(wanted, expected, strict=True):
        torch.testing.assert_close(tensor.grad, gradient, rtol=1e-5, atol=1e-6)
    metrics = balancer.finish(torch.tensor(True))
    counts = torch.bincount(layer.router(x[0])[0].flatten(), minlength=4)
    assert leaves[0].grad[:4].sum() == counts.sum() == 12
    torch.testing.assert_close(layer.router.load, counts / 12)
    assert metrics["router/load_max"].item() == pytest.approx(counts.max().item() / 3)
    assert metrics["router/dropped"].item() == 0


def test_padding_counts_for_no_expert_and_no_loss():
    layer, x = mixture(), torch.randn(1, 5, 16, generator=torch.Generator().manual_seed(4))
    real = torch.tensor([[True, True, False, True, False]])
    balancer = Balancer(layer, RATES)
    balancer.begin(torch.tensor(1.0))
    leaves = balancer.open()
    (0 * layer(x, real)).sum().backward()
    [expected] = torch.autograd.grad(explicit(layer, x[0], 1.0, real[0]), [layer.router.weight])
    torch.testing.assert_close(layer.router.weight.grad, expected)
    assert leaves[0].grad[:4].sum() == 6  # two experts for each of three tokens


def test_forwards_without_gradients_count_nothing():
    layer, x = mixture(), torch.randn(1, 5, 16)
    balancer = Balancer(layer, RATES)
    balancer.begin(torch.tensor(1.0))
    leaves = balancer.open()
    with torch.no_grad():
        layer(x)
    layer(x)  # never followed by a backward
    assert leaves[0].grad is None
    balancer.finish(torch.tensor(True))
    assert layer.router.load.tolist() == [0.25] * 4


def test_the_bias_moves_against_the_load_and_only_with_a_step():
    layer = mixture(experts=3, experts_per_token=1, router_sigmoid=True)
    balancer = Balancer(layer, BalanceRates(bias_rate=0.01))
    statistics = torch.tensor([5.0, 3.0, 1.0, 0.0, 0.0, 0.0])
    for applied, expected in ((False, [0.0, 0.0, 0.0]), (True, [-0.01, 0.0, 0.01])):
        balancer.begin(torch.tensor(1.0))
        [leaf] = balancer.open()
        leaf.grad = statistics
        balancer.finish(torch.tensor(applied))
        assert layer.router.balance.tolist() == pytest.approx(expected)
    assert layer.router.load.tolist() == pytest.approx([5 / 9, 3 / 9, 1 / 9])


def test_loads_and_gradients_do_not_depend_on_micro_batches():
    x = torch.randn(4, 6, 16, generator=torch.Generator().manual_seed(5))
    results = []
    for parts in (1, 4):
        layer = mixture()
        layer.router.load.copy_(torch.tensor([0.4, 0.3, 0.2, 0.1]))
        balancer = Balancer(layer, RATES)
        balancer.begin(torch.tensor(1 / 24))
        for part in x.chunk(parts):
            balancer.open()
            (layer(part).square().sum() / 24).backward()
        balancer.finish(torch.tensor(True))
        results.append((layer.router.weight.grad, layer.router.load.clone()))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-5, atol=1e-6)
    assert torch.equal(results[0][1], results[1][1])


MIXTRAL = {"family": "mixtral", "experts": 4}
GLM = {"family": "glm4_moe", "experts": 4, "intermediate_size": 32, "shared_size": 32, "dense_layers": 1}


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"router_balance_loss": 0.01}, "model.router_balance_loss=0.01 has no effect on a model without experts"),
        ({"router_z_loss": 0.001}, "model.router_z_loss=0.001 has no effect on a model without experts"),
        ({"router_bias_rate": 0.001}, "model.router_bias_rate=0.001 has no effect on a model without experts"),
        ({"expert_size": 16}, "model.expert_size=16 has no effect without model.experts"),
        ({"router_normalised": True}, "model.router_normalised=true has no effect without model.experts"),
        ({**MIXTRAL, "router_bias_rate": 0.001}, "has no effect on softmax routers; use model.router_balance_loss"),
        ({**GLM, "router_z_loss": 0.001}, "has no effect on sigmoid routers; use model.router_bias_rate"),
        ({**MIXTRAL, "router_z_loss": 0.001, "router_balance_loss": 0.0}, None),
        ({**GLM, "router_bias_rate": 0.001}, None),
    ],
)
def test_a_setting_that_no_router_heeds_is_one_sentence(settings, sentence):
    problems = list(Model(**settings).problems())
    assert len(problems) == (sentence is not None), problems
    assert sentence is None or sentence in problems[0]
