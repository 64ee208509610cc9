"""Saving and restoring on one rank: nothing is lost, nothing damaged is loaded, the last good one is never removed."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.command import onecurve
from tests.ranks import forkserver
from tests.small_run import Run, same
from trainer.checkpoint import CheckpointError
from trainer.checkpoint.folder import RestoreError, Stored, incomplete, steps_in, verify


def saved(folder: Path, *steps: int, **config) -> Run:
    """A run that was saved after each of ``steps``."""
    run, done = Run(folder, keep=config.pop("keep", 0), **config), 0
    for step in steps:
        run.steps(done + 1, step)
        run.checkpointer.save(step)
        done = step
    run.checkpointer.close()
    return run


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_restored_run_goes_on_bitwise_as_the_saved_one(optimizer, asynchronous, tmp_path):
    first = saved(tmp_path, 3, optimizer=optimizer, asynchronous=asynchronous)
    second = Run(tmp_path, seed=9, optimizer=optimizer)
    assert second.checkpointer.restore() == 3
    assert same(first.state(), second.state())
    first.steps(4, 6)
    second.steps(4, 6)
    assert same(first.state(), second.state())


def test_a_run_saved_before_its_first_step_is_restored(tmp_path):
    first = saved(tmp_path, 0)
    second = Run(tmp_path, seed=9)
    assert second.checkpointer.restore() == 0
    assert same(first.state(), second.state())


def test_an_asynchronous_save_holds_the_state_of_its_step(tmp_path):
    run = Run(tmp_path, asynchronous=True)
    run.steps(1, 2)
    run.checkpointer.save(2)
    then = run.state()
    run.steps(3, 5)
    run.checkpointer.close()
    again = Run(tmp_path, seed=9)
    assert again.checkpointer.restore() == 2
    assert same(again.state(), then)


def test_tied_tensors_are_stored_once_and_frozen_ones_not_at_all(tmp_path):
    saved(tmp_path, 1)
    body = json.loads((tmp_path / "step-00000001" / "manifest.json").read_text())["body"]
    assert set(body["shapes"]) == {"embed_tokens.weight", "hidden.weight", "hidden.bias", "scale"}
    states = {(f[2], f[3]) for f in body["fragments"]}
    assert ("hidden.bias", "exp_avg_sq") in states


def save_whole(run: Run, step: int) -> None:
    run.checkpointer.save(step)
    run.checkpointer.close()


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 4
    file.write_bytes(data)


DAMAGES = {
    "truncated": lambda f: (f / "rank-00000-000.safetensors").write_bytes(
        (f / "rank-00000-000.safetensors").read_bytes()[:-7]
    ),
    "bit flipped": lambda f: flip(f / "rank-00000-000.safetensors"),
    "file missing": lambda f: (f / "rank-00000-000.safetensors").unlink(),
    "manifest missing": lambda f: (f / "manifest.json").unlink(),
    "manifest flipped": lambda f: flip(f / "manifest.json"),
    "manifest cut": lambda f: (f / "manifest.json").write_text((f / "manifest.json").read_text()[:200]),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_checkpoint_is_named_kept_and_passed_over(kind, tmp_path, caplog):
    saved(tmp_path, 2)
    good = Run(tmp_path, seed=3)
    good.checkpointer.restore()
    saved_again = saved(tmp_path, 4)
    newest = tmp_path / "step-00000004"
    DAMAGES[kind](newest)
    named = "manifest.json" if "manifest" in kind else "rank-00000-000.safetensors"
    again = Run(tmp_path, seed=9)
    assert again.checkpointer.restore() == 2
    assert f"step-00000004 is damaged and is passed over: {newest / named}" in caplog.text
    assert same(again.state(), good.state())
    assert newest.exists()
    code, said, _ = onecurve(tmp_path, "verify", str(tmp_path))
    assert code == 1
    assert "step-00000004: DAMAGED" in said
    assert named in said
    assert "step-00000002: intact, 4 tensors" in said
    # Training on and saving the same step again keeps the damaged one aside.
    again.steps(3, 4)
    again.checkpointer.save(4)
    assert same(again.state(), saved_again.state())
    assert verify(newest) == []
    assert len(list(tmp_path.glob("step-00000004.damaged-*"))) == 1


def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_over_in_silence(tmp_path):
    saved(tmp_path, 2, 4)
    for step in (2, 4):
        flip(tmp_path / f"step-{step:08d}" / "rank-00000-000.safetensors")
    with pytest.raises(RestoreError, match=r"no checkpoint .* is whole .*step-00000004.*step-00000002.*resume=new"):
        Run(tmp_path).checkpointer.restore()


def test_only_the_newest_good_ones_are_kept(tmp_path):
    saved(tmp_path, 1, 2, 3, 4, keep=2)
    assert steps_in(tmp_path) == [4, 3]
    assert (tmp_path / "latest").read_text() == "step-00000004\n"
    assert not list(tmp_path.glob("*.tmp-*"))


def test_a_damaged_checkpoint_does_not_count_among_those_that_are_kept(tmp_path):
    saved(tmp_path, 1, 2, 3)
    flip(tmp_path / "step-00000003" / "rank-00000-000.safetensors")
    run = Run(tmp_path, keep=2)
    assert run.checkpointer.restore() == 2
    run.steps(3, 5)
    run.checkpointer.save(5)
    assert steps_in(tmp_path) == [5, 3, 2]  # 5 and 2 are good, 3 is kept for its owner to look at


def test_what_a_killed_save_left_is_not_taken_for_a_checkpoint_and_is_cleared(tmp_path):
    saved(tmp_path, 2)
    shutil.copytree(tmp_path / "step-00000002", tmp_path / "step-00000009.tmp-abcd1234")
    assert Run(tmp_path).checkpointer.restore() == 2
    assert not (tmp_path / "step-00000009.tmp-abcd1234").exists()


def test_another_shape_is_refused_by_name(tmp_path):
    saved(tmp_path, 1)
    with pytest.raises(
        RestoreError, match=r"of another model: .*embed_tokens.weight is \(5, 8\) and should be \(5, 6\)"
    ):
        Run(tmp_path, width=6).checkpointer.restore()


def test_another_optimizer_is_refused_by_name(tmp_path):
    saved(tmp_path, 1)
    with pytest.raises(RestoreError, match=r"it lacks hidden.weight \(momentum_buffer\)"):
        Run(tmp_path, optimizer="muon").checkpointer.restore()


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_full_disk_is_named_and_costs_no_earlier_checkpoint(asynchronous, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", disk], capture_output=True)
    if mounted.returncode:
        pytest.skip("needs the right to mount a small tmpfs")
    try:
        run = Run(disk, width=160, asynchronous=asynchronous, keep=0)
        run.steps(1, 1)
        run.checkpointer.save(1)
        run.checkpointer.close()
        then = run.state()
        run.steps(2, 2)
        with pytest.raises(
            CheckpointError, match=r"step 2 was not written .*No space left.*newest checkpoint is step-00000001"
        ):
            save_whole(run, 2)
        assert steps_in(disk) == [1]
        assert not list(disk.glob("*.tmp-*"))
        again = Run(disk, width=160, seed=9)
        assert again.checkpointer.restore() == 1
        assert same(again.state(), then)
    finally:
        subprocess.run(["umount", disk], check=True)


def test_fragments_that_do_not_make_up_the_model_are_found_before_they_are_believed():
    def piece(start: int, size: int) -> Stored:
        return Stored("f", "0", "w", "param", ((0, 2), (0, 5)), start, size)

    assert list(incomplete({"w": [2, 5]}, [piece(4, 6), piece(0, 4)])) == []
    assert list(incomplete({"w": [2, 5]}, [piece(0, 4), piece(5, 5)])) == ["w (param): elements 4 .. 5 are not there"]
    assert "3 .. 4 are twice there" in next(incomplete({"w": [2, 5]}, [piece(0, 4), piece(3, 7)]))
    assert list(incomplete({"w": [2, 5]}, [piece(0, 9)])) == ["w (param): 9 of 10 elements are there"]


def test_nothing_to_verify_is_said(tmp_path):
    code, _, errors = onecurve(tmp_path, "verify", str(tmp_path))
    assert (code, "holds no checkpoint" in errors) == (2, True)


def save_and_die(folder: Path, deadly: int, events: Path) -> None:
    """Save a step, and end by SIGKILL at the ``deadly``-th thing that the save does to the file system."""
    torch.set_num_threads(1)
    run, count = Run(folder, keep=1), 0
    run.steps(run.checkpointer.restore() + 1, 4)

    def die(event: str, arguments: tuple) -> None:
        nonlocal count
        if event in ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree", "os.truncate") and any(
            str(folder) in str(argument) for argument in arguments
        ):
            count += 1
            if count == deadly:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(die)
    run.checkpointer.save(4)
    events.write_text(str(count))


def test_killed_in_any_phase_of_a_save_the_run_comes_back_whole(tmp_path):
    first = saved(tmp_path / "start", 2)
    before = first.state()
    first.steps(3, 4)
    after = first.state()

    def attempt(deadly: int) -> int | None:
        folder = tmp_path / f"at-{deadly}"
        shutil.copytree(tmp_path / "start", folder)
        process = forkserver().Process(target=save_and_die, args=(folder, deadly, tmp_path / "events"))
        process.start()
        process.join()
        return process.exitcode

    assert attempt(10**6) == 0
    events = int((tmp_path / "events").read_text())
    assert events > 10
    restored = set()
    for deadly in range(1, events + 1):
        assert attempt(deadly) == -signal.SIGKILL
        again = Run(tmp_path / f"at-{deadly}", seed=9)
        step = again.checkpointer.restore()
        restored.add(step)
        assert same(again.state(), before if step == 2 else after), (deadly, step)
    assert restored == {2, 4}


def test_a_checkpoint_is_readable_by_whoever_may_read_its_folder(tmp_path):
    tmp_path.chmod(0o755)
    before = os.umask(0o022)
    try:
        saved(tmp_path, 1)
    finally:
        os.umask(before)
    modes = {file.name: oct(file.stat().st_mode & 0o777) for file in (tmp_path / "step-00000001").iterdir()}
    assert modes == {"manifest.json": "0o644", "rank-00000-000.safetensors": "0o644"}
