"""Memory by formula, against the paper, hand-derived numbers, and models that are built."""

import dataclasses

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from tests.command import onecurve
from tests.shapes import architecture
from trainer.batch import Documents
from trainer.cli.estimate import DEVICE_GB
from trainer.compose import compose
from trainer.diagnostics.activations import activations
from trainer.diagnostics.advice import advice
from trainer.diagnostics.layout import Layout
from trainer.diagnostics.memory import fit, host_memory, memory, states
from trainer.diagnostics.step_time import seconds_per_step
from trainer.models.context import PackedContext
from trainer.models.recompute import Recompute
from trainer.models.sizes import parameters_of
from trainer.models.transformer import Transformer
from trainer.tracking.throughput import PEAKS

SEVEN = architecture(
    vocab_size=32000, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
    num_key_value_heads=8, head_dim=128, tie_word_embeddings=False,
)  # fmt: skip


def test_all_experts_take_memory():
    # Qwen3-30B-A3B, whose card says 30.5 billion.
    shape = architecture(
        vocab_size=151936, family="qwen3_moe", hidden_size=2048, intermediate_size=6144, num_hidden_layers=48,
        num_attention_heads=32, num_key_value_heads=4, head_dim=128, experts=128, experts_per_token=8, expert_size=768,
        tie_word_embeddings=False,
    )  # fmt: skip
    assert parameters_of(shape) == 30_532_122_624


def layout(**changes) -> Layout:
    usual = {"stage": 0, "ranks": 64, "low_precision_weights": True, "compute": 2, "micro": 1, "length": 2048}
    return Layout(**{**usual, **changes})


@pytest.mark.parametrize(
    ("key_heads", "value_heads", "sizes"), [(4, 8, (32, 48)), (2, 2, (64, 64))], ids=["shared-keys", "square"]
)
def test_a_gated_delta_rule_keeps_what_autograd_saves_of_it(key_heads, value_heads, sizes):
    # Three delta rules and one attention, 256 tokens, in float32 without recomputation.
    shape = architecture(
        64, family="qwen3_5_text", hidden_size=128, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, delta_key_heads=key_heads, delta_value_heads=value_heads,
        delta_key_size=sizes[0], delta_value_size=sizes[1],
    )  # fmt: skip
    model, documents = Transformer(shape).train(), Documents.from_lengths([256], 1)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved: dict[int, torch.Tensor] = {}  # which keeps them, so that no address is used twice

    def remember(tensor: torch.Tensor) -> torch.Tensor:
        saved.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    turned = model.model.turned(documents.positions, torch.float32)
    x = torch.randn(1, 256, 128, requires_grad=True)
    with saved_tensors_hooks(remember, lambda t: t):
        for block, angles in zip(model.model.layers, turned, strict=True):
            x = block(x, angles, PackedContext(documents))
    measured = sum(t.untyped_storage().nbytes() for address, t in saved.items() if address not in own)
    usual = layout(ranks=1, low_precision_weights=False, compute=4, length=256, cuda=False)
    assert activations(shape, usual) == pytest.approx(measured, rel=0.1)  # the tenth that the estimate promises


@pytest.mark.parametrize(("stage", "expected"), [(0, 120.0), (1, 31.4), (2, 16.6), (3, 1.9)])
def test_the_example_of_the_zero_paper_comes_out(stage, expected):
    # 7.5 billion parameters on 64 GPUs (arXiv:1910.02054, figure 1).
    assert sum(states(7.5e9, layout(stage=stage))) / 1e9 == pytest.approx(expected, abs=0.05)


@pytest.mark.parametrize(("stage", "bytes_each"), [(0, 16), (1, 8 + 12 / 4), (2, 4 + 16 / 4), (3, 20 / 4)])
def test_float32_working_copies_take_what_the_algorithms_say(stage, bytes_each):
    assert sum(states(1.0, layout(stage=stage, low_precision_weights=False, ranks=4))) == pytest.approx(bytes_each)


def test_fsdp_divides_sixteen_bytes_a_weight_whatever_it_gathers_them_in():
    rows = {"stage": 3, "ranks": 4, "float_rows": True}
    assert sum(states(1.0, layout(**rows))) == 16 / 4
    assert sum(states(1.0, layout(**rows, low_precision_weights=False))) == 16 / 4
    # Without resharding a bf16 copy is there through a step, and whole gradients, which are exchanged at its end.
    assert states(1.0, layout(**rows, reshard=False)) == (4 / 4 + 2, 4, 8 / 4)
    assert states(1.0, layout(**rows, offload="parameters")) == (0, 0, 0)


def test_an_adapted_model_takes_its_frozen_weights_once_and_sixteen_bytes_for_each_trained_one():
    # 7.24 billion bf16 weights on one device, and 10 million trained elements of 16 bytes.
    found = memory(SEVEN, layout(ranks=1, adapters=10_000_000))
    count = parameters_of(SEVEN)
    assert found.parameters + found.gradients + found.optimizer == pytest.approx(2 * count + 16 * 10_000_000)
    # Float32 under autocast: the two tables stay float32 for the residual stream, linear layers are held in bf16.
    wide = memory(SEVEN, layout(ranks=1, low_precision_weights=False, adapters=10_000_000))
    tables = 2 * 32000 * 4096
    assert wide.parameters == pytest.approx(4 * tables + 2 * (count - tables) + 4 * 10_000_000)
    sharded = memory(SEVEN, layout(ranks=8, stage=3, adapters=10_000_000))
    assert sharded.parameters == pytest.approx(2 * (count + 10_000_000) / 8)


def test_a_base_of_four_bits_fits_the_devices_that_it_is_made_for():
    def planned(model: str, gb: float):
        qlora = ["adapter=qlora", "precision=bf16", "batch.micro=1", "batch.length=512", "model.vocab_size=32000"]
        cfg = compose([f"model={model}", *qlora])
        shape = cfg.model.architecture(32000)
        return shape, cfg.layout(shape, 1, cuda=True, limit=gb * 1e9)

    (seven, on_24), (seventy, on_48) = planned("7b", 24), planned("70b", 48)
    # 64 weights in 32 bytes and one byte of their maximum, of which 256 share four bytes; the rest in bf16, adapters of rank
    # 16 (41,943,040) in float32.
    wide = 2 * 32000 * 4096 + 65 * 4096
    packed = 7_241_732_096 - wide
    assert memory(seven, on_24).parameters == pytest.approx(packed * (33 + 4 / 256) / 64 + 2 * wide + 4 * 41_943_040)
    # arXiv:2305.14314: 65 billion parameters on one GPU of 48 GB.
    assert memory(seven, on_24).total < 8e9
    assert memory(seven, dataclasses.replace(on_24, micro=4)).total < 24e9
    assert memory(seventy, on_48).total < 42e9
    rank_64 = dataclasses.replace(on_48, adapters=4 * on_48.adapters)
    assert memory(seventy, rank_64).total > 48e9  # with float32 states


def test_a_run_counts_the_residual_stream_in_the_format_that_a_gpu_keeps_it_in():
    # A token of a layer in bf16: two residuals and two norms' outputs of 4096, query and output of 4096, keys and
    # values of 1024, four tensors of 14336; the final norm's input.
    bf16 = compose(["precision=bf16", "batch.micro=1", "batch.length=2048"]).layout(SEVEN, 1, cuda=True)
    assert memory(SEVEN, bf16).activations == 2048 * (32 * 2 * (6 * 4096 + 2 * 1024 + 4 * 14336) + 2 * 4096)
    # Residuals are float32 in fp16, whose range is too small for them, and on CPU, where norms keep what they normalised.
    fp16 = compose(["precision=fp16", "batch.micro=1", "batch.length=2048"])
    wide = memory(SEVEN, fp16.layout(SEVEN, 1, cuda=True)).activations - memory(SEVEN, bf16).activations
    assert wide == 2048 * (32 * 2 + 1) * 2 * 4096
    on_cpu = memory(SEVEN, fp16.layout(SEVEN, 1, cuda=False)).activations - memory(SEVEN, bf16).activations
    assert on_cpu == wide + 2048 * (32 * 2 + 1) * 4 * 4096


def test_models_beside_the_policy_take_their_share():
    small = dataclasses.replace(SEVEN, layers=SEVEN.layers[:2])
    shape, count = layout(ranks=8, stage=3), parameters_of(small)
    alone, both = (
        memory(SEVEN, Layout(**{**vars(shape), "auxiliary": b})) for b in ((), ((small, False), (small, True)))
    )
    # A frozen bf16 model over 8 ranks; a trained one of 16 bytes a weight, and what its forward keeps.
    kept = alone.activations * count / parameters_of(SEVEN)
    assert both.others == pytest.approx(2 * count / 8 + 16 * count / 8 + kept)
    assert alone.others == 0
    assert both.total == pytest.approx(alone.total + both.others)
    # Under autocast over float32 weights the tables stay wide, and on every rank without ZeRO-3.
    wide = memory(SEVEN, layout(ranks=8, low_precision_weights=False, auxiliary=((small, False),)))
    assert wide.others == pytest.approx(4 * 2 * 32000 * 4096 + 2 * (count - 2 * 32000 * 4096))


@pytest.mark.parametrize(
    "changes",
    [
        {}, {"tie_word_embeddings": True}, {"qk_norm": True, "family": "qwen3"},
        {"attention_bias": True, "family": "qwen2"}, {"num_key_value_heads": 1},
    ],
)  # fmt: skip
def test_parameters_are_counted_as_the_model_has_them(changes):
    shape = architecture(**{
        "vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4,
           "num_key_value_heads": 2, "head_dim": 4, "tie_word_embeddings": False, **changes,
    })  # fmt: skip
    assert parameters_of(shape) == sum(p.numel() for p in Transformer(shape).parameters())


def test_what_does_not_fit_gets_the_nearest_configuration_that_does():
    big = layout(ranks=8, low_precision_weights=False, micro=8, length=4096)
    assert memory(SEVEN, big).total > 80e9
    said = advice(SEVEN, big, 80e9, [dataclasses.replace(big, stage=stage) for stage in (1, 2, 3)])
    # zero1 still holds 4 + 4 + 12 / 8 bytes a parameter (7.2e9 of them: 69 GB), casts of all (14 GB) and more.
    assert said == "use strategy=zero2 batch.micro=1 model.activation_checkpointing=full on 8 ranks"
    fitting = layout(ranks=8, low_precision_weights=False, micro=1, length=4096, stage=2, recompute=Recompute.full)
    assert memory(SEVEN, fitting).total <= 80e9
    assert advice(SEVEN, fitting, 80e9) == "it fits"


def test_advice_counts_every_strategy_in_its_own_storage():
    # DDP holds 7.24e9 float32 weights (16 bytes each: 116 GB); ZeRO-1 on 8 ranks bf16 ones (2 + 2 + 12 / 8: 40 GB).
    ddp = layout(ranks=8, low_precision_weights=False)
    assert advice(SEVEN, ddp, 80e9, [layout(ranks=8, stage=stage) for stage in (1, 2, 3)]).startswith(
        "use strategy=zero1 "
    )


def test_what_is_offloaded_is_counted_in_cpu_memory():
    count = parameters_of(SEVEN)
    assert host_memory(SEVEN, layout(ranks=8, stage=2)) == 0
    assert host_memory(SEVEN, layout(ranks=8, stage=2, offload="optimizer")) == pytest.approx(12 * count / 8)
    assert host_memory(SEVEN, layout(ranks=8, stage=3, offload="parameters")) == pytest.approx((12 + 2) * count / 8)


def test_time_is_operations_over_what_the_devices_do():
    small = architecture(
        vocab_size=100, hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=4,
    )  # fmt: skip
    # 6 * 1952 a token and 12 * 2 * 8 a pair (tests/unit/tracking/test_throughput.py), 1.5 pairs a token at length 2.
    one = seconds_per_step(small, layout(ranks=1, length=2), tokens=10, peak=1e6, utilisation=0.5)
    assert one == pytest.approx(10 * (6 * 1952 + 192 * 1.5) / 5e5)
    four = seconds_per_step(small, layout(ranks=4, length=2), tokens=10, peak=1e6, utilisation=0.5)
    assert four == pytest.approx(one / 4)


def test_the_verb_and_the_run_say_it_and_start_nothing(tmp_path):
    code, out, _ = onecurve(tmp_path, "estimate", "--ranks", "8", "experiment=7b", "strategy=ddp")
    assert code == 0
    assert "does not fit 80 GB: use strategy=zero1 " in out
    assert "steps:" in out
    assert set(PEAKS) | {"cpu"} == set(DEVICE_GB)
    code, out, _ = onecurve(tmp_path, "train", "estimate=true", "run_dir=run")
    assert code == 0
    assert "memory of a rank" in out
    assert not (tmp_path / "run").exists()


def test_what_is_left_to_the_memory_is_the_cheapest_recomputation_that_fits():
    seven = layout(ranks=8, stage=2, micro=4, length=4096)
    needs = {r: memory(SEVEN, dataclasses.replace(seven, recompute=r)).total for r in Recompute}
    assert needs[Recompute.none] > needs[Recompute.selective] > needs[Recompute.full]
    for recompute, need in needs.items():
        # A fifth of the device is left alone.
        assert fit(SEVEN, seven, need / 0.8 * 1.001).recompute is recompute
    assert fit(SEVEN, seven, 1.0).recompute is Recompute.full


def test_moments_in_8_bits_take_a_byte_and_a_sixty_fourth_but_not_those_of_the_tables():
    [wide, narrow] = (
        compose([f"optimizer.state={state}", "batch.micro=1", "batch.length=2048"]).layout(SEVEN, 1, cuda=True)
        for state in ("fp32", "8bit")
    )
    count, tables = parameters_of(SEVEN), 2 * 32000 * 4096
    assert memory(SEVEN, wide).optimizer == 8 * count
    assert memory(SEVEN, narrow).optimizer == 2 * (1 + 4 / 256) * (count - tables) + 8 * tables
    # Of adapters all.
    adapted = dataclasses.replace(narrow, adapters=10_000_000)
    assert memory(SEVEN, adapted).optimizer == 2 * (1 + 4 / 256) * 10_000_000
    # Masters stay float32 where ZeRO divides them.
    sharded = dataclasses.replace(narrow, stage=2, ranks=4)
    assert memory(SEVEN, sharded).optimizer == pytest.approx((4 * count + memory(SEVEN, narrow).optimizer) / 4)
