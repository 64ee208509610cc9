"""Which rank the others wait for: named when it lasts, once, and not for single slow steps."""

import logging
import time

import pytest
import torch

from trainer.diagnostics.stragglers import WINDOW, OwnTime, Straggler, spread


def step(slowest: int, slowness: float) -> dict[str, float]:
    return {"straggler/rank": float(slowest), "straggler/slowness": slowness, "straggler/waiting": slowness - 1}


def test_what_ranks_wait_for_is_the_slowest_less_the_middle_one():
    found = spread(torch.tensor([1.0, 1.5, 4.0, 2.0, 1.0], dtype=torch.float64))
    assert {name: float(value) for name, value in found.items()} == {
        "straggler/waiting": 2.5, "straggler/rank": 2.0, "straggler/slowness": pytest.approx(4 / 1.5),
    }  # fmt: skip
    # The faster one of two waits for the other.
    assert float(spread(torch.tensor([3.0, 1.0]))["straggler/waiting"]) == 2.0
    assert spread(torch.tensor([3.0])) == {}


def test_a_rank_that_stays_slow_is_named_once_with_its_host_and_again_when_it_is_over(caplog):
    caplog.set_level(logging.WARNING)
    straggler = Straggler({0: "a", 1: "a", 2: "node7", 3: "node7"})
    said = [straggler.observe(n, step(2, 1.8)) for n in range(1, 3 * WINDOW)]
    [warning] = filter(None, said)
    assert said.index(warning) == WINDOW - 1
    assert "the others wait for rank 2 on node7: 1.8 times" in warning
    assert warning in caplog.text
    said = [straggler.observe(n, step(n % 4, 1.05)) for n in range(3 * WINDOW, 6 * WINDOW)]
    [over] = filter(None, said)
    assert over.endswith("rank 2 is as fast as the others again")


@pytest.mark.parametrize("steps", [
    [step(n % 4, 3.0) for n in range(100)],  # somebody is always slow, but never the same
    [step(1, 1.1) for _ in range(100)],  # always the same, but hardly slower
    [step(1, 50.0) if n % 5 == 0 else step(n % 4, 1.0) for n in range(100)],  # single slow steps
])  # fmt: skip
def test_ranks_that_take_turns_or_are_hardly_slower_are_not_named(steps):
    straggler = Straggler({})
    assert [straggler.observe(n, values) for n, values in enumerate(steps)] == [None] * 100


def test_own_time_is_what_happened_inside_less_what_was_waited():
    own = OwnTime(torch.device("cpu"))
    with own.host():
        time.sleep(0.03)
    time.sleep(0.05)
    with own.forward():
        time.sleep(0.03)
    seconds = own.take()
    assert seconds >= 0.06
    with own.forward():
        time.sleep(0.03)
    assert own.take(waited=0.03) < seconds
    assert own.take() == 0.0
