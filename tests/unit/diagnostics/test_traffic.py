"""Bytes and seconds of what a step exchanges along each axis, against numbers worked out by hand."""

import dataclasses

import pytest

from tests.unit.diagnostics.test_memory import SEVEN, layout
from tests.unit.diagnostics.test_mesh_memory import EXPERTS, KEYS, MATRICES, NORMS, TABLE, rows
from trainer.diagnostics.layout import Portion
from trainer.diagnostics.links import NVLINK, Exchange, Group, Links
from trainer.diagnostics.step_time import exposed_seconds, seconds_per_step, step_time
from trainer.diagnostics.traffic import exchanges, groups, weight_exchanges
from trainer.models.recompute import Recompute
from trainer.tracking.throughput import PEAKS

LINKS = Links(per_node=4, within=100.0, between=10.0, reached=0.5, hop=1.0, step=0.1)
SIXTEEN = Group(16, 4)


def of(axis: str, spread, shape=SEVEN, per_node: int = 8) -> dict[str, Exchange]:
    """The exchanges of an axis by what they exchange (and, of weights, when)."""
    every = [e for e in exchanges(shape, spread, per_node) if e.axis == axis]
    return {f"{e.what} {e.during}".strip(): e for e in every}


def test_a_ring_sends_what_the_lower_bound_says():
    # 4 ranks, 1000 bytes: 3/4 of them in a reduce-scatter or an all-gather, twice that in an all-reduce, in each of 3 times.
    sent = {kind: Exchange("data", kind, "", 1000, 3, 1, Group(4, 4)).sent for kind in ("all_gather", "all_reduce")}
    assert sent == {"all_gather": 2250, "all_reduce": 4500}
    # All of a message to one other rank; of one to all, what is not the rank's own.
    assert Exchange("pipeline", "send", "", 1000, 3, 1, Group(4, 4)).sent == 3000
    assert Exchange("sequence", "all_to_all", "", 1000, 3, 1, Group(4, 4)).sent == 2250


def test_links_between_nodes_limit_a_ring_together():
    assert LINKS.speed(Group(4, 4)) == 50  # inside a node: 100 x 0.5
    assert LINKS.speed(Group(8, 4)) == 20  # four cards of 10 together, less than 100; x 0.5
    assert LINKS.speed(Group(8, 1)) == 5


def test_a_ring_waits_for_every_rank_and_a_tree_for_its_height():
    # 16 ranks on 4 nodes: 12 steps of 0.1 and 4 hops of 1; up and down a tree of height 2 with 3 steps inside the node.
    assert LINKS.latency(SIXTEEN, "all_gather") == pytest.approx(12 * 0.1 + 4 * 1.0)
    assert LINKS.latency(SIXTEEN, "all_reduce") == pytest.approx(2 * (2 * 1.0 + 3 * 0.1))
    gather = Exchange("data", "all_gather", "", 1600, 2, 3, SIXTEEN)
    assert gather.seconds(LINKS) == pytest.approx(2 * 1500 / 20 + 6 * 5.2)


def test_what_goes_to_other_nodes_passes_a_ranks_own_card():
    # 12 of 16 sixteenths of 1600 bytes at 10 x 0.5 a second, longer than 3 of them at 100 x 0.5; and a hop.
    swap = Exchange("sequence", "all_to_all", "", 1600, 1, 1, SIXTEEN)
    assert swap.seconds(LINKS) == pytest.approx(1200 / 5 + 1)
    assert Exchange("sequence", "all_to_all", "", 400, 1, 1, Group(4, 4)).seconds(LINKS) == pytest.approx(
        300 / 50 + 0.1
    )
    assert Exchange("pipeline", "send", "", 100, 1, 1, Group(4, 1)).seconds(LINKS) == pytest.approx(100 / 5 + 1)


def test_ranks_of_an_axis_are_as_near_as_their_numbers():
    # 256 ranks on nodes of 8 as data 8 x pipeline 4 x sequence 4 x tensor 2: a node has one sequence group of tensor pairs.
    who = groups(rows(256, tensor=2, sequence=4, pipeline=4), 8)
    assert (who["tensor"], who["sequence"], who["pipeline"]) == (Group(2, 2), Group(4, 4), Group(4, 1))
    assert who["data"] == Group(32, 4)
    # Data alone fills nodes; experts are neighbours among its ranks.
    who = groups(rows(64, expert=16), 8)
    assert (who["data"], who["expert"], who["expert data"]) == (Group(64, 8), Group(16, 8), Group(4, 1))
    assert groups(rows(64, tensor=8), 8)["data"] == Group(8, 1)
    # Two replicas of two stages of two ranks are on a node.
    assert groups(rows(64, tensor=2, pipeline=2), 8)["data"] == Group(16, 2)


@pytest.mark.parametrize(
    ("stage", "low", "expected"),
    [
        # 10^9 elements, 4 micro-batches, 8 ranks: 7/8 of the bytes, twice for an all-reduce.
        (0, False, 7 / 8 * 2 * 4e9),
        (1, True, 7 / 8 * (2 * 2e9 + 2e9)),
        (2, True, 7 / 8 * (4 * 2 * 2e9 + 2e9)),
        (3, True, 7 / 8 * (4 * 2e9 + 2 * 4 * 2e9)),
        (3, False, 7 / 8 * (4 * 4e9 + 2 * 4 * 4e9)),
    ],
)
def test_gradients_meet_once_a_step_up_to_stage_1_and_once_a_micro_batch_from_stage_2_on(stage, low, expected):
    spread = layout(stage=stage, low_precision_weights=low, ranks=8, micro_batches=4)
    every = weight_exchanges(Portion(1e9, 0, 0, 24), 1e9, spread, groups(spread, 8))
    assert sum(e.sent for e in every) == pytest.approx(expected)


def test_a_small_model_is_gathered_once_a_step_and_frozen_weights_are_gathered_too():
    spread = layout(stage=3, ranks=8, micro_batches=4)
    every = weight_exchanges(Portion(5e7, 0, 0, 12), 1e6, spread, groups(spread, 8))
    assert [(e.bytes, e.times) for e in every if e.kind == "all_gather"] == [(1e8, 1)]


def test_fsdp_gathers_blocks_twice_and_adds_up_in_float32():
    # bf16 weights, float32 gradients, 4 micro-batches.
    data = of("data", rows(64, micro_batches=4))
    blocks = MATRICES + KEYS + NORMS
    assert {(name, e.kind, e.bytes, e.times) for name, e in data.items()} == {
        ("weights forward", "all_gather", 2 * blocks, 4), ("weights backward", "all_gather", 2 * blocks, 4),
        ("gradients of weights backward", "reduce_scatter", 4 * blocks, 4),
        ("tables forward", "all_gather", 2 * 2 * TABLE, 4),
        ("gradients of tables backward", "reduce_scatter", 4 * 2 * TABLE, 4),
    }  # fmt: skip
    once = of("data", rows(64, micro_batches=4, reshard=False))
    assert {(name, e.times) for name, e in once.items()} == {
        ("weights forward", 1), ("gradients of weights backward", 1), ("tables forward", 1),
        ("gradients of tables backward", 1),
    }  # fmt: skip


def test_tensor_ranks_add_up_the_residual_stream_four_times_a_block():
    # 2048 tokens of 4096 bf16 elements, 32 blocks, 3 micro-batches: two in the forward, two in the backward.
    tensor = of("tensor", rows(8, tensor=8, micro_batches=3))
    states = 2048 * 4096 * 2
    assert {(name, e.kind, e.bytes, e.times) for name, e in tensor.items()} == {
        ("states", "all_reduce", states, 3 * 32 * 4), ("embeddings", "all_reduce", states, 3),
        ("the loss's gradient", "all_reduce", states, 3),
    }  # fmt: skip
    again = of("tensor", rows(8, tensor=8, recompute=Recompute.full))
    assert again["states"].times == 32 * 5
    # Weights meet on one rank of each block: nothing is exchanged between equal ones.
    assert of("data", rows(8, tensor=8)) == {}


def test_sequence_ranks_swap_queries_keys_values_and_what_attention_gives():
    # A quarter of 2048 tokens: two widths of 4096 and two of 1024 in bf16, forward and backward; whole states for the head.
    sequence = of("sequence", rows(4, sequence=4))
    assert {(name, e.kind, e.bytes, e.times) for name, e in sequence.items()} == {
        ("heads for tokens", "all_to_all", 512 * (2 * 4096 + 2 * 1024) * 2, 64),
        ("hidden states", "all_gather", 2048 * 4096 * 2, 1), ("their gradient", "reduce_scatter", 2048 * 4096 * 2, 1),
    }  # fmt: skip


def test_expert_ranks_send_every_choice_of_a_token_there_and_back():
    # 2048 tokens of 8 choices of 2048 bf16 elements; there and back in 48 layers, forward and backward.
    expert = of("expert", rows(8, expert=8), EXPERTS)
    assert [(e.bytes, e.times) for e in expert.values()] == [(2048 * 8 * 2048 * 2, 48 * 4)]
    gathered = of("data", rows(8, expert=8), EXPERTS)
    # Eight ranks hold eight different eighths of the experts: no two have the same.
    assert not any("experts" in name for name in gathered)
    assert of("data", rows(16, expert=8), EXPERTS)["experts forward"].bytes == 2 * 48 * 128 * 3 * 2048 * 768 / 8


def test_stages_send_states_on_and_gradients_back():
    pipeline = of("pipeline", rows(4, pipeline=4, micro_batches=8))
    assert [(e.bytes, e.times) for e in pipeline.values()] == [(2048 * 4096 * 2, 16)]


def test_the_bubble_is_a_micro_batch_for_every_further_stage():
    spread = rows(4, pipeline=4, micro_batches=8)
    fast = Links(within=1e18, between=1e18, hop=0.0, step=0.0)
    took = step_time(SEVEN, spread, peak=1e15, utilisation=0.5, links=fast)
    assert took.bubble == pytest.approx(took.compute * 3 / 8)
    # The last stage has the head beside a quarter of the layers: 6 operations for each of 131 million weights and tokens.
    alone = rows(1, micro_batches=8)
    tokens, head = 8 * 2048, 6 * TABLE * 8 * 2048 / (1e15 * 0.5)
    one = seconds_per_step(SEVEN, alone, tokens, 1e15, 0.5)
    assert took.compute == pytest.approx((one - head) / 4 + head)


def test_computing_hides_what_is_exchanged_meanwhile():
    # A micro-batch of 30 s: 10 forward, 20 backward. Gathers of 12 s wait for 2, reductions of 15 s for none, in each of 4.
    link = Links(per_node=2, within=1.0, between=1.0, reached=1.0, hop=0.0, step=0.0)

    def each(kind: str, seconds: float, during: str) -> Exchange:
        return Exchange("data", kind, "", 2 * seconds, 4, 1, Group(2, 2), during)

    every = [each("all_gather", 12, "forward"), each("reduce_scatter", 15, "backward")]
    assert exposed_seconds(every, 30, 1.0, link) == {"data": pytest.approx(4 * 2)}
    # With 10 s more in the backward 5 wait there, too; what happens while nothing is computed waits whole.
    every += [each("all_gather", 10, "backward"), each("all_gather", 3, "")]
    assert exposed_seconds(every, 30, 1.0, link) == {"data": pytest.approx(4 * (2 + 5 + 3))}


@pytest.mark.parametrize("axis", ["tensor", "sequence"])
def test_an_axis_inside_a_node_is_faster_than_across_nodes(axis):
    spread = dataclasses.replace(rows(64, micro_batches=4), **{axis: 8})
    near, far = (
        step_time(SEVEN, spread, peak=1e15, utilisation=0.5, links=Links(per_node=n)).exposed[axis] for n in (8, 2)
    )
    assert far > 2 * near


def test_links_are_known_of_devices_with_links_of_their_own():
    assert set(NVLINK) < set(PEAKS)
    h100 = Links.of_device("H100", 8)
    assert (h100.within, h100.between) == (450e9, 50e9)
    assert Links.of_device("L4", 4).within == 32e9
