"""Checkpoints of version 0.1 stay readable: one written by it continues here, and what is written now is laid out alike."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.command import Command

OLD = Path(__file__).parents[2] / "fixtures" / "checkpoint-0.1" / "step-00000002"
"""After 2 of 4 steps, written by commit 6c85d44 with these settings on one rank."""
SETTINGS = [
    "run_dir=run",
    "data.documents=100",
    "data.heldout=4",
    "batch.size=4",
    "batch.micro=2",
    "batch.length=32",
    "model.hidden_size=8",
    "model.intermediate_size=16",
    "model.num_hidden_layers=1",
    "model.num_attention_heads=1",
    "model.num_key_value_heads=1",
    "model.head_dim=8",
    "tracking.wandb.mode=disabled",
    "tracking.tensorboard=false",
    "evaluation.samples=0",
    "checkpoint.every=2",
    "schedule=constant",
]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """The folder of the same run, carried out by this version."""
    folder = tmp_path_factory.mktemp("format")
    Command(folder, *SETTINGS, "steps=4").finish()
    return folder / "run"


def manifest(checkpoint: Path) -> dict:
    return json.loads((checkpoint / "manifest.json").read_text())["body"]


def keys(value):
    """The names in a nested state, without its numbers."""
    return {name: keys(inner) for name, inner in value.items()} if isinstance(value, dict) else None


def test_manifest_and_tensors_are_those_of_version_0_1(run):
    new = run / "checkpoints" / OLD.name
    before, now = manifest(OLD), manifest(new)
    assert (before["format"], now["format"]) == (1, 2)
    # Since format 2 a row also says the box that its interval is counted in, which is the tensor for all that there was.
    assert [[*row[:4], *row[5:]] for row in now["fragments"]] == before["fragments"]
    assert [row[4] for row in now["fragments"]] == [[[0, n] for n in now["shapes"][row[2]]] for row in now["fragments"]]
    for part in ("shapes", "optimizer_steps", "ranks", "step"):
        assert now[part] == before[part], part
    assert keys(now["parts"]) == keys(before["parts"])
    assert now["parts"]["data"] == before["parts"]["data"]
    assert keys(now["engine"]) == keys(before["engine"])
    assert now["files"].keys() == before["files"].keys()
    for file in now["files"]:
        ours, theirs = load_file(new / file), load_file(OLD / file)
        assert ours.keys() == theirs.keys()
        for name, tensor in ours.items():
            # Equal bit for bit on the machine that wrote it; another processor rounds differently.
            np.testing.assert_allclose(tensor, theirs[name], rtol=1e-3, atol=1e-6, err_msg=name)


def test_a_checkpoint_of_version_0_1_continues(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    checkpoints = tmp_path / "run" / "checkpoints"
    shutil.rmtree(checkpoints)
    shutil.copytree(OLD, checkpoints / OLD.name)
    (checkpoints / "latest").write_text(f"{OLD.name}\n")
    output = Command(tmp_path, *SETTINGS, "steps=4").finish()
    assert "step 1/4" not in output, output
    continued = load_file(tmp_path / "run" / "checkpoints" / "step-00000004" / "rank-00000-000.safetensors")
    undisturbed = load_file(run / "checkpoints" / "step-00000004" / "rank-00000-000.safetensors")
    assert manifest(checkpoints / "step-00000004")["parts"]["seen"] == {"tokens": 512}
    for name, tensor in undisturbed.items():
        np.testing.assert_allclose(continued[name], tensor, rtol=1e-3, atol=1e-6, err_msg=name)
