"""Quantisation-aware training: the forward is that of the export's numbers, and the gradient goes straight through."""

import copy

import pytest
import torch
from torch.nn import functional as F

from tests.unit.models.test_lora import NoTokenizer
from trainer.batch import Documents
from trainer.config import ConfigError
from trainer.export.compressed_tensors import write_int
from trainer.export.peft import merged_policy, merged_weights
from trainer.functional import logits
from trainer.generation.generate import generate
from trainer.generation.sampling import Sampling
from trainer.models import int_grid, linear
from trainer.models.hf_format import write_model
from trainer.models.int_grid import dequantise, fake, quantise
from trainer.models.linear import BlockLinear, FakeQuantizer, rounded_once, rounded_weights
from trainer.models.load import Model, ModelLoader
from trainer.models.lora import LoRA, LoRALinear, adapters_off
from trainer.models.qat import QAT
from trainer.optim import AdamW
from trainer.parallel.ddp import DDP
from trainer.parallel.precision import Compute, Precision

VOCABULARY = 50
SHAPE = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 8, "initializer_range": 0.3,
}  # fmt: skip
BIASED = {"family": "qwen2"}
DELTA = {
    "family": "qwen3_5_text", "delta_key_heads": 2, "delta_value_heads": 4, "delta_key_size": 8, "delta_value_size": 8,
}  # fmt: skip
TOKENS = torch.arange(24).view(2, 12) * 7 % VOCABULARY
PACKED = Documents.from_lengths([5, 7, 12], 2)


def loader(qat: QAT | None = None, adapter=None, **changes) -> ModelLoader:
    settings = {"adapter": adapter} if adapter else {}
    load = ModelLoader(Model(**{**SHAPE, **changes}), DDP(), 3, VOCABULARY, **settings)
    return load.rounded(qat or QAT())


def disturbed(model):
    """With biases and adapters that do something."""
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith(("lora_B.weight", "_proj.bias")):
                p.normal_(0, 0.05, generator=draw)
    return model


def scores(model) -> torch.Tensor:
    return model(TOKENS, PACKED, logits)


@torch.no_grad()
def round_in_place(model, names, bits=4, group=32):
    """What an export does, once."""
    for name, parameter in model.named_parameters():
        if name in names:
            parameter.copy_(dequantise(*quantise(parameter, bits, group)))
    return model


@pytest.mark.parametrize("shape", [{}, BIASED, DELTA], ids=["llama", "biased", "delta"])
@pytest.mark.parametrize("bits", [4, 8])
def test_the_forward_is_that_of_the_exported_numbers_to_the_last_bit(bits, shape):
    model = disturbed(loader(QAT(bits), **shape).load())
    names = rounded_weights(model)
    blocks = model.model.layers.named_modules(prefix="model.layers")
    assert names == {f"{name}.weight" for name, module in blocks if isinstance(module, torch.nn.Linear)}
    plain = disturbed(loader(**shape).load())
    assert (scores(plain) - scores(model)).abs().max() > 1e-3
    round_in_place(plain, names, bits, 32 if bits == 4 else 0)
    assert torch.equal(scores(plain), scores(model))


def test_parameters_have_the_names_types_and_values_of_a_model_that_rounds_nothing():
    plain, rounded = loader().load(), loader(QAT(4)).load()
    for (name, p), (other, q) in zip(plain.named_parameters(), rounded.named_parameters(), strict=True):
        assert (name, type(p)) == (other, type(q))
        assert torch.equal(p, q)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_of_a_weight_is_that_of_the_rounded_one(dtype):
    layer = BlockLinear(64, 8)
    layer.fake_quantizer = FakeQuantizer(4, 32)
    x = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    factors = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(1))
    rounded = fake(layer.weight, 4, 32).detach().requires_grad_()
    bias = layer.bias.detach().requires_grad_()
    with torch.autocast("cpu", dtype, enabled=dtype is not torch.float32):
        ours, expected = layer(x), F.linear(x, rounded, bias)
    assert torch.equal(ours, expected)
    mine = torch.autograd.grad((ours * factors).sum(), [x, layer.weight, layer.bias])
    theirs = torch.autograd.grad((expected * factors).sum(), [x, rounded, bias])
    for own, other in zip(mine, theirs, strict=True):
        # The same products; autograd adds a row's tokens up in another order, in bfloat16 with 8 bits.
        torch.testing.assert_close(own, other, rtol=1e-5 if dtype is torch.float32 else 2e-2, atol=1e-5)


def test_no_rounded_copy_waits_for_the_backward():
    layer = BlockLinear(64, 8, bias=False)
    layer.fake_quantizer = FakeQuantizer(4, 32)
    stored = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: stored.append(t) or t, lambda t: t):
        layer(torch.ones(3, 64))
    assert [t.shape for t in stored if t is not layer.weight] == [(3, 64)]


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputation_rounds_to_the_same_numbers(recompute):
    grads = []
    for kind in ("none", recompute):
        model = loader(QAT(4), activation_checkpointing=kind).load().train()
        with torch.autocast("cpu", torch.bfloat16):
            scores(model).square().mean().backward()
        grads.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_rounding_begins_with_its_step():
    model = loader(QAT(4, start=3)).load()
    before, quantizer = scores(model), next(m.fake_quantizer for m in model.modules() if isinstance(m, BlockLinear))
    assert torch.equal(before, scores(loader().load()))
    quantizer.begin(2)
    assert torch.equal(scores(model), before)
    quantizer.begin(3)
    assert torch.equal(scores(model), scores(loader(QAT(4)).load()))


def test_an_adapter_is_rounded_together_with_its_weight_as_the_export_is():
    load = loader(QAT(4), LoRA(rank=4))
    engine = DDP().wrap(disturbed(load.load()), AdamW(lr=0.1), Precision(Compute.fp32))
    exported = dict(merged_weights(engine, load))
    plain = loader().load()
    plain.load_state_dict(exported, strict=False)
    round_in_place(plain, rounded_weights(engine.module))
    assert torch.equal(scores(plain), scores(engine.module))
    sampled = dict(merged_policy(engine, load.adapter, load.fake_quantizer))
    assert all(torch.equal(sampled[name], p) for name, p in plain.named_parameters())
    base = round_in_place(loader().load(), rounded_weights(engine.module))
    with adapters_off(engine.module):
        assert torch.equal(scores(engine.module), scores(base))


@pytest.mark.parametrize(("bits", "dtype"), [(4, torch.float32), (4, torch.bfloat16), (8, torch.float32)])
@pytest.mark.parametrize("adapter", [None, LoRA(rank=4)], ids=["full", "lora"])
def test_the_exported_folder_holds_the_numbers_of_the_forward(adapter, bits, dtype, tmp_path):
    load = loader(QAT(bits), adapter)
    engine = DDP().wrap(disturbed(load.load()), AdamW(lr=0.1), Precision(Compute.fp32))
    plain, exported = tmp_path / "export", tmp_path / "export-int"
    write_model(
        plain, load.architecture, merged_weights(engine, load), dtype=dtype, shard_bytes=10**9, tokenizer=NoTokenizer(),
        facts={},
    )  # fmt: skip
    write_int(bits, "rtn", plain, exported)
    opened = dict(ModelLoader(Model(path=str(exported)), DDP(), 3, VOCABULARY).load().named_parameters())
    own = dict(merged_policy(engine, load.adapter, load.fake_quantizer))
    rounded = rounded_weights(engine.module)
    # What is not rounded is stored in the folder's format.
    assert all(torch.equal(w, own[n] if n in rounded else own[n].to(dtype).float()) for n, w in opened.items())
    if dtype is torch.float32:
        assert torch.equal(
            scores(engine.module), scores(ModelLoader(Model(path=str(exported)), DDP(), 3, VOCABULARY).load())
        )


def test_an_adapter_s_gradient_goes_straight_through_the_rounding():
    draw = torch.Generator().manual_seed(0)
    layer = LoRALinear(torch.nn.Linear(64, 8).requires_grad_(False), 4, 0.5)
    torch.nn.init.normal_(layer.lora_B.weight, generator=draw)
    layer.fake_quantizer = FakeQuantizer(4, 32)
    x = torch.randn(5, 64, generator=draw).requires_grad_()
    factors = torch.randn(5, 8, generator=draw)
    a, b = layer.lora_A.weight, layer.lora_B.weight
    merged = layer.weight + 0.5 * (b @ a)
    through = merged + (fake(merged.detach(), 4, 32) - merged).detach()
    expected = torch.autograd.grad((F.linear(x, through, layer.bias) * factors).sum(), [x, a, b])
    ours = torch.autograd.grad((layer(x) * factors).sum(), [x, a, b])
    for own, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-5)  # float32 products in another order


def test_weights_are_rounded_once_for_all_tokens_of_a_generation(monkeypatch):
    model = loader(QAT(4)).load().eval()
    calls = []
    monkeypatch.setattr(linear, "fake", lambda *given: calls.append(1) or int_grid.fake(*given))
    prompts, sampling = [[1, 2, 3], [4, 5]], Sampling(12, 0.0)
    ours = generate(model, prompts, sampling, stops=())
    assert len(calls) == len(rounded_weights(model)) == 14
    plain = round_in_place(loader().load().eval(), rounded_weights(model))
    assert [c.ids for c in ours] == [c.ids for c in generate(plain, prompts, sampling, stops=())]
    with torch.no_grad():
        scores(model)
        assert len(calls) == 28  # and not out of the last generation
        with rounded_once(plain):
            scores(plain)


def test_a_compiled_block_rounds_to_the_same_numbers():
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    grads = []
    for compiled in (False, True):
        model = loader(QAT(4)).load().train()
        if compiled:
            model.compile_blocks(backend)
        scores(model).square().mean().backward()
        grads.append([p.grad for p in model.parameters()])
    assert graphs
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_a_copy_of_a_rounded_model_rounds_too():
    model = loader(QAT(4)).load()
    assert torch.equal(scores(copy.deepcopy(model)), scores(model))


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"intermediate_size": 48}, r"groups of 32 inputs, and model.layers.0.mlp.down_proj.weight has 48; use widths"),
        ({"family": "mixtral", "experts": 4}, r"qat.bits=4: int4-rtn cannot hold experts; leave qat out"),
    ],
)
def test_a_model_that_the_export_cannot_hold_is_refused(changes, rule):
    with pytest.raises(ConfigError, match=rule):
        loader(QAT(4), **changes)
