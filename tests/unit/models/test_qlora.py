"""QLoRA: what is packed, that it computes as PEFT over bitsandbytes does, and that its base is one wherever it is read."""

import logging
from functools import partial

import pytest
import torch
from torch import nn

from tests.unit.models.test_lora import SHAPE, NoTokenizer, disturbed, loader
from trainer.batch import Documents
from trainer.config import ConfigError
from trainer.export.nf4_folder import write_nf4
from trainer.export.peft import export_adapter, merged_policy, merged_weights
from trainer.functional import bitsandbytes as library
from trainer.functional import cross_entropy, logits
from trainer.generation.generate import generate, stream
from trainer.generation.sampling import Sampling
from trainer.models import packed
from trainer.models.hf_format import write_model
from trainer.models.load import Model, ModelLoader
from trainer.models.lora import LoRA, adapters_off
from trainer.models.nf4 import pack, unpack
from trainer.models.packed import PackedBase, packed_weights, widened
from trainer.models.qlora import QLoRA
from trainer.models.recompute import Recompute
from trainer.optim import AdamW, Muon
from trainer.parallel.ddp import DDP
from trainer.parallel.precision import Compute, Precision

pytest.importorskip("bitsandbytes")
TOKENS = torch.arange(24).view(2, 12) * 7 % 50
ROWS = Documents.from_lengths([12, 12], 2)
UP = "model.layers.0.mlp.up_proj.weight"


def written(where, **changes):
    """A small model as a Hugging Face folder."""
    load = loader(**{**SHAPE, **changes})
    write_model(
        where, load.architecture, load.load().named_parameters(), dtype=torch.float32, shard_bytes=10**9,
        tokenizer=NoTokenizer(), facts={},
    )  # fmt: skip
    return where


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return written(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture(scope="module")
def even(tmp_path_factory):
    """With rows of whole blocks: of others bitsandbytes' kernel for CPUs gives wrong values."""
    changes = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16, "initializer_range": 0.1}
    return written(tmp_path_factory.mktemp("even") / "model", **changes)


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    experts = {"experts": 4, "expert_size": 16, "rms_norm_eps": 1e-6, "tie_word_embeddings": False}
    return written(tmp_path_factory.mktemp("experts") / "model", family="qwen3_moe", **experts)


def qlora(folder, adapter=None, compute=Compute.fp32, **model) -> ModelLoader:
    load = loader(adapter or QLoRA(rank=4), path=str(folder), **model)
    load.precision = Precision(compute)
    return load


def scores(model) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS, ROWS, logits)


def learnt(model) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """A loss, and its gradients by name."""
    model.zero_grad(set_to_none=True)
    read = partial(cross_entropy, targets=TOKENS.roll(-1, 1), mask=torch.ones(TOKENS.shape))
    loss = model(TOKENS, ROWS, read)[0]
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def plain_twin(load: ModelLoader) -> nn.Module:
    """The model with the same adapters over unpacked float32 weights of the values that the packed ones stand for."""
    twin = loader(LoRA(rank=4), path=load.config.path).load()
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            if name in load.packed:
                parameter.copy_(load.dequantised(name))
    return twin


def test_every_linear_layer_of_the_blocks_is_packed_to_the_bytes_of_its_weight(folder):
    load = qlora(folder, QLoRA(targets=["q_proj"]))
    model = load.load()
    weights = packed_weights(model)
    linear = {n for n in load.shapes if n.endswith("_proj.weight")}
    assert weights.keys() == linear == load.packed.keys()
    for name, weight in weights.items():
        assert all(torch.equal(*pair) for pair in zip(weight.packed, pack(load.start(name)), strict=True))
    rest = {n: p.dtype for n, p in model.named_parameters() if n.rpartition(".")[0] not in linear}
    assert set(rest.values()) == {torch.float32}
    assert not any(isinstance(m, nn.Linear) for n, m in model.named_modules() if ".lora_" not in n)


def test_a_folder_of_nf4_gives_the_bytes_that_it_stores(even, tmp_path):
    plain = qlora(even)
    write_nf4(even, tmp_path / "nf4")
    load = qlora(tmp_path / "nf4")
    digests = [{n: w.digest for n, w in packed_weights(each.load()).items()} for each in (plain, load)]
    assert digests[0] == digests[1]
    # Numbers that are packed again have other maxima: a mean is taken off them.
    assert pack(load.start(UP)).digest() != digests[0][UP]
    assert torch.equal(load.dequantised(UP), plain.dequantised(UP))


def test_what_is_trained_whole_stays_unpacked(folder):
    load = qlora(folder, QLoRA(targets=["q_proj"], full=["up_proj", "model.norm"]))
    model = load.load()
    assert {n for n in load.shapes if n.endswith("_proj.weight")} - load.packed.keys() == {UP, UP.replace("0", "1")}
    assert torch.equal(model.get_parameter(UP), load.start(UP))
    assert model.get_parameter(UP).requires_grad


def test_it_computes_and_learns_as_peft_over_bitsandbytes(even, tmp_path):
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    load = qlora(even)
    engine = DDP().wrap(disturbed(load.load()), AdamW(lr=0.1), Precision())
    export_adapter(tmp_path / "adapter", engine, load, NoTokenizer(), {"step": 1})
    four_bit = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    base = transformers.AutoModelForCausalLM.from_pretrained(even, dtype=torch.float32, quantization_config=four_bit)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter", is_trainable=True).train()
    ours = engine.model.train()
    layer = theirs.base_model.model.model.layers[0].mlp.up_proj.base_layer.weight
    assert torch.equal(packed_weights(ours)[UP].codes, layer.data.flatten())
    expected, found = theirs(TOKENS).logits, ours(TOKENS, ROWS, logits)
    # Attention and norms are other kernels: the last bits of float32.
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    expected.square().mean().backward()
    found.square().mean().backward()
    gradients = {
        n.replace(".default", "").removeprefix("base_model.model."): p.grad for n, p in theirs.named_parameters()
    }
    trained = {n: p.grad for n, p in ours.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 14
    for name, gradient in trained.items():
        torch.testing.assert_close(gradient, gradients[name], rtol=1e-4, atol=1e-6)


def test_one_layer_is_bit_for_bit_peft_s(even):
    peft, bitsandbytes = pytest.importorskip("peft"), pytest.importorskip("bitsandbytes")
    load = qlora(even)
    ours = disturbed(load.load()).model.layers[0].mlp.up_proj
    linear = bitsandbytes.nn.Linear4bit(64, 128, bias=False, compute_dtype=torch.float32, quant_type="nf4")
    linear.weight = bitsandbytes.nn.Params4bit(load.start(UP), requires_grad=False, quant_type="nf4")
    config = peft.LoraConfig(r=4, lora_alpha=32)
    theirs = peft.tuners.lora.bnb.Linear4bit(linear.to("cpu"), "default", r=4, lora_alpha=32, config=config).train()
    with torch.no_grad():
        theirs.lora_A["default"].weight.copy_(ours.lora_A.weight)
        theirs.lora_B["default"].weight.copy_(ours.lora_B.weight)
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    mine, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    a, b = ours(mine), theirs(other)
    a.square().sum().backward()
    b.square().sum().backward()
    assert torch.equal(a, b)
    assert torch.equal(mine.grad, other.grad)


@pytest.mark.parametrize("compute", [Compute.fp32, Compute.bf16])
def test_evaluation_computes_what_training_does_and_leaves_its_gradients(folder, compute):
    load = qlora(folder, compute=compute)
    engine = DDP().wrap(disturbed(load.load()), AdamW(lr=0.1), load.precision)
    with engine.autocast():
        before, gradients = learnt(engine.model.train())
    with engine.evaluating():
        evaluated = scores(engine.model)
    with engine.autocast():
        training = scores(engine.model.train())
        after, again = learnt(engine.model)
    assert torch.equal(evaluated, training)
    assert before == after
    assert gradients.keys() == again.keys()
    assert all(torch.equal(gradients[n], again[n]) for n in gradients)


def test_it_learns_what_lora_does_over_the_unpacked_weights(folder):
    load = qlora(folder)
    model, twin = disturbed(load.load()).train(), disturbed(plain_twin(load)).train()
    for (name, mine), (other, theirs) in zip(learnt(model)[1].items(), learnt(twin)[1].items(), strict=True):
        assert name == other
        assert torch.equal(mine, theirs)
    with adapters_off(model), adapters_off(twin):
        assert torch.equal(scores(model), scores(twin))


@pytest.mark.parametrize("recompute", [Recompute.full, Recompute.selective])
def test_recomputation_changes_nothing(folder, recompute):
    expected = learnt(disturbed(qlora(folder).load()).train())
    found = learnt(disturbed(qlora(folder, activation_checkpointing=recompute).load()).train())
    assert found[0] == expected[0]
    assert all(torch.equal(found[1][n], expected[1][n]) for n in expected[1])


@pytest.mark.slow
def test_compiled_blocks_compute_the_same(folder):
    from torch._dynamo.backends.debugging import aot_eager

    expected = learnt(disturbed(qlora(folder).load()).train())
    model = disturbed(qlora(folder).load()).train()
    model.compile_blocks(aot_eager)
    loss, gradients = learnt(model)
    torch.testing.assert_close(loss, expected[0], rtol=1e-6, atol=0)
    for name, gradient in expected[1].items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-6)  # sums in another order


@pytest.mark.parametrize("compute", [Compute.bf16, Compute.fp16])
def test_tables_are_held_in_the_compute_format_and_the_residual_stream_is_not(folder, compute):
    load = qlora(folder, compute=compute)
    model = load.load()
    table = model.model.embed_tokens.weight
    assert table.dtype is load.precision.dtype
    assert model.model.norm.weight.dtype is torch.float32
    with torch.autocast("cpu", load.precision.dtype):
        assert model.model.embed_tokens(TOKENS).dtype is torch.float32


def test_a_reference_is_packed_to_the_same_bytes_and_is_the_policy_without_adapters(folder):
    for adapter in (QLoRA(rank=4), QLoRA(rank=4, targets=["q_proj"], full=["up_proj"])):
        load = qlora(folder, adapter)
        policy, reference = disturbed(load.load()).eval(), load.frozen()
        digests = [{n: w.digest for n, w in packed_weights(m).items()} for m in (policy, reference)]
        assert digests[0] == digests[1]
        assert len(digests[0]) == len(load.packed)
        assert not torch.equal(scores(policy), scores(reference))
        with adapters_off(policy):
            assert torch.equal(scores(policy), scores(reference))


def test_merged_weights_are_the_model_that_was_trained(folder):
    load = qlora(folder)
    engine = DDP().wrap(disturbed(load.load()), AdamW(lr=0.1), Precision())
    exported, policy = dict(merged_weights(engine, load)), dict(merged_policy(engine, load.adapter))
    assert exported.keys() == policy.keys() == load.shapes.keys()
    assert all(torch.equal(exported[n].float(), policy[n].float()) for n in exported)
    plain = loader(path=str(folder)).load()
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            parameter.copy_(exported[name])
    # W x + B A x against (W + B A) x.
    torch.testing.assert_close(scores(plain), scores(engine.model), rtol=0, atol=1e-5)
    assert not torch.allclose(exported[UP], load.start(UP), atol=1e-2)


def test_sampling_reads_wide_copies_that_are_gone_afterwards_and_draws_the_same(folder, monkeypatch, caplog):
    model, prompts = disturbed(qlora(folder).load()).eval(), [[1, 5, 9], [7]]
    wide = list[bool]()
    weight = packed_weights(model)[UP]
    weight.register_forward_pre_hook(lambda layer, _: wide.append(layer.wide is not None))
    answers = generate(model, prompts, Sampling(6, 0.0), stops=[])
    streamed = list(stream(model, prompts[0], Sampling(6, 0.0), stops=[]))
    assert streamed == answers[0].ids
    assert wide
    assert all(wide)
    assert weight.wide is None
    monkeypatch.setattr(packed, "USABLE", 0.0)
    with caplog.at_level(logging.WARNING):
        again = generate(model, prompts, Sampling(6, 0.0), stops=[])
    assert not wide[-1]
    assert "sampling unpacks the NF4 weights at every token: a copy needs" in caplog.text
    assert [(a.ids, a.logprobs) for a in answers] == [(a.ids, a.logprobs) for a in again]


def test_wide_copies_are_in_the_format_that_is_computed_in(folder):
    load = qlora(folder, compute=Compute.bf16)
    engine = DDP().wrap(disturbed(load.load()), AdamW(lr=0.1), load.precision)
    with engine.evaluating():
        expected = scores(engine.model)
        with widened(engine.model):
            assert {w.wide.dtype for w in packed_weights(engine.model).values()} == {torch.bfloat16}
            assert torch.equal(scores(engine.model), expected)


def test_its_start_is_another_than_that_of_lora(folder):
    prints = [qlora(folder, a).fingerprint() for a in (LoRA(), QLoRA(), QLoRA(targets=["q_proj"], full=["up_proj"]))]
    assert len(set(prints)) == 3
    assert qlora(folder, QLoRA()).fingerprint() == prints[1]


def test_a_base_that_was_packed_otherwise_is_named_when_a_run_goes_on(folder, caplog):
    base = PackedBase.of(qlora(folder).load())
    with caplog.at_level(logging.WARNING):
        base.load_state_dict(base.state_dict())
    assert not caplog.text
    other = base.state_dict()
    other["digests"] = {**other["digests"], UP: "0"}
    with caplog.at_level(logging.WARNING):
        base.load_state_dict(other)
    assert f"1 of 14 NF4 weights ({UP}) are packed to other bytes here" in caplog.text


def test_experts_are_packed_stack_by_stack(mixture):
    load = ModelLoader(Model(path=str(mixture)), DDP(), 3, 50, QLoRA(rank=4))
    model = load.load().train()
    stack = "model.layers.1.mlp.experts.down_proj.weight"
    assert load.packed[stack] == (4, 32, 16)
    plain = ModelLoader(Model(path=str(mixture)), DDP(), 3, 50, LoRA(rank=4)).load().train()
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            if name in load.packed:
                parameter.copy_(unpack(pack(load.start(name)), load.packed[name], torch.float32))
    (loss, gradients), (expected, theirs) = learnt(disturbed(model)), learnt(disturbed(plain))
    assert loss == expected
    assert all(torch.equal(gradients[n], theirs[n]) for n in theirs)
    [matrices] = Muon(lr=0.1).build(model)  # which looks for matrices among all layers
    assert {id(p) for p in matrices.param_groups[0]["params"]} == {id(p) for p in model.parameters() if p.requires_grad}


def test_without_the_library_the_choice_is_refused_by_name(monkeypatch):
    monkeypatch.setattr(library, "PACKAGE", "no_such_package")
    assert [p for p in QLoRA().problems() if "pip install 'onecurve[quant]'" in p]


def test_the_start_says_what_four_bits_take_and_cost(folder):
    taken, small_model = QLoRA().remarks(qlora(folder).architecture)
    # q and o 32 x 32, k and v 16 x 32, three of 48 x 32, in two layers.
    assert taken.startswith(f"base in NF4: {2 * 32 * (2 * 32 + 2 * 16 + 3 * 48):,} of ")
    assert "at 4.13 bits" in taken
    assert "a model below 1 billion parameters loses more accuracy to NF4" in small_model


def test_targets_that_match_nothing_are_refused_as_lora_s_are(folder):
    with pytest.raises(ConfigError, match="q_porj matches no linear layer"):
        QLoRA(targets=["q_porj"]).validate_architecture(qlora(folder).architecture)
