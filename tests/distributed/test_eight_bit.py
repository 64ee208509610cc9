"""Moments in 8 bits under every strategy: the same bits after a restore into the same blocks, a bound in others."""

from pathlib import Path

import numpy as np
import pytest

from tests.ranks import on_ranks
from tests.small_run import Run, same
from trainer.optim.eight_bit import BLOCK, BOUND

pytest.importorskip("bitsandbytes")

STRATEGIES = ("ddp", "zero1", "zero2", "zero3", "fsdp")
WIDTH = 65
"""Of a hidden matrix of 4225 elements, which two ranks cut inside a block."""


def run_in(folder: str, strategy: str, optimizer: str = "adamw8bit", **config) -> Run:
    return Run(Path(folder), strategy=strategy, optimizer=optimizer, width=WIDTH, keep=0, **config)


def saved(folder: str) -> dict:
    """By strategy, and of float32 moments: the state after 3 steps, saved while training went on, and that after 8."""
    states = {}
    for name, strategy, optimizer in [(s, s, "adamw8bit") for s in STRATEGIES] + [("fp32", "zero2", "adamw")]:
        run = run_in(f"{folder}/{name}", strategy, optimizer, asynchronous=True)
        run.steps(1, 3)
        run.checkpointer.save(3)
        states[name] = [run.state()]
        run.steps(4, 8)
        states[name].append(run.state())
        run.checkpointer.close()
    return states


def restored(folder: str, pairs: list) -> dict:
    """Of each (what was saved, strategy, optimizer): the state as it was restored, and that after 8 steps."""
    states = {}
    for name, strategy, optimizer in pairs:
        run = run_in(f"{folder}/{name}", strategy, optimizer, seed=9)
        assert run.checkpointer.restore() == 3
        states[name, strategy, optimizer] = [run.state()]
        run.steps(4, 8)
        states[name, strategy, optimizer].append(run.state())
    return states


PAIRS = [(source, target, "adamw8bit") for source in (*STRATEGIES, "fp32") for target in STRATEGIES]
WIDE = [
    (source, target, "adamw")
    for source, target in zip(STRATEGIES, ("zero3", "ddp", "zero1", "fsdp", "zero2"), strict=True)
]


@pytest.fixture(scope="module")
def before(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("eight"))
    return folder, on_ranks(2, saved, folder)[0]


@pytest.fixture(scope="module")
def after(before):
    return on_ranks(2, restored, before[0], [*PAIRS, *WIDE])[0]


@pytest.fixture(scope="module")
def alone(before):
    return on_ranks(1, restored, before[0], [(source, "ddp", "adamw8bit") for source in STRATEGIES])[0]


def within_the_bound(mine: dict, theirs: dict) -> bool:
    """Whether all is equal but moments, and those are off by no more than the bound of any block that they may be in."""
    for name in mine:
        if "/exp_avg" not in name:
            assert np.array_equal(mine[name], theirs[name]), name
            continue
        sizes = np.pad(np.abs(theirs[name]), BLOCK - 1)
        most = np.lib.stride_tricks.sliding_window_view(sizes, 2 * BLOCK - 1).max(1)
        assert (np.abs(mine[name] - theirs[name]) <= BOUND * most).all(), name
    return mine.keys() == theirs.keys()


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_saved_beside_training_and_continued_it_is_bitwise_the_uninterrupted_run(strategy, before, after):
    first, last = before[1][strategy]
    assert not same(first, last)
    assert same(after[strategy, strategy, "adamw8bit"][0], first)
    assert same(after[strategy, strategy, "adamw8bit"][1], last)


@pytest.mark.parametrize("target", STRATEGIES)
@pytest.mark.parametrize("source", [*STRATEGIES, "fp32"])
def test_every_strategy_restores_what_another_saved_within_the_bound(source, target, before, after):
    state = before[1][source][0]
    assert within_the_bound(after[source, target, "adamw8bit"][0], state)
    # DDP has a block of the matrix begin where ZeRO's second rank has none: something was rounded.
    exact = source == target or {source, target} == {"zero1", "zero2"}
    assert same(after[source, target, "adamw8bit"][0], state) == exact


@pytest.mark.parametrize("pair", WIDE)
def test_moments_in_float32_take_what_8_bits_saved_as_it_is(pair, before, after):
    assert same(after[pair][0], before[1][pair[0]][0])


@pytest.mark.parametrize("source", STRATEGIES)
def test_one_rank_restores_what_two_saved(source, before, alone):
    state = before[1][source][0]
    assert within_the_bound(alone[source, "ddp", "adamw8bit"][0], state)
    assert same(alone[source, "ddp", "adamw8bit"][0], state) == (source == "ddp")
