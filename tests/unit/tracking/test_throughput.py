"""Counts of operations, derived by hand."""

import time

import pytest
import torch

from tests.shapes import architecture
from trainer.parallel.distributed import World
from trainer.tracking.throughput import PRODUCT, Speed, Stopwatch, Timing, known_peaks, measured_flops, training_flops

A = architecture(
    vocab_size=100, hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, head_dim=4,
)  # fmt: skip


def test_operations_are_six_a_weight_and_twelve_a_head_width_and_pair():
    # A block: q 8x8, k and v 8x4 each, o 8x8, MLP 3 x 8x16 = 64 + 64 + 64 + 384 = 576. Two blocks and 100 x 8: 1952.
    assert training_flops(A, tokens=1, pairs=0) == 6 * 1952
    # Two layers, two heads of 4.
    assert training_flops(A, tokens=0, pairs=1) == 12 * 2 * 8


def test_of_experts_those_count_that_a_token_goes_to():
    # Attention as above, 192; two of four experts, 2 x 384; the router 4 x 8.
    mixed = architecture(
        vocab_size=100, family="mixtral", hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=4, experts=4,
    )  # fmt: skip
    assert training_flops(mixed, tokens=1, pairs=0) == 6 * (2 * (192 + 768 + 32) + 800)


def test_the_model_has_the_weights_that_are_counted():
    from trainer.models.transformer import Transformer

    matrices = [p for n, p in Transformer(A).named_parameters() if p.ndim == 2 and "embed" not in n]
    tied = A.tie_word_embeddings * 100 * 8
    assert sum(p.numel() for p in matrices) + tied == 1952


def test_a_report_is_what_was_learnt_since_the_last_one():
    world = World(0, 2, 0, torch.device("cpu"))
    speed = Speed(Stopwatch(world.device), A, world, torch.float32, tokens=100.0)
    speed.peak = 1e7
    first = speed.figures(300.0, Timing(2.0, {"data": 0.5}, attention_pairs=50, memory_gb=1.0))
    assert first["tokens_per_second"] == 100
    assert first["mfu"] == pytest.approx((6 * 1952 * 200 + 12 * 16 * 50 * 2) / 2 / 1e7)
    assert first["time/data"] == 0.5
    assert speed.figures(360.0, Timing(1.0, {}, 0, 1.0))["tokens_per_second"] == 60
    # 6 * 1952 * 1000 operations in a second are more than the 1e7 that were measured: then that is what is possible.
    assert speed.figures(1360.0, Timing(1.0, {}, 0, 1.0))["mfu"] == 1
    assert speed.figures(1860.0, Timing(1.0, {}, 0, 1.0))["mfu"] == 0.5


def test_evaluations_and_checkpoints_do_not_slow_the_rate_down():
    world = World(0, 1, 0, torch.device("cpu"))
    watch = Stopwatch(world.device)
    speed = Speed(watch, A, world, torch.float32, tokens=0.0)
    with watch.lap("evaluation"):
        time.sleep(0.2)
    with watch.lap("forward_backward"):
        time.sleep(0.05)
    timing = speed.lap()
    assert timing.laps["evaluation"] >= 0.2
    assert 0.05 <= timing.seconds < 0.2
    assert "evaluation" not in speed.lap().laps


def test_the_peak_of_a_device_without_a_table_is_measured():
    assert 1e8 < measured_flops(torch.device("cpu"), torch.float32, size=256, seconds=0.02) < 1e15


@pytest.mark.parametrize(
    ("name", "bf16"),
    [
        ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA H100 NVL", 835), ("NVIDIA H200", 989),
        ("NVIDIA H200 NVL", 835), ("NVIDIA GH200 480GB", 989), ("NVIDIA B200", 2250), ("NVIDIA GB200", 2500),
        ("NVIDIA A100-SXM4-80GB", 312), ("NVIDIA A100-PCIE-40GB", 312), ("NVIDIA A10", 125), ("NVIDIA A10G", 70),
        ("NVIDIA L4", 121), ("NVIDIA L40", 181), ("NVIDIA L40S", 362), ("Tesla V100-SXM2-16GB", 125), ("Tesla T4", 65),
        ("NVIDIA GeForce RTX 4090", 165), ("AMD Instinct MI300X", 1307),
    ],
)  # fmt: skip
def test_a_device_has_its_own_peak_and_not_that_of_a_namesake(name, bf16):
    peaks = known_peaks(name)
    assert peaks is not None
    assert peaks[0] == bf16


@pytest.mark.parametrize(
    "name", ["NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "NVIDIA Z9"]
)
def test_the_peak_of_a_variant_that_is_not_listed_is_measured(name):
    assert known_peaks(name) is None


def test_the_product_that_measures_a_gpu_takes_far_longer_than_its_launch():
    # At 2,500 TFLOP/s, the fastest of the table, against the 10 microseconds or so of a launch and a synchronisation.
    assert 2 * PRODUCT["cuda"] ** 3 / 2500e12 > 40 * 10e-6
