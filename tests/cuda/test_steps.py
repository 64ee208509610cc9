"""What a step asks of a GPU, counted without one: kernels, copies, and questions that the host waits for."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from filelock import FileLock

from tests.command import ROOT

HERE = Path(__file__).parent
TORCH = Path(torch.__file__).parent
# They only go down: lower a limit when a step needs less.
LAUNCHES = {
    "pretrain": 594, "sft": 569, "lora": 856, "muon": 707, "dpo": 1007, "kto": 1409, "reward": 702, "ppo": 1502,
}  # fmt: skip
"""Of a step of two micro-batches of two layers."""
LAYER_FORWARD, LAYER_BACKWARD = 29, 51


def guard() -> Path:
    """The library that makes torch believe in a GPU, built once a machine."""
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    if torch.version.cuda or torch.version.hip:
        pytest.skip("needs a build of torch for CPU: others know GPUs of their own")
    source = (HERE / "guard.cpp").read_bytes() + torch.__version__.encode()
    folder = Path(os.environ.get("ONECURVE_CACHE", Path.home() / ".cache" / "onecurve")) / "tests"
    folder.mkdir(parents=True, exist_ok=True)
    library = folder / f"guard-{hashlib.sha256(source).hexdigest()[:16]}.so"
    with FileLock(f"{library}.lock"):
        if not library.exists():
            unfinished = library.with_suffix(".tmp")
            include = [f"-I{folder}" for folder in (HERE / "stubs", TORCH / "include")]
            options = ["-shared", "-fPIC", "-O0", "-std=c++20", *include, f"-L{TORCH / 'lib'}", "-lc10", "-ltorch_cpu"]
            command = ["g++", str(HERE / "guard.cpp"), "-o", str(unfinished), *options]
            done = subprocess.run(command, capture_output=True, text=True, timeout=300)
            assert done.returncode == 0, done.stderr[-2000:]
            unfinished.rename(library)
    return library


def counts_of(module: str) -> dict:
    """What a module prints that counts on fake CUDA."""
    libraries = {"LD_PRELOAD": str(guard()), "LD_LIBRARY_PATH": str(TORCH / "lib")}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", module],
        env={**os.environ, **libraries, "OMP_NUM_THREADS": "1"},
        cwd=ROOT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def asked() -> dict:
    """Everything that `steps.py` counts."""
    return counts_of("tests.cuda.steps")


@pytest.mark.parametrize("pipeline", LAUNCHES)
def test_no_step_waits_for_the_device(asked, pipeline):
    assert asked["steps"][pipeline]["stalls"] == {}


@pytest.mark.parametrize("pipeline", LAUNCHES)
def test_a_micro_batch_goes_up_in_one_pinned_copy(asked, pipeline):
    counts = asked["steps"][pipeline]
    assert counts["unpinned"] == {}
    # Two micro-batches, and the weight of both.
    assert sum(counts["copies"].values()) <= 3


@pytest.mark.parametrize("pipeline", LAUNCHES)
def test_a_step_mixes_no_devices_and_launches_no_more_than_before(asked, pipeline):
    counts = asked["steps"][pipeline]
    assert counts["mixed"] == {}
    assert counts["launches"] <= LAUNCHES[pipeline], counts["by_line"]


@pytest.mark.parametrize("micro_batch", ["first", "later"])
def test_a_layer_launches_few_kernels_where_nothing_is_compiled(asked, micro_batch):
    counts = asked["layer"][micro_batch]
    assert counts["forward"]["launches"] <= LAYER_FORWARD, counts["forward"]["by_line"]
    assert counts["backward"]["launches"] <= LAYER_BACKWARD, counts["backward"]["operations"]


def test_loss_and_logprobs_of_a_large_vocabulary_launch_few_kernels(asked):
    assert asked["loss"]["launches"] <= 393, asked["loss"]["by_line"]
    assert asked["logprobs"]["launches"] <= 634, asked["logprobs"]["by_line"]


def test_logprobs_of_an_iteration_come_back_in_one_copy_however_many_forwards(asked):
    [(what, times)] = asked["rescored"]["stalls"].items()
    assert "to cpu at rl/actor.py" in what
    assert times == 1
    assert asked["rescored"]["unpinned"] == {}


def test_an_asynchronous_checkpoint_copies_into_pinned_memory_and_waits_for_nothing(asked):
    assert asked["saved"]["stalls"] == asked["saved"]["unpinned"] == {}
    assert sum(asked["saved"]["copies"].values()) == 2
