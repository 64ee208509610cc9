"""Along the axes of a mesh: the memory that a step takes on a GPU, and what experts and stages ask of it."""

import pytest

from tests.cuda.test_steps import counts_of

pytestmark = pytest.mark.slow
MEMORY = [
    "large ddp fp16", "large fsdp", "large fsdp fp16", "large zero2", "large zero3", "tensor", "tensor full", "sequence",
    "expert",
]  # fmt: skip
# They only go down.
EXPERTS = {"experts by expert": 824, "experts by tensor": 1004}
"""Launches of a step of two micro-batches of two layers, without those of the exchanges."""
STAGES = {"first": 347, "last": 472}


@pytest.fixture(scope="module")
def asked() -> dict:
    """Everything that `mesh_steps.py` counts."""
    return counts_of("tests.cuda.mesh_steps")


@pytest.mark.parametrize("step", MEMORY)
def test_the_estimate_of_an_axis_is_within_a_tenth_of_what_lives_there(asked, step):
    counts = asked["memory"][step]
    assert counts["estimate"] == pytest.approx(counts["used"], rel=0.1)


def test_the_estimate_of_a_pipeline_is_that_of_the_stage_that_needs_most(asked):
    first, last = (asked["stages' memory"][stage] for stage in ("first", "last"))
    assert first["estimate"] == last["estimate"]
    assert first["estimate"] == pytest.approx(max(first["used"], last["used"]), rel=0.1)


@pytest.mark.parametrize("divided", EXPERTS)
def test_divided_experts_wait_once_a_layer_and_micro_batch(asked, divided):
    # Two layers of two micro-batches ask how many rows are a rank's, or go to and come from each: four numbers, which a
    # tensor without memory is asked for one by one.
    counts = asked["asked"][divided]
    numbers = {"experts by expert": 4, "experts by tensor": 1}
    assert sum(counts["stalls"].values()) == 4 * numbers[divided], counts["stalls"]
    assert all("models/experts.py" in what for what in counts["stalls"])
    assert counts["unpinned"] == counts["mixed"] == {}
    assert counts["launches"] <= EXPERTS[divided], counts["by_line"]


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_waits_for_nothing_and_launches_no_more_than_before(asked, stage):
    counts = asked["stages"][stage]
    assert counts["stalls"] == counts["unpinned"] == counts["mixed"] == {}
    assert counts["launches"] <= STAGES[stage], counts["by_line"]
