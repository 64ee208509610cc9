"""What a session of ranks leaves behind."""

import errno
import gc
import json
import math
import time
import weakref

import pytest
import torch
import torch.distributed as dist

from tests.ranks import on_ranks
from trainer.checkpoint.folder import CheckpointError
from trainer.config import InputError, RunError
from trainer.metrics import Metrics
from trainer.parallel import distributed
from trainer.parallel.mesh import run_on_leaders


def test_a_process_group_outlives_its_session_because_its_death_can_hang_the_rank():
    with distributed.session():
        distributed.ensure_group()
        group = weakref.ref(dist.group.WORLD)
    gc.collect()
    assert group() is not None
    assert not dist.is_initialized()
    with distributed.session():
        distributed.ensure_group()
        assert dist.group.WORLD is not group()


def exchanged(values: dict) -> list:
    return [
        distributed.gather({**values, "nan": math.nan, "ranks": ["of", distributed.world().rank]}),
        distributed.run_on_main(lambda: distributed.world().name),
        list(distributed.world().data.share(range(5))),
        list(distributed.world().data.block(10, 3)),
        distributed.stack_over_data(torch.tensor([[1.0, distributed.world().rank]])).tolist(),
        distributed.sum_over_data(torch.tensor(2.5)).item(),
    ]


def test_values_cross_the_ranks_exactly_and_each_takes_its_own_share():
    values = {"third": 1 / 3, "tiny": 5e-324, "infinite": -math.inf, "text": "ä\n", "nothing": None, "long": "x" * 5000}
    for rank, (gathered, main, share, block, stacked, total) in enumerate(on_ranks(2, exchanged, values)):
        assert [value.pop("ranks") for value in gathered] == [["of", 0], ["of", 1]]
        assert [math.isnan(value.pop("nan")) for value in gathered] == [True, True]
        assert gathered == [values, values]
        assert main == "rank-00000"
        assert share == [[0, 2, 4], [1, 3]][rank]
        assert block == [[10, 11, 12], [13, 14, 15]][rank]
        assert stacked == [[[1.0, 0.0]], [[1.0, 1.0]]]
        assert total == 5.0


def divided() -> list:
    """What ranks of replicas of two exchange; the second of each replica has a number that must not count, and stops."""
    with distributed.session(timeout=60, replica=2) as world:
        metrics = Metrics()
        metrics.total("sum", torch.tensor(0.1 * (1 + world.data.rank)) if world.leads else torch.tensor(torch.nan))
        metrics.mean("mean", torch.tensor(3.0 * world.data.rank), 1.0)
        metrics.maximum("stopping", torch.tensor(float(world.rank == 3)))
        values = metrics.reduced(distributed.stack, replica=world.replica)
        return [
            [world.data.rank, world.data.size, world.leads, run_on_leaders(lambda: world.rank)],
            distributed.sum_over_data(torch.tensor([0.1, 10.0**world.rank])).tolist(),
            distributed.gather_over_data(world.rank),
            distributed.stack_over_data(torch.tensor([world.rank])).tolist(),
            {name: value.item() for name, value in values.items()},
        ]


def test_each_replica_counts_once_and_all_ranks_know_the_same():
    ranks = on_ranks(4, divided, joined=False)
    assert [own for own, *_ in ranks] == [[0, 2, True, 0], [0, 2, False, 0], [1, 2, True, 2], [1, 2, False, 2]]
    [(total, gathered, stacked, values)] = {repr(rest): rest for _, *rest in ranks}.values()
    assert total == [pytest.approx(0.2), 101.0]
    assert gathered == [0, 2]
    assert stacked == [[0], [2]]
    # A signal to any rank stops all; sums and means are of the two that lead: 0.1 + 0.2, (0 + 3) / 2.
    assert values == {"sum": pytest.approx(0.3), "mean": 1.5, "stopping": 1.0}


def test_ranks_that_make_no_replicas_are_refused():
    rule = "world size 1 is not a multiple of the 2 ranks of a replica"
    with pytest.raises(InputError, match=rule), distributed.session(replica=2):
        pass


def long_work() -> list[str]:
    main = distributed.world().is_main
    every = [distributed.run_long_on_main(lambda: time.sleep(0.2) or f"by the main rank: {main}") for _ in range(2)]
    try:
        distributed.run_long_on_main(lambda: json.loads("{"))
    except distributed.RankError as error:
        every.append(str(error))
    return every


def test_ranks_wait_for_something_long_without_a_collective(monkeypatch):
    for values in on_ranks(2, long_work):
        assert values[:2] == ["by the main rank: True"] * 2
        assert values[2].startswith("rank 0: JSONDecodeError")
    assert distributed.run_long_on_main(lambda: "alone") == "alone"


def refused() -> str:
    try:
        distributed.run_on_all_ranks(lambda: 1 / distributed.world().rank)
    except distributed.RankError as error:
        return str(error)
    return "nothing"


@pytest.mark.parametrize(
    ("error", "kind", "text"),
    [
        (InputError("a setting"), InputError, "a setting"),
        (CheckpointError("a checkpoint"), RunError, "a checkpoint"),
        (OSError(errno.ENOSPC, "full", "r/x"), RunError, "r/x could not be written (No space left on device); free"),
        (OSError(errno.EACCES, "closed", "r/x"), InputError, "r/x cannot be used (Permission denied); allow it"),
        (KeyError("a"), distributed.RankError, "rank 0: KeyError: 'a'"),
    ],
)
def test_what_ranks_fail_by_keeps_its_kind(error, kind, text):
    def fail() -> None:
        raise error

    with pytest.raises(kind) as failed:
        distributed.run_on_main(fail)
    assert str(failed.value).startswith(text)
    assert isinstance(failed.value, InputError) == (kind is InputError)


def test_the_failure_of_one_rank_is_everyones():
    assert on_ranks(2, refused) == ["rank 0: ZeroDivisionError: division by zero"] * 2
