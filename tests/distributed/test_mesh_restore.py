"""A run of policy gradients that goes from layout to layout, each time in the middle of an iteration, stays the run."""

import itertools
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.chats import byte_tokenizer, write_jsonl
from tests.command import metrics
from tests.distributed.test_mesh_pipelines import SHAPE, worth
from tests.ranks import on_ranks, to_another_port
from trainer.checkpoint.folder import folder_name, read_manifest, steps_in
from trainer.compose import compose
from trainer.models.hf_format import write_model
from trainer.models.load import Model, ModelLoader
from trainer.parallel import distributed
from trainer.parallel.ddp import DDP
from trainer.parallel.fsdp import FSDP
from trainer.parallel.strategy import Strategy
from trainer.parallel.zero import Zero3
from trainer.run import run

RUN = [
    "pipeline=ppo", "data=prompts", "data.train=[prompts.jsonl]", "data.eval=[prompts.jsonl]", "data.cache=cache",
    "data.template=chatml", "model.path=model", "batch.size=4", "batch.micro=2", "batch.length=96",
    "pipeline.rollout.size=8", "pipeline.rollout.tokens=5", "pipeline.rollout.log_samples=8", "pipeline.ppo_epochs=2",
    "reward@pipeline.reward.main=function", f"pipeline.reward.main.function={worth.__module__}.worth",
    "pipeline.critic=policy", "pipeline.kl_target=0.02", "model.router_balance_loss=0.1", "model.router_z_loss=0.1",
    "schedule=constant", "optimizer.lr=0.001", "pipeline.critic_lr=0.001", "precision=fp32", "checkpoint.every=1",
    "checkpoint.keep=0", "evaluation.samples=0", "tracking.wandb.mode=disabled", "tracking.tensorboard=false",
    "tracking.report=false",
]  # fmt: skip
ITERATION = 4
"""Steps of an iteration: two passes over eight completions, four a step."""
LEGS = {
    "ddp": (2, DDP()),
    "zero3": (6, Zero3()),
    "fsdp": (9, FSDP()),
    "tensor": (14, FSDP(tensor=2)),
    "sequence": (18, FSDP(sequence=2)),
    "expert": (22, FSDP(expert=2)),
}
"""The step after which a layout of two ranks is left, having taken over from the one before it and sampled by itself."""
STEPS = 23


def prepare(folder: Path) -> None:
    """A random mixture of experts, and prompts."""
    load = ModelLoader(Model(**SHAPE, family="mixtral", experts=4), DDP(), 3, 265)
    write_model(
        folder / "model", load.architecture, load.load().named_parameters(), dtype=torch.float32, shard_bytes=10**9,
        tokenizer=byte_tokenizer(), facts={},
    )  # fmt: skip
    pairs = itertools.permutations(["red", "blue", "green"], 2)
    write_jsonl(folder / "prompts.jsonl", [{"prompt": f"{a} or {b}?"} for a, b in pairs])


def go_through(folder: Path, runs: list[tuple[str, int, Strategy]]) -> None:
    """Runs by folder, each up to a step: a new one, or one that continues."""
    os.chdir(folder)
    begun = compose(RUN)
    for name, last, strategy in runs:
        if distributed.ranks() > 1:
            to_another_port()
        run(replace(begun, strategy=strategy, run_dir=name, steps=last))


def samples(folder: Path) -> list[tuple[int, str, float]]:
    rows = map(json.loads, (folder / "samples.jsonl").read_text().splitlines())
    return [(row["step"], row["completion"], row["score"]) for row in rows]


@pytest.mark.slow
def test_ppo_goes_on_in_the_middle_of_an_iteration_on_every_other_layout(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    prepare(tmp_path)
    lasts = [last for last, _ in LEGS.values()]
    assert all(last % ITERATION for last in lasts)
    on_ranks(2, go_through, tmp_path, [("moved", *leg) for leg in LEGS.values()], joined=False)
    go_through(tmp_path, [(name, STEPS, DDP()) for name in ("moved", "alone")])
    moved, alone = metrics(tmp_path / "moved"), metrics(tmp_path / "alone")
    for name in ("loss", "value/loss", "policy/approx_kl", "objective/score", "objective/kl_coef", "router/load_max"):
        mine, theirs = ([line[name] for line in lines if name in line] for lines in (moved, alone))
        # Float32 sums in another order, through steps of Adam.
        np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-5, err_msg=name)
    # Each iteration is sampled once, and not again by who takes it over.
    assert samples(tmp_path / "moved") == samples(tmp_path / "alone")
    assert {step for step, *_ in samples(tmp_path / "moved")} == set(range(1, STEPS + 1, ITERATION))

    # As if each layout had been killed before its last step, and started again on the same one.
    for last in lasts:
        shutil.copytree(tmp_path / "moved", tmp_path / f"killed-{last}")
        checkpoints = tmp_path / f"killed-{last}" / "checkpoints"
        for step in steps_in(checkpoints):
            if step >= last:
                shutil.rmtree(checkpoints / folder_name(step))
    on_ranks(2, go_through, tmp_path, [(f"killed-{leg[0]}", *leg) for leg in LEGS.values()], joined=False)
    for layout, (last, _) in LEGS.items():
        ends = (tmp_path / name / "checkpoints" / folder_name(last) for name in ("moved", f"killed-{last}"))
        straight, again = (read_manifest(end).files for end in ends)
        assert straight == again, layout
