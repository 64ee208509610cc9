"""One checkpoint for every layout: saved and restored on other ranks and strategies, nothing is converted."""

import ctypes
import subprocess
from pathlib import Path

import numpy as np
import pytest

from tests.ranks import on_ranks
from tests.small_run import Run, same
from trainer.checkpoint.folder import read_manifest
from trainer.parallel import distributed

STRATEGIES = ("ddp", "zero1", "zero2", "zero3", "fsdp")
LAYOUTS = [(ranks, strategy) for ranks in (1, 2) for strategy in STRATEGIES]
MORE = [(4, strategy) for strategy in STRATEGIES]


def save(folder: str, strategy: str, last: int, **config) -> dict:
    run = Run(Path(folder), strategy=strategy, keep=0, **config)
    run.steps(1, last)
    run.checkpointer.save(last)
    run.checkpointer.close()
    return run.state()


def restore(folder: str, strategy: str, last: int) -> tuple[int, dict, dict, dict]:
    """(step, state as restored, whole weights as restored, state after training on to ``last``)."""
    run = Run(Path(folder), strategy=strategy, seed=9)
    step = run.checkpointer.restore()
    restored = run.state()
    weights = {name: w.detach().cpu().numpy().copy() for name, w in run.engine.weights(frozen=False)}
    run.steps(step + 1, last)
    return step, restored, weights, run.state()


def uninterrupted(folder: str, strategy: str, last: int) -> dict:
    run = Run(Path(folder), strategy=strategy)
    run.steps(1, last)
    return run.state()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A checkpoint after 3 steps from each layout, with the state that was saved."""
    made = {}

    def by(ranks: int, strategy: str) -> tuple[str, dict]:
        if (ranks, strategy) not in made:
            folder = str(tmp_path_factory.mktemp(f"{strategy}-{ranks}"))
            made[ranks, strategy] = (folder, on_ranks(ranks, save, folder, strategy, 3)[0])
        return made[ranks, strategy]

    return by


def check(saved, source: tuple[int, str], target: tuple[int, str]) -> None:
    folder, state = saved(*source)
    for step, restored, weights, _ in on_ranks(target[0], restore, folder, target[1], 3):
        assert step == 3
        assert same(restored, state)
        for name, weight in weights.items():
            assert np.array_equal(weight.ravel(), state[f"{name}/param"]), name


@pytest.mark.parametrize(
    ("source", "target"),
    [((1, "ddp"), t) for t in LAYOUTS]
    + [(s, (1, "ddp")) for s in LAYOUTS[1:]]
    + [((2, "zero3"), (2, "zero1")), ((2, "zero3"), (2, "fsdp")), ((2, "fsdp"), (2, "zero1"))],
)
def test_every_layout_restores_what_another_saved_bit_for_bit(source, target, saved):
    check(saved, source, target)


EVERY = LAYOUTS + MORE
PAIRS = [(EVERY[n], EVERY[(n + 6) % 15]) for n in range(15)]
"""Each of the fifteen layouts as source and as target of another, of another strategy."""
PAIRS += [((2, "fsdp"), (4, s)) for s in STRATEGIES] + [((4, s), (2, "fsdp")) for s in STRATEGIES]


@pytest.mark.slow
@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_layouts_of_up_to_four_ranks_restore_each_other(source, target, saved):
    check(saved, source, target)


@pytest.mark.parametrize(
    "layout",
    [(2, s) for s in STRATEGIES]
    + [pytest.param(layout, marks=pytest.mark.slow) for layout in ((4, "ddp"), (3, "zero3"), (3, "fsdp"))],
)
def test_saved_and_continued_on_the_same_layout_is_bitwise_the_uninterrupted_run(layout, saved, tmp_path):
    ranks, strategy = layout
    folder, _ = saved(ranks, strategy)
    [(_, _, _, continued), *_] = on_ranks(ranks, restore, folder, strategy, 8)
    assert same(continued, on_ranks(ranks, uninterrupted, str(tmp_path), strategy, 8)[0])


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_rank_writes_its_share_and_no_more(strategy, saved):
    folder, _ = saved(2, strategy)
    manifest = read_manifest(Path(folder) / "step-00000003")
    elements = dict.fromkeys(range(2), 0)
    for f in manifest.fragments:
        elements[int(f.file.split("-")[1])] += f.size
    total = sum(elements.values())
    assert max(elements.values()) <= 0.6 * total  # two ranks: half each, up to the padding of a flat partition


def test_a_folder_that_not_all_ranks_see_is_refused(tmp_path):
    first, second = on_ranks(2, blind, str(tmp_path))
    if first == "not allowed":
        pytest.skip("needs the right to make a mount namespace")
    assert "ranks 1 do not see" in first
    assert first == second


def blind(folder: str) -> str:
    """Rank 1 runs in a mount namespace of its own in which the folder is empty."""
    Path(folder, "checkpoints").mkdir(exist_ok=True)
    allowed = True
    distributed.barrier()
    if distributed.world().rank == 1:
        allowed = ctypes.CDLL(None).unshare(0x00020000) == 0  # CLONE_NEWNS
        hide = ["mount", "-t", "tmpfs", "tmpfs", str(Path(folder, "checkpoints"))]
        for command in (["mount", "--make-rprivate", "/"], hide):
            allowed = allowed and subprocess.run(command, capture_output=True).returncode == 0
    if not all(distributed.gather(allowed)):
        return "not allowed"
    try:
        Run(Path(folder) / "checkpoints")
    except Exception as error:
        return str(error)
    return "not refused"
