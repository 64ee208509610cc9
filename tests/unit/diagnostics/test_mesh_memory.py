"""Memory of a rank under a mesh, against numbers worked out by hand."""

import dataclasses

import pytest

from tests.shapes import architecture
from tests.unit.diagnostics.test_memory import SEVEN, layout
from trainer.diagnostics.activations import activations, loss
from trainer.diagnostics.layout import Layout, portions
from trainer.diagnostics.memory import memory
from trainer.models.architecture import Architecture
from trainer.models.recompute import Recompute
from trainer.models.sizes import Weights, parameters_of, weights_of

EXPERTS = architecture(
    vocab_size=151936, family="qwen3_moe", hidden_size=2048, intermediate_size=6144, num_hidden_layers=48,
    num_attention_heads=32, num_key_value_heads=4, head_dim=128, experts=128, experts_per_token=8, expert_size=768,
    tie_word_embeddings=False,
)  # fmt: skip
TABLE, NORMS = 32000 * 4096, 65 * 4096
KEYS = 32 * 2 * 4096 * 1024
MATRICES = 32 * (2 * 4096 * 4096 + 3 * 4096 * 14336)


def rows(ranks: int, **axes) -> Layout:
    """FSDP over so many ranks, in the formats of a GPU."""
    return layout(**{"stage": 3, "ranks": ranks, "float_rows": True, "stream": 2, "cuda": True, **axes})


def test_weights_are_sorted_by_what_divides_them():
    assert weights_of(SEVEN) == Weights(2 * TABLE, MATRICES, KEYS, 0, NORMS)
    tied = dataclasses.replace(SEVEN, tie_word_embeddings=True)
    assert weights_of(tied) == Weights(TABLE, MATRICES, KEYS, 0, NORMS)
    own = weights_of(EXPERTS)
    # 48 layers of 128 experts of three matrices; what is neither table nor matrix are norms (two a layer, one behind them,
    # two of 128 for queries and keys) and routers.
    assert own.experts == 48 * 128 * 3 * 2048 * 768
    assert own.rest == 48 * (2 * 2048 + 2 * 128 + 128 * 2048) + 2048
    assert sum(vars(own).values()) == parameters_of(EXPERTS) == 30_532_122_624


def test_tensor_ranks_have_a_block_of_every_matrix_and_all_norms():
    # One replica of 8: float32 rows of an eighth of each table and matrix; 8 key heads are one a rank.
    need = memory(SEVEN, rows(8, tensor=8))
    own = (2 * TABLE + MATRICES + KEYS) / 8 + NORMS
    assert (need.parameters, need.gradients, need.optimizer) == (4 * own, 4 * own, 8 * own)
    # On 16 ranks two share each key head, so none has less than an eighth of them.
    assert memory(SEVEN, rows(16, tensor=16)).parameters == 4 * ((2 * TABLE + MATRICES) / 16 + KEYS / 8 + NORMS)
    # Of 64 ranks eight have rows of each block.
    assert memory(SEVEN, rows(64, tensor=8)).parameters == pytest.approx(4 * own / 8)


def test_sequence_ranks_have_rows_of_the_same_weights():
    divided, alone = (memory(SEVEN, rows(8, sequence=s)) for s in (8, 1))
    assert divided.parameters == alone.parameters == 4 * parameters_of(SEVEN) / 8


def test_activations_that_tensor_ranks_divide_are_those_of_heads_and_widths():
    # A token of a layer in bf16: two residuals and two norms' outputs stay; queries, output, keys, values and four tensors
    # of the MLP are divided by 4. Behind all layers the norm's input.
    own = 32 * 2 * (4 * 4096 + (2 * 4096 + 2 * 1024 + 4 * 14336) / 4) + 2 * 4096
    assert activations(SEVEN, rows(4, tensor=4)) == 2048 * own
    # On 16 ranks a rank has one head of keys and of values, though a sixteenth would be half of one.
    own = 32 * 2 * (4 * 4096 + (2 * 4096 + 4 * 14336) / 16 + 2 * 128) + 2 * 4096
    assert activations(SEVEN, rows(16, tensor=16)) == 2048 * own


def test_activations_that_sequence_ranks_divide_are_all_but_shared_keys():
    # A quarter of the tokens; what attention gives is kept as attention's and as the output projection's.
    own = 32 * 2 * (4 * 4096 + 3 * 4096 + 2 * 1024 + 4 * 14336) + 2 * 4096
    assert activations(SEVEN, rows(4, sequence=4)) == 2048 / 4 * own
    # 16 ranks repeat 8 heads of keys to have one each.
    own += 32 * 2 * 2 * 1024
    assert activations(SEVEN, rows(16, sequence=16)) == 2048 / 16 * own


def test_the_loss_divides_the_vocabulary_over_sequence_and_tensor():
    # 64 tokens of 2000 of 32,000 words are few: most is there when the float32 gradient of a part of the table, and its cast
    # to bf16, become that of the rows which a tensor rank has; beside the gradient of hidden states, before and behind the
    # loss's own factor, and the states that were joined, in bf16.
    small = {"length": 64}
    own = (4 + 2) * TABLE / 16 + 2 * TABLE / 4 + 3 * 2 * 64 * 4096
    assert loss(SEVEN, rows(16, sequence=4, tensor=4, **small)) == pytest.approx(own)
    # Alone when the product of logits' gradients and states in bf16 is added to the float32 gradient.
    assert loss(SEVEN, rows(1, **small)) == pytest.approx((4 + 2) * TABLE + 2 * 64 * 32000 + 2 * 64 * 4096)


def test_the_loss_of_many_tokens_is_a_block_of_logits_beside_a_group_of_gradients():
    # 16,384 tokens of 32,000 words in bf16: 512 MiB of float32 logits and their softmax, and all gradients (under 1 GiB).
    states = 2 * 16384 * 4096
    assert loss(SEVEN, rows(1, length=16384)) == 2 * 2**29 + 2 * 16384 * 32000 + states
    # In float16 logits are float32 from the start; their gradients are 2 GiB, two groups, whose products add up.
    wide = rows(1, length=16384, wide_loss=True, low_precision_weights=False)
    assert loss(SEVEN, wide) == 2**29 + 2**30 + 4 * TABLE + states
    # A float32 table is cast to bf16, where the loss is in bf16.
    narrow = dataclasses.replace(wide, wide_loss=False)
    assert loss(SEVEN, narrow) == 2 * 2**29 + 2 * 16384 * 32000 + 2 * TABLE + states


def test_the_first_stage_keeps_as_many_micro_batches_as_there_are_stages():
    ahead, few = (rows(4, pipeline=4, micro_batches=m) for m in (16, 2))
    first, last = portions(SEVEN, ahead)
    assert (first.layers, last.layers, first.tables, last.tables) == (8, 8, TABLE, TABLE)
    assert first.elements == (MATRICES + KEYS + NORMS) / 4 + TABLE
    assert (ahead.in_flight, few.in_flight) == (4, 2)
    # Eight layers of four micro-batches are as much as all layers of one.
    assert memory(SEVEN, ahead).activations == activations(SEVEN, ahead)
    assert memory(SEVEN, few).activations == activations(SEVEN, few) / 2
    # With next to no activations and a large vocabulary the last stage needs more: it has the loss.
    large, short = dataclasses.replace(SEVEN, vocab_size=128256), dataclasses.replace(ahead, length=64, ranks=16)
    assert memory(large, short).loss == loss(large, short) > 0


def test_stages_of_unequal_size_are_planned_by_the_largest():
    # 32 layers on 5 ranks: 7 at most.
    first, _ = portions(SEVEN, rows(5, pipeline=5, micro_batches=5))
    assert first.layers == 7


def test_expert_ranks_hold_as_much_and_gather_less():
    alone, divided = (rows(8, expert=e) for e in (1, 8))
    needs = [memory(EXPERTS, spread) for spread in (alone, divided)]
    assert needs[0].parameters == needs[1].parameters == pytest.approx(4 * parameters_of(EXPERTS) / 8)
    # Alone most is there in a block's backward: two bf16 copies of a layer, its gradient in bf16, and that of the one behind
    # it in float32, beside the gathered tables and the gradient of one of them; what the layer had read is free.
    table, [portion] = 151936 * 2048, portions(EXPERTS, alone)
    backward = 2 * 2 * table + 2 * table + (2 * 2 + 2 + 4) * portion.block(alone) - activations(EXPERTS, alone) / 48
    assert needs[0].loss + needs[0].temporary == pytest.approx(backward)
    # An eighth of the experts are few beside the loss.
    assert needs[1].temporary == 2 * 2 * table


@pytest.mark.parametrize("axis", ["tensor", "sequence", "pipeline"])
def test_a_larger_replica_never_needs_more_of_a_rank(axis):
    spread = rows(64, recompute=Recompute.full, micro_batches=64, length=8192)
    needs = [memory(SEVEN, dataclasses.replace(spread, ranks=8 * size, **{axis: size})).total for size in (1, 2, 4, 8)]
    assert needs == sorted(needs, reverse=True)
    assert len(set(needs)) == 4


def test_a_twin_is_divided_as_its_model_is():
    twin: tuple[tuple[Architecture, bool], ...] = ((SEVEN, False),)
    # A frozen twin that FSDP gathers in bf16 is held in bf16.
    assert memory(SEVEN, rows(8, tensor=8, auxiliary=twin)).others == 2 * ((2 * TABLE + MATRICES + KEYS) / 8 + NORMS)
