"""Beside the pipelines' steps: what a decoded token and a step in shards ask of a GPU, and the memory that a step takes."""

import pytest

from tests.cuda.test_steps import counts_of

# They only go down.
DECODING = {"greedy": 125, "sampled": 157, "filtered": 179}
"""Launches of a decode step of two layers, which a graph makes one."""
SHARDED = {
    "zero1_bf16": 565, "zero1_fp16": 636, "zero2_bf16": 608, "zero2_fp16": 658, "zero3_bf16": 655, "zero3_fp16": 729,
    "fsdp_bf16": 544, "fsdp_fp16": 620, "fsdp_whole": 540, "fsdp_twin": 960, "fsdp_lora": 769,
    "fsdp_tensor": 784, "fsdp_sequence": 666,
}  # fmt: skip
"""Launches of a step of two micro-batches of two layers on one of two ranks, without those of the exchanges."""
# The gather of small parameters after a step.
WAITS = {"zero1": 0, "zero2": 0, "zero3": 1, "fsdp": 0}


@pytest.fixture(scope="module")
def asked() -> dict:
    """Everything that `other_steps.py` counts."""
    return counts_of("tests.cuda.other_steps")


@pytest.mark.parametrize("sampling", DECODING)
def test_a_decoded_token_is_one_graph_and_waits_once(asked, sampling):
    counts = asked["decoded"][sampling]
    assert counts["graph"]["stalls"] == counts["graph"]["copies"] == counts["graph"]["mixed"] == {}
    assert counts["graph"]["launches"] <= DECODING[sampling], counts["graph"]["by_line"]
    # The ids come to the host.
    assert (counts["launches"], counts["stalls"]) == (0, 1)


@pytest.mark.parametrize("sharded", SHARDED)
def test_a_sharded_step_waits_at_most_once_and_launches_no_more_than_before(asked, sharded):
    counts = asked["sharded"][sharded]
    assert sum(counts["stalls"].values()) <= WAITS[sharded.partition("_")[0]], counts["stalls"]
    assert counts["unpinned"] == counts["mixed"] == {}
    assert counts["launches"] <= SHARDED[sharded], counts["by_line"]


def test_rows_in_host_memory_meet_no_tensor_of_the_device_but_in_copies(asked):
    counts = asked["offloaded"]
    assert counts["unpinned"] == counts["mixed"] == {}
    # Gradients come to the host, and whether and how they are applied; the step is taken there.
    assert all("copy to cpu" in what or what.startswith("a stream or event") for what in counts["stalls"])


MEMORY = ["none", "selective", "full", "fp16", "qk_norm", "fsdp", "fsdp_full", "fsdp_whole", "fsdp_autocast"]


@pytest.mark.parametrize("step", MEMORY)
def test_the_estimate_for_cuda_is_within_a_tenth_of_what_lives_there(asked, step):
    counts = asked["memory"][step]
    assert counts["estimate"] == pytest.approx(counts["used"], rel=0.1)
