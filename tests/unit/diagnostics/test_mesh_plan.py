"""Which layout a plan takes of several, and what it says of the others."""

import dataclasses

import pytest

from tests.unit.diagnostics.test_memory import SEVEN, layout
from tests.unit.diagnostics.test_mesh_memory import rows
from trainer.diagnostics.layout import Layout
from trainer.diagnostics.links import Links
from trainer.diagnostics.memory import memory
from trainer.diagnostics.mesh_plan import Choice, Cluster, account, best_of, choices, shown, table, utilisation, why_not
from trainer.diagnostics.step_time import StepTime
from trainer.models.recompute import Recompute

EIGHT = Cluster(1, "H100", 1e15, 0.5, 80e9, Links())
EVERY = list(Recompute)


def choice(spread: Layout, seconds: float, again: Recompute = Recompute.none, **exposed: float) -> Choice:
    return Choice("strategy=fsdp", dataclasses.replace(spread, recompute=again), 1e9, StepTime(seconds, exposed, 0.0))


def test_a_mesh_takes_the_least_recomputation_that_fits_four_fifths():
    spread = rows(8, length=4096, micro_batches=16)
    needs = {again: memory(SEVEN, dataclasses.replace(spread, recompute=again)).total for again in EVERY}
    for again, need in needs.items():
        limited = dataclasses.replace(EIGHT, limit=need / 0.8 + 1)
        [best], larger = choices(SEVEN, [("strategy=fsdp", spread)], limited, EVERY)
        assert (best.layout.recompute, best.memory, larger) == (again, need, [])
    fitting, [nearest] = choices(SEVEN, [("strategy=fsdp", spread)], dataclasses.replace(EIGHT, limit=1e9), EVERY)
    assert fitting == []
    assert (nearest.layout.recompute, nearest.memory) == (Recompute.full, needs[Recompute.full])


def test_of_one_mesh_the_fastest_rows_are_taken_and_of_as_fast_ones_most():
    # Eight ranks hide what FSDP exchanges behind either; under ZeRO-2, which reduces with every micro-batch, more rows
    # exchange less.
    for strategy in (rows(8, length=1024), layout(stage=2, ranks=8, length=1024)):
        few = dataclasses.replace(strategy, micro_batches=64)
        more = dataclasses.replace(strategy, micro=4, micro_batches=16)
        [best], _ = choices(SEVEN, [("strategy=x", few), ("strategy=x", more)], EIGHT, EVERY)
        assert best.layout.micro == 4


def test_an_axis_more_must_save_three_hundredths_of_a_step():
    plain, divided = rows(8), rows(8, tensor=2)
    assert best_of([choice(divided, 10.0), choice(plain, 10.3)]).layout.tensor == 1
    assert best_of([choice(divided, 10.0), choice(plain, 10.4)]).layout.tensor == 2
    # With as many axes the smaller replica, then what computes less again.
    assert best_of([choice(rows(8, tensor=4), 10.0), choice(divided, 10.2)]).layout.tensor == 2
    full = choice(plain, 10.0, Recompute.full)
    assert best_of([full, choice(plain, 10.2)]).layout.recompute is Recompute.none


@pytest.mark.parametrize(
    ("other", "sentence"),
    [
        (choice(rows(8, tensor=2), 10.0, tensor=2.0), "+20%: 2.00 s more for exchanges of tensor"),
        (choice(rows(8), 13.0, Recompute.full), "+30%: 3.00 s more for computing again (full)"),
        (choice(rows(8, pipeline=2), 12.0), "+20%: 2.00 s more for a slowest stage"),
        (choice(rows(8, tensor=2), 10.1), "as fast (+1.0%), with more axes"),
        (choice(rows(8), 10.0, Recompute.full), "as fast (+0.0%), and more is computed again"),
        (Choice("strategy=ddp", rows(8), 135e9, StepTime(0.0, {}, 0.0)), "needs 135 GB of 64"),
    ],
)
def test_what_loses_says_why(other, sentence):
    assert why_not(other, choice(rows(8), 10.0), EIGHT) == sentence


def test_a_table_has_the_best_first_and_what_has_no_axis_last():
    fitting = [choice(rows(64, tensor=t, sequence=s), 10.0 + 2 * t) for t in (2, 4, 8) for s in (1, 2, 4)]
    alone = Choice("strategy=fsdp", rows(64), 90e9, StepTime(0.0, {}, 0.0))
    lines = shown(fitting, [alone], fitting[1])
    assert lines == [fitting[1], fitting[0], *fitting[2:6], alone]
    cells = [line.split(" | ") for line in table(SEVEN, lines, fitting[1], EIGHT)]
    assert (cells[2][1:6], cells[2][-1]) == (["2", "2", "1", "1", "16"], "best |")
    assert cells[-1][-4:] == ["90 GB", "-", "-", "needs 90 GB of 64 |"]


def test_the_overrides_of_a_choice_are_those_of_the_command_line():
    spread = rows(64, tensor=4, pipeline=2, micro=2)
    assert choice(spread, 1.0, Recompute.full).overrides == (
        "strategy=fsdp strategy.tensor=4 strategy.pipeline=2 batch.micro=2 model.activation_checkpointing=full"
    )


def test_utilisation_counts_a_models_own_operations():
    # Nothing is exposed on one rank: half of the peak, of which recomputation takes a quarter.
    alone = dataclasses.replace(EIGHT, links=Links(per_node=1), limit=1e12)
    [best], _ = choices(SEVEN, [("strategy=fsdp", rows(1))], alone, [Recompute.full])
    assert utilisation(SEVEN, best, alone) == pytest.approx(0.5 * 3 / 4)


def test_an_account_adds_up_what_a_rank_sends_by_axis():
    # 3/4 of an all-gather's bytes: two of 2048 tokens' states, and 512 tokens' queries, keys, values and outputs 64 times.
    spread = rows(4, sequence=4)
    sent = 3 / 4 * (2 * 2048 * 4096 * 2 + 64 * 512 * (2 * 4096 + 2 * 1024) * 2)
    first, second = account(SEVEN, choice(spread, 2.0, sequence=0.5, data=0.001), EIGHT)
    assert first == "a step: computing 2.00 s, sequence 0.50 s (exchanges: what computing does not hide)"
    assert f"{sent / 1e9:.1f} GB (sequence)" in second
