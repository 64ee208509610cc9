"""Rearranged weights: the same bits, only where nothing needs a gradient, and made once a generation."""

import logging
from contextlib import nullcontext

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from tests.unit.models.test_lora import loader
from tests.unit.models.test_transformer import built
from trainer.batch import Documents
from trainer.functional import logits
from trainer.generation.generate import generate
from trainer.generation.sampling import Sampling
from trainer.models import cpu_kernels, packed
from trainer.models.actor_critic import ActorCritic
from trainer.models.cpu_kernels import block_weights, has_rearranged_products, rearranged, rearranged_product
from trainer.models.linear import FakeQuantizer, WeightProduct
from trainer.models.lora import LoRA
from trainer.models.rearranged import rearranged_weights

TOKENS = torch.arange(24)[None] * 7 % 50
PACKED = Documents.from_lengths([5, 7, 12], 1)
needs_products = pytest.mark.skipif(not has_rearranged_products(), reason="this PyTorch has no such operators here")


def copies(model) -> dict[str, torch.Tensor]:
    parts = model.named_modules()
    return {n: part.rearranged for n, part in parts if isinstance(part, WeightProduct) and part.rearranged is not None}


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).bfloat16()


@needs_products
@pytest.mark.parametrize("rows", [0, 1, 16, 64, 300])
def test_a_product_of_a_rearranged_weight_has_the_same_bits(rows):
    x, weight, bias = random(rows, 1, 96), random(80, 96), random(80)
    copy = rearranged(weight)
    assert torch.equal(rearranged_product(x, copy), F.linear(x, weight))
    assert torch.equal(rearranged_product(x, copy, bias), F.linear(x, weight, bias))
    assert torch.equal(
        rearranged_product(x.transpose(0, 1), copy, bias.float()), F.linear(x.transpose(0, 1), weight, bias)
    )


@needs_products
@pytest.mark.parametrize(
    "change", [{}, {"family": "qwen2", "attention_bias": True}, {"family": "gemma2", "logit_cap": 1.5}]
)
def test_a_model_computes_the_same_with_them(change):
    model = built(initializer_range=0.3, **change).eval().bfloat16()
    with torch.no_grad():
        expected = model(TOKENS, PACKED, logits)
        with rearranged_weights(model) as read:
            assert len(copies(model)) == 3 * 7
            assert read is not logits
            assert torch.equal(model(TOKENS, PACKED, read), expected)
    assert copies(model) == {}


@needs_products
def test_float32_weights_are_rearranged_as_autocast_casts_them():
    model = built(initializer_range=0.3).eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = model(TOKENS, PACKED, logits)
        with rearranged_weights(model) as read:
            assert torch.equal(model(TOKENS, PACKED, read), expected)
    with rearranged_weights(model) as read:
        assert copies(model) == {}
        assert read is logits


@needs_products
def test_a_gradient_flows_past_them():
    model = built(initializer_range=0.3).bfloat16()
    grads = []
    for context in (nullcontext(), rearranged_weights(model)):
        model.zero_grad()
        with context:
            model(TOKENS, PACKED, logits).float().square().sum().backward()
        grads.append(model.model.layers[0].mlp.up_proj.weight.grad)
    assert grads[0].abs().sum() > 0
    assert torch.equal(*grads)


@needs_products
def test_adapters_are_added_to_their_rearranged_weight():
    model = loader(LoRA(rank=4)).load().eval().bfloat16()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    with torch.no_grad():
        expected = model(TOKENS, PACKED, logits)
        with rearranged_weights(model) as read:
            assert len(copies(model)) == 2 * 7
            assert torch.equal(model(TOKENS, PACKED, read), expected)


@needs_products
def test_a_critic_and_rounded_layers_have_none():
    model = built().bfloat16()
    policy = ActorCritic(model.architecture).bfloat16()
    policy.critic = built(1).bfloat16()
    policy.model.layers[1].mlp.up_proj.fake_quantizer = FakeQuantizer(8, 0)
    with rearranged_weights(policy):
        assert len(copies(policy)) == 3 * 7 - 1
        assert copies(policy.critic) == {}
        assert "model.layers.1.mlp.up_proj" not in copies(policy)


class Calls(TorchDispatchMode):
    """Counts calls of the operators."""

    def __init__(self) -> None:
        super().__init__()
        self.made = self.used = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.made += operation is torch.ops.mkldnn._reorder_linear_weight.default
        self.used += operation is torch.ops.mkldnn._linear_pointwise.default
        return operation(*args, **(kwargs or {}))


@needs_products
def test_a_generation_rearranges_each_weight_once_and_a_short_one_none():
    model = built().eval().bfloat16()
    with Calls() as calls:
        generate(model, [[1, 2, 3], [4, 5]], Sampling(15, 0), stops=())
        assert (calls.made, calls.used) == (0, 0)
        generate(model, [[1, 2, 3], [4, 5]], Sampling(16, 0), stops=())
    # 21 matrices and the vocabulary's; a prefill and 15 steps.
    assert (calls.made, calls.used) == (22, 22 * 16)
    assert copies(model) == {}


@needs_products
def test_without_memory_for_them_a_warning_says_so_once(monkeypatch, caplog):
    model = built().bfloat16()
    monkeypatch.setattr(packed.psutil, "virtual_memory", lambda: type("Memory", (), {"available": 1000}))
    packed.warn_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            with rearranged_weights(model) as read:
                assert copies(model) == {}
                assert read is logits
    assert caplog.messages == ["sampling rearranges the weights at every token: a copy needs 0.0 GB of 0.0"]


@pytest.mark.parametrize("broken", [AttributeError("no such operator"), None])
def test_operators_that_are_gone_or_give_other_numbers_are_not_used(broken, monkeypatch):
    def other(*_):
        if broken is not None:
            raise broken
        return torch.zeros(5, 2, 48, dtype=torch.bfloat16)

    monkeypatch.setattr(torch.ops.mkldnn, "_reorder_linear_weight", lambda weight, _: weight)
    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", type("Packet", (), {"default": staticmethod(other)}))
    for function in (has_rearranged_products, cpu_kernels._pointwise):
        function.cache_clear()
    try:
        assert not has_rearranged_products()
    finally:
        for function in (has_rearranged_products, cpu_kernels._pointwise):
            function.cache_clear()


def test_scores_of_cached_keys_are_float32_under_autocast():
    q, k = random(6, 2, 3, 32), random(6, 2, 64, 32)
    mask = torch.zeros(6, 64)
    expected = block_weights(q, k, mask, 0.7)
    # By hand: 0.7 q k^T of the first head, and the log of the sum of its exponentials.
    by_hand = torch.logsumexp(0.7 * q[0, 0, 0].float() @ k[0, 0].float().T, 0)
    assert expected[1][0, 0].item() == pytest.approx(by_hand.item(), abs=1e-4)  # float32 sums of 64
    with torch.autocast("cpu", torch.bfloat16):
        assert all(map(torch.equal, block_weights(q, k, mask, 0.7), expected))
