"""What is said about nodes that differ: each sentence names the node that is to blame."""

from trainer.diagnostics.preflight import compare, skewed, slow_links, slower, software
from trainer.parallel.links import Link, distances


def facts(host: str, **changes):
    same = {
        "host": host, "software": {"torch": "2.13.0", "code": "abc"}, "settings": "s", "device": "H100", "devices": 8,
        "memory": 80e9, "disk": 1e12,
    }  # fmt: skip
    return {**same, **changes}


FOUR = ["a", "b", "c", "d"]


def test_equal_nodes_are_passed_in_silence():
    found = compare([facts(host) for host in FOUR], needed=70e9, saved=1e9)
    assert (found.problems, found.warnings) == ([], [])


def test_a_node_with_other_software_or_another_configuration_is_named():
    other = facts("c", software={"torch": "2.12.0", "code": "abc"}, settings="t")
    found = compare([facts("a"), facts("b"), other, facts("d")], needed=0, saved=0)
    assert found.problems == [
        "torch is 2.12.0 on c and 2.13.0 on a; install the same everywhere",
        "the configuration is t on c and s on a; start all ranks with the same overrides",
    ]


def test_a_package_that_one_node_lacks_is_named():
    found = compare([facts("a"), facts("b", software={"code": "abc"})], needed=0, saved=0)
    assert found.problems == ["torch is not installed on b and 2.13.0 on a; install the same everywhere"]


def test_a_node_with_a_device_less_too_little_memory_or_a_full_disk_is_named():
    found = compare([facts("a"), facts("b", devices=7), facts("c", memory=60e9), facts("d", disk=1e9)], 70e9, 1e9)
    assert found.problems == []
    said = "\n".join(found.warnings)
    assert "the number of devices is 7 on b and 8 on a" in said
    assert "c has 60.0 GB of memory and the run is estimated to take 70.0" in said
    assert "d sees 1.0 GB free where run_dir is, and a checkpoint takes 1.0 twice over" in said
    assert len(found.warnings) == 3


def test_ranks_without_devices_share_the_memory_of_their_node():
    node = [facts("a", devices=0, memory=10e9) for _ in range(3)]
    assert compare(node, needed=3e9, saved=0).warnings == []
    assert "the run is estimated to take 12.0" in compare(node, needed=4e9, saved=0).warnings[0]


def test_a_clock_that_is_off_is_named_against_the_middle_and_not_against_rank_0():
    # Rank 0's own clock is 5 s behind, so that all others seem to be ahead of it.
    assert skewed(FOUR, [0.0, 5.0, 5.1, 5.0]) == ["the clock of a is 5.0 s behind; let it follow a time server"]
    assert skewed(FOUR, [0.0, 0.3, -0.4, 0.2]) == []


def test_a_node_most_of_whose_links_are_slow_is_named_and_its_partners_are_not():
    # Four nodes of one rank; what goes to or from c crawls.
    speeds = {
        (s, (s + d) % 4): 1.0 if 2 in (s, (s + d) % 4) else 10.0 for d in distances(4) for s in range(4)
    }  # fmt: skip
    found = slow_links(FOUR, [Link(s, t, speed, True) for (s, t), speed in speeds.items()])
    assert found.warnings == ["c moves 1.00 GB/s to other nodes, the others 5.50; look at its cables"]
    assert found.problems == []


def test_what_arrives_damaged_names_both_ends():
    found = slow_links(["a", "b"], [Link(0, 1, 1.0, False), Link(1, 0, 1.0, True)])
    assert found.problems == ["what rank 0 (a) sends to rank 1 (b) arrives damaged; take one of them out"]


def test_a_device_well_below_the_others_is_named():
    said = slower("the device", "TFLOP/s", FOUR, [400.0, 410.0, 200.0, 390.0], "look at its clock")
    assert said == ["the device of c reaches 200.0 TFLOP/s, the others 395.0; look at its clock"]


def test_software_says_which_source_is_run():
    assert {"python", "torch", "code"} <= software().keys()
