"""What is said about nodes that differ: each sentence names the node that is to blame."""

import torch

from trainer.diagnostics.preflight import MUST_BE_EQUAL, problems, summand, warnings


def facts(host: str, **changes):
    same = {
        **dict.fromkeys(MUST_BE_EQUAL, "1"), "host": host, "torch": "2.13.0", "configuration": "s", "device": "H100",
        "number of GPUs": 8, "memory": 80.0, "disk": 1000.0, "exact": True, "clock": 0.0,
    }  # fmt: skip
    return {**same, **changes}


def four(name: str, *values):
    return [facts(host, **{name: value}) for host, value in zip("abcd", values, strict=True)]


def test_equal_nodes_are_passed_in_silence():
    every = [facts(host) for host in "abcd"]
    assert [*problems(every), *warnings(every, needed=70, saved=1)] == []


def test_a_node_with_other_software_or_another_configuration_is_named():
    every = [facts("a"), facts("b"), facts("c", torch="2.12.0", configuration="t"), facts("d")]
    assert list(problems(every)) == [
        "torch is 2.12.0 on c and 2.13.0 on a; install the same everywhere",
        "configuration is t on c and s on a; start all ranks with the same overrides",
    ]
    assert list(warnings(every)) == []


def test_all_nodes_of_a_minority_are_named_once_each():
    every = [facts("a", code="x"), facts("a", code="x"), facts("b", code="x"), *(facts(host) for host in "cdef")]
    assert list(problems(every)) == ["code is x on a, b and 1 on c; install the same everywhere"]


def test_a_node_whose_older_source_does_not_know_a_fact_is_named():
    old = facts("a")
    del old["wandb"]
    assert list(problems([old, facts("b"), facts("c")])) == [
        "wandb is None on a and 1 on b; install the same everywhere"
    ]


def test_a_node_at_which_sums_do_not_come_out_is_named():
    assert list(problems(four("exact", True, True, False, True))) == [
        "sums over all ranks come out wrong on c; take it out and run onecurve preflight"
    ]


def test_a_node_that_does_not_see_the_folder_is_named():
    assert list(problems(four("shared", True, False, True, False))) == [
        "b, d do not see --folder of a; use one that all nodes share"
    ]


def test_a_node_with_a_device_less_too_little_memory_or_a_full_disk_is_named():
    every = [facts("a"), facts("b", **{"number of GPUs": 7}), facts("c", memory=60.0), facts("d", disk=1.0)]
    assert list(problems(every)) == []
    assert list(warnings(every, needed=70, saved=1)) == [
        "number of GPUs is 7 on b and 8 on a; look for one that fell out",
        "c has 60.0 GB of memory, and the run needs about 70.0; see onecurve estimate",
        "d has 1.0 GB of disk, and two checkpoints take 2.0; free some at run_dir",
    ]


def test_ranks_without_devices_share_the_memory_of_their_node():
    node = [facts("a", memory=10.0, **{"number of GPUs": 0}) for _ in range(3)]
    assert list(warnings(node, needed=3)) == []
    assert "the run needs about 12.0" in next(warnings(node, needed=4))


def test_a_clock_that_is_off_is_named_against_the_middle_and_not_against_rank_0():
    # Rank 0's own clock is behind, so that all others seem to be ahead of it.
    assert list(warnings(four("clock", 100.0, 105.0, 105.2, 105.0))) == [
        "the clock of a is -5.0 s from the others'; let it follow a time server"
    ]
    assert list(warnings(four("clock", 100.0, 100.3, 99.6, 100.2))) == []


def test_a_rank_whose_device_is_well_below_the_others_is_named():
    assert list(warnings(four("compute", 400.0, 410.0, 200.0, 390.0))) == [
        "rank 2 (c): 200.0 TFLOP/s of a matrix product, others 395.0; look at its clock and its temperature"
    ]


def test_a_node_that_writes_slowly_is_named():
    assert list(warnings(four("write", 100.0, 900.0, 1000.0, 1100.0))) == [
        "rank 0 (a): 100.0 MB/s to the disk, while all ranks write, others 950.0; look at its mount"
    ]


def test_sums_that_are_compared_come_out_exactly_on_any_number_of_ranks():
    cpu, total = torch.device("cpu"), torch.zeros(1, dtype=summand(0, torch.device("cpu")).dtype)
    of_one = {turn: summand(turn, cpu)[249:250] for turn in range(7)}
    for rank in range(35_000):  # one after the other, as around a ring
        total += of_one[rank % 7]
    # 5,000 rounds of 1 + 2 + ... + 7; float32 has no odd numbers above 2**24 = 16,777,216.
    assert total.item() == 249 * 5000 * 28 == 34_860_000
