"""Which rank the others wait for: named when it lasts, once, and not for single slow steps."""

import logging
import time

import pytest
import torch
from torch import nn

from tests.ranks import on_ranks
from trainer.diagnostics.stragglers import WINDOW, ComputeTimer, Stragglers


def stragglers(hosts: dict[int, str] | None = None) -> Stragglers:
    return Stragglers(nn.Identity(), torch.device("cpu"), hosts or {})


def test_what_ranks_wait_for_is_the_slowest_less_the_middle_one():
    assert stragglers().compare(1, [1.0, 1.5, 4.0, 2.0, 1.0]) == {
        "straggler/waiting": 2.5, "straggler/rank": 2.0, "straggler/slowness": pytest.approx(4 / 1.5),
    }  # fmt: skip
    # The faster one of two waits for the other.
    assert stragglers().compare(1, [3.0, 1.0])["straggler/waiting"] == 2.0


def test_a_slow_rank_is_named_once_with_its_host_and_when_it_is_over(caplog):
    caplog.set_level(logging.WARNING)
    ranks = stragglers({0: "a", 1: "a", 2: "node7", 3: "node7"})
    for step in (20, 40, 60):
        ranks.compare(step, [1.0, 1.0, 1.8, 1.0])
    [warning] = caplog.messages
    assert "step 20: the others wait for rank 2 on node7: 1.8 times" in warning
    caplog.clear()
    for step in (80, 100):
        ranks.compare(step, [1.0, 1.05, 1.0, 1.0])
    assert caplog.messages == ["step 80: rank 2 is as fast as the others again"]


def test_a_rank_that_is_hardly_slower_is_not_named(caplog):
    for step in range(20, 200, 20):
        stragglers().compare(step, [1.0, 1.1, 1.0])
    assert caplog.messages == []


def of_two(slow: str) -> dict[str, float]:
    """What two ranks find when the second one is slow in loading: in every step, or in every fifth one."""
    from trainer.parallel import distributed

    ranks, values = stragglers(), []
    for step in range(WINDOW):
        late = distributed.world().rank == 1 and (slow == "always" or step % 5 == 0)
        values.append(ranks.observe(step + 1, 3.0 if late else 1.0))
    assert values[:-1] == [{}] * (WINDOW - 1)
    return values[-1]


def test_ranks_compare_their_usual_times_so_single_slow_steps_do_not_count():
    for found in on_ranks(2, of_two, "always"):
        assert found == {"straggler/rank": 1.0, "straggler/slowness": 3.0, "straggler/waiting": 2.0}
    for found in on_ranks(2, of_two, "sometimes"):
        assert found["straggler/waiting"] == 0.0


def test_one_rank_waits_for_nobody():
    alone = stragglers()
    assert [alone.observe(step, 1.0) for step in range(3 * WINDOW)] == [{}] * 3 * WINDOW


class Working(nn.Module):
    """Works for some processor time, and waits for as long."""

    def forward(self, seconds: float) -> None:
        end = time.thread_time() + seconds
        while time.thread_time() < end:
            pass
        time.sleep(seconds)


def test_the_timer_counts_work_in_forwards_of_training_and_no_waiting():
    model = Working()
    timer = ComputeTimer(model, torch.device("cpu"))
    model(0.05)
    model(0.05)
    assert 0.1 <= timer.take() < 0.18
    assert timer.take() == 0.0
    model.eval()
    model(0.05)
    assert timer.take() == 0.0
