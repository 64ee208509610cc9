"""Every pipeline on every axis of a mesh: the steps of one rank, bitwise the same on all ranks of a replica."""

import itertools
import os
from contextlib import closing
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from tests.chats import byte_tokenizer, write_jsonl
from tests.command import metrics
from tests.ranks import on_ranks, session_of, to_another_port
from trainer.compose import compose
from trainer.diagnostics.guard import Guard
from trainer.loop import train
from trainer.models.hf_format import write_model
from trainer.models.load import Model, ModelLoader
from trainer.parallel import distributed
from trainer.parallel.ddp import DDP
from trainer.pipelines.base import Plan
from trainer.run import Run, run
from trainer.tracking.throughput import Stopwatch

SHAPE = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 4, "initializer_range": 0.3, "vocab_size": 271,
}  # fmt: skip
LORA = ["adapter=lora", "adapter.rank=4"]
DROPPED = [*LORA, "adapter.dropout=0.2"]
ROLLOUTS = [
    "pipeline=ppo", "data=prompts", "pipeline.rollout.size=8", "pipeline.rollout.tokens=5",
    "reward@pipeline.reward.main=function", f"pipeline.reward.main.function={__name__}.worth",
]  # fmt: skip
PIPELINES = {
    "sft": ["pipeline=sft", "data=chat", *DROPPED, "batch.length=63"],
    "dpo": ["pipeline=dpo", "data=preference", "pipeline.reference=adapters_off", *DROPPED],
    "kto": ["pipeline=kto", "data=labelled", "pipeline.reference=model"],
    "reward": ["pipeline=reward", "data=preference", *DROPPED],
    "ppo": [*ROLLOUTS, "pipeline.critic=head", "pipeline.kl_coef=0.5"],
    "critic": [*ROLLOUTS, "pipeline.critic=policy", "pipeline.reference=adapters_off", "pipeline.kl_coef=0.5", *LORA],
    "grpo": [*ROLLOUTS, "pipeline.advantage=grpo", "pipeline.samples_per_prompt=4", "pipeline.kl_loss_coef=0.5"],
}
MESHES = {"sequence 2": (2, ["strategy.sequence=2"])}
"""Ranks of a replica, and the settings."""
STEPS = 3


def worth(prompts, completions, rows):
    """Different for almost every text: equal rewards would leave a gradient of roundings, which Adam makes steps of."""
    return [sum(text.encode()) % 97 / 97 for text in completions]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A random model, and data of each kind."""
    folder = tmp_path_factory.mktemp("world")
    load = ModelLoader(Model(**SHAPE), DDP(), 3, 265)
    write_model(
        folder / "model", load.architecture, load.load().named_parameters(), dtype=torch.float32, shard_bytes=10**9,
        tokenizer=byte_tokenizer(), facts={},
    )  # fmt: skip
    pairs = [
        {"prompt": f"{a} or {b}?", "chosen": f"{a}.", "rejected": f"Not {b}."}
        for a, b in itertools.permutations(["red", "blue", "green"], 2)
    ]
    sides = (("chosen", True), ("rejected", False))
    write_jsonl(folder / "preference.jsonl", pairs)
    write_jsonl(
        folder / "labelled.jsonl",
        [{"prompt": p["prompt"], "completion": p[s], "label": label} for p in pairs for s, label in sides],
    )
    write_jsonl(folder / "prompts.jsonl", [{"prompt": p["prompt"]} for p in pairs])
    write_jsonl(
        folder / "chat.jsonl", [{"prompt": p["prompt"], "completion": p["chosen"] * n} for p in pairs for n in (1, 3)]
    )
    return folder


def configured(pipeline: str, *more: str) -> Run:
    """A run in the world's folder, whose micro-batches weigh unequally."""
    words = PIPELINES[pipeline]
    data = next(word.partition("=")[2] for word in words if word.startswith("data="))
    return compose([
        "model.path=model", f"data.train=[{data}.jsonl]", "data.template=chatml", "data.cache=cache", "batch.size=8",
        "batch.micro=2", "batch.length=96", f"steps={STEPS}", "schedule=constant", "schedule.warmup=0", "optimizer.lr=0.001",
        "precision=fp32", "tracking.wandb.mode=disabled", "tracking.tensorboard=false", "evaluation.samples=0", *words, *more,
    ])  # fmt: skip


def steps_of(cfg: Run) -> list[dict[str, float]]:
    """A run's steps alone, in the session that there is."""
    device, (tokenizer, _) = distributed.world().device, cfg.open_tokenizer_and_shape()
    corpus, models = cfg.open_corpus(tokenizer), cfg.pipeline.models(cfg.loader(tokenizer), tokenizer)
    engine = cfg.strategy.wrap(models.trained, cfg.optimizer, cfg.precision)
    models.trained = engine.model
    cfg.pipeline.prepare(models, engine, corpus, cfg.data.cache_folder)
    watch, accumulate = Stopwatch(device), cfg.batch.size // (cfg.batch.micro * distributed.world().data.size)
    plan = Plan(cfg.batch.size, cfg.batch.micro, cfg.batch.length, cfg.seed, watch)
    with closing(cfg.pipeline.batches(models, engine, corpus, plan)) as batches:
        taken = train(
            cfg.pipeline, models, engine, batches, lambda step: 1.0, Guard(cfg.guard, device), watch, seed=cfg.seed, first=1,
            last=STEPS, accumulate=accumulate,
        )  # fmt: skip
        return [{name: float(value) for name, value in step.metrics.items()} for step in taken]


def on_a_rank(folder: Path, meshes: dict[str, tuple[int, list[str]]], pipelines: list[str]) -> dict:
    """The steps of every pipeline on every mesh."""
    os.chdir(folder)
    steps = {}
    for mesh, (replica, settings) in meshes.items():
        with session_of(replica):
            for pipeline in pipelines:
                steps[mesh, pipeline] = steps_of(configured(pipeline, "strategy=fsdp", *settings))
    return steps


@pytest.fixture(scope="module")
def alone(world):
    """The steps of every pipeline on one rank, once each."""

    @cache
    def of(pipeline: str) -> list[dict[str, float]]:
        with pytest.MonkeyPatch.context() as here:
            here.chdir(world)
            return steps_of(configured(pipeline))

    return of


@pytest.mark.parametrize(
    "pipelines", [["sft", "grpo"], pytest.param(["dpo", "kto", "reward", "ppo", "critic"], marks=pytest.mark.slow)]
)
def test_every_pipeline_takes_the_steps_of_one_rank_on_every_axis(pipelines, world, alone):
    every = on_ranks(2, on_a_rank, world, MESHES, pipelines, joined=False)
    for (mesh, pipeline), steps in every[0].items():
        for name in ("loss", "grad_norm"):
            mine, theirs = ([step[name] for step in of] for of in (steps, alone(pipeline)))
            # Float32 sums in another order, through steps of Adam.
            np.testing.assert_allclose(mine, theirs, rtol=2e-5, atol=1e-5, err_msg=f"{mesh}, {pipeline}, {name}")
        for other in every[1:]:
            assert _untimed(other[mesh, pipeline]) == _untimed(steps), (mesh, pipeline)


def _untimed(steps: list[dict[str, float]]) -> list[dict[str, float]]:
    return [{name: value for name, value in step.items() if not name.startswith("time/")} for step in steps]


def gone_through(folder: Path, runs: list[tuple[str, int, list[str]]]) -> None:
    """Runs by folder, each up to a step: a new one, or one that continues."""
    os.chdir(folder)
    for name, steps, settings in runs:
        if distributed.ranks() > 1:
            to_another_port()
        run(configured("sft", "strategy=fsdp", *settings, f"run_dir={name}", f"steps={steps}", *WITH_ALL))


WITH_ALL = [
    "checkpoint.every=1",
    "evaluation.samples=1",
    "evaluation.sample_tokens=3",
    "data.eval=[chat.jsonl]",
    "export.dtype=fp32",
    "tracking.report=false",
]
"""Evaluations, texts, checkpoints and exports."""


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES)
def test_a_run_continues_on_one_rank_and_one_of_one_rank_on_every_axis(mesh, world, monkeypatch):
    monkeypatch.chdir(world)
    replica, settings = MESHES[mesh]
    straight, left, came = (f"{mesh.replace(' ', '-')}-{name}" for name in ("straight", "left", "came"))
    gone_through(world, [("alone", 4, []), (came, 2, [])])
    on_ranks(
        replica, gone_through, world, [(straight, 4, settings), ("killed", 2, settings), ("killed", 4, settings),
        (left, 2, settings), (came, 4, settings)], joined=False,
    )  # fmt: skip
    gone_through(world, [(left, 4, [])])
    exports = {
        name: load_file(world / name / "export" / "model.safetensors")
        for name in (straight, "killed", left, came, "alone")
    }
    for tensor, values in exports["alone"].items():
        assert np.array_equal(exports[straight][tensor], exports["killed"][tensor]), tensor
        for name in (straight, left, came):
            # Float32 sums in another order, through four steps of Adam of 0.001 each.
            np.testing.assert_allclose(exports[name][tensor], values, rtol=0, atol=1e-4, err_msg=f"{name}, {tensor}")
    wanted = steps_and_evaluation(world / "alone")
    for name in (straight, left, came):
        # The same through the steps; what is held out comes last.
        np.testing.assert_allclose(steps_and_evaluation(world / name), wanted, rtol=2e-5, err_msg=name)


def steps_and_evaluation(folder: Path) -> list[float]:
    """The loss of every step, and that of the last evaluation."""
    lines = metrics(folder)
    return [*(line["loss"] for line in lines if "loss" in line), lines[-1]["eval/loss"]]
