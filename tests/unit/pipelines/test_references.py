"""The reference is what the policy is before its first step: every start x every algorithm x every kind of reference."""

import itertools
import os
from contextlib import closing
from pathlib import Path

import pytest
import torch

from tests.chats import byte_tokenizer, write_jsonl
from tests.command import metrics
from tests.ranks import on_ranks
from trainer.compose import compose
from trainer.config import ConfigError
from trainer.diagnostics.guard import Guard
from trainer.export.peft import export_adapter
from trainer.loop import train
from trainer.models.hf_format import write_model
from trainer.models.load import Model, ModelLoader
from trainer.models.lora import LoRA
from trainer.optim import AdamW
from trainer.parallel import distributed
from trainer.parallel.ddp import DDP
from trainer.parallel.precision import Compute, Precision
from trainer.pipelines.base import Plan
from trainer.run import Run, run
from trainer.tracking.throughput import Stopwatch

SHAPE = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
    "head_dim": 8, "initializer_range": 0.3, "vocab_size": 272,
}  # fmt: skip
STARTS = {
    "full": [],
    "lora": ["adapter=lora"],
    "lora with new tokens": ["adapter=lora", "tokenizer.add=['<|turn|>','<|over|>']"],
    "lora from an adapter": ["adapter=lora", "adapter.path=adapter"],
    "qlora": ["adapter=qlora"],
}
ROLLOUTS = [
    "pipeline=ppo", "data=prompts", "pipeline.rollout.size=8", "pipeline.rollout.tokens=4", "batch.size=8",
    "reward@pipeline.reward.main=function", f"pipeline.reward.main.function={__name__}.vowels",
]  # fmt: skip
ALGORITHMS = {
    "dpo": ["pipeline=dpo", "data=preference"],
    "kto": ["pipeline=kto", "data=labelled"],
    "ppo": [*ROLLOUTS, "pipeline.critic=head", "pipeline.kl_coef=0.5"],
    "grpo": [*ROLLOUTS, "pipeline.advantage=grpo", "pipeline.samples_per_prompt=4", "pipeline.kl_loss_coef=0.5"],
}
STEPS, FEW = 20, 5
STILL = {
    "dpo": {"rewards/margin": 0, "rewards/chosen": 0},
    "kto": {"rewards/margin": 0, "kl": 0},
    "ppo": {"objective/kl": 0, "policy/ratio_mean": 1},
    "grpo": {"objective/kl": 0, "policy/ratio_mean": 1, "policy/kl_loss": 0},
}
"""What each algorithm shows of a policy that is its own reference."""


def vowels(prompts, completions, rows):
    return [sum(letter in "aeiou" for letter in text) for text in completions]


def loader(adapter, **model) -> ModelLoader:
    return ModelLoader(Model(**model), DDP(), 3, 265, adapter)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A random model whose vocabulary is padded, an adapter of it that does something, and data of each kind."""
    folder = tmp_path_factory.mktemp("world")
    tokenizer, fresh = byte_tokenizer(), loader(LoRA(), **SHAPE)
    model = ModelLoader(Model(**SHAPE), DDP(), 3, 265).load()
    write_model(
        folder / "model", fresh.architecture, model.named_parameters(), dtype=torch.float32, shard_bytes=10**9,
        tokenizer=tokenizer, facts={},
    )  # fmt: skip
    load = loader(LoRA(rank=2, alpha=8), path=str(folder / "model"))
    engine = DDP().wrap(load.load(), AdamW(lr=0.1), Precision(Compute.fp32))
    with torch.no_grad():
        for name, parameter in engine.model.named_parameters():
            if name.endswith("lora_B.weight"):
                parameter.normal_(0, 0.3, generator=torch.Generator().manual_seed(1))
    export_adapter(folder / "adapter", engine, load, tokenizer, {"step": 1})
    pairs = [
        {"prompt": f"{a} or {b}?", "chosen": f"{a}.", "rejected": f"Not {b}."}
        for a, b in itertools.permutations(["red", "blue", "green"], 2)
    ]
    write_jsonl(folder / "preference.jsonl", pairs)
    sides = (("chosen", True), ("rejected", False))
    labelled = [{"prompt": p["prompt"], "completion": p[s], "label": label} for p in pairs for s, label in sides]
    write_jsonl(folder / "labelled.jsonl", labelled)
    write_jsonl(folder / "prompts.jsonl", [{"prompt": p["prompt"]} for p in pairs])
    return folder


def configured(algorithm: str, start: str, kind: str, *more: str) -> Run:
    """A run in the world's folder."""
    data = next(word.partition("=")[2] for word in ALGORITHMS[algorithm] if word.startswith("data="))
    return compose([
        *ALGORITHMS[algorithm], *STARTS[start], f"pipeline.reference={kind}", "model.path=model", "data.template=chatml",
        f"data.train=[{data}.jsonl]", "data.cache=cache", f"run_dir={algorithm}-{start.replace(' ', '_')}-{kind}",
        "batch.size=8", "batch.micro=4", "batch.length=96", f"steps={STEPS}", "schedule=constant", "schedule.warmup=0",
        "optimizer.lr=0.01", "precision=fp32", "tracking.wandb.mode=disabled", "tracking.tensorboard=false",
        "tracking.report=false", "evaluation.samples=0", "checkpoint.every=0", *more,
    ])  # fmt: skip


def losses(algorithm: str, start: str, kind: str, folder) -> list[dict]:
    """The steps of a run in the world's folder."""
    cfg = configured(algorithm, start, kind)
    run(cfg)
    return [line for line in metrics(folder / cfg.run_dir) if "loss" in line]


SLOW = [("qlora", "kto"), ("qlora", "ppo")]
"""A packed base differs from another in its linear layers alone."""


@pytest.mark.parametrize(
    ("start", "algorithm"),
    [
        pytest.param(start, algorithm, marks=[pytest.mark.slow] if (start, algorithm) in SLOW else [])
        for start in STARTS
        for algorithm in ALGORITHMS
    ],
)
def test_the_reference_is_the_policy_before_its_first_step(start, algorithm, world, monkeypatch):
    monkeypatch.chdir(world)
    learns_offline = algorithm in ("dpo", "kto")
    runs = {kind: losses(algorithm, start, kind, world) for kind in ["model"] + ["precomputed"] * learns_offline}
    if start in ("lora", "qlora"):
        runs["adapters_off"] = losses(algorithm, start, "adapters_off", world)
    else:
        with pytest.raises(ConfigError, match=r"adapters_off needs adapter=lora.*use pipeline.reference=model"):
            losses(algorithm, start, "adapters_off", world)
    if not learns_offline:
        with pytest.raises(ConfigError, match="'precomputed' is not one of model"):
            losses(algorithm, start, "precomputed", world)
    for steps in runs.values():
        assert {name: steps[0][name] for name in STILL[algorithm]} == pytest.approx(STILL[algorithm], abs=1e-5)
    first, *others = ([step["loss"] for step in steps] for steps in runs.values())
    assert abs(first[-1] - first[0]) > 1e-3
    for other in others:
        assert other == pytest.approx(first, rel=1e-4)


STRATEGIES = {
    "ddp": ["strategy=ddp"],
    "zero1": ["strategy=zero1"],
    "zero2": ["strategy=zero2"],
    "zero3": ["strategy=zero3", "+strategy.deepspeed={zero_optimization: {stage3_param_persistence_threshold: 0}}"],
}
PRECOMPUTED = [("full", "dpo"), ("lora with new tokens", "dpo"), ("lora from an adapter", "dpo"), ("full", "kto")]


def square() -> dict[str, list[tuple[str, str, str]]]:
    """Cells of the table by strategy: a Latin square of starts and algorithms, every kind of reference in each strategy."""
    cells: dict[str, list[tuple[str, str, str]]] = {strategy: [] for strategy in STRATEGIES}
    for row, start in enumerate(STARTS):
        for column, algorithm in enumerate(ALGORITHMS):
            kind = "precomputed" if (start, algorithm) in PRECOMPUTED else "model"
            cell = (algorithm, start, "adapters_off" if start in ("lora", "qlora") else kind)
            cells[list(STRATEGIES)[(row + column) % len(STRATEGIES)]].append(cell)
    return cells


def steps_of(cfg: Run) -> list[dict[str, float]]:
    """A run's steps alone, in the session that there is."""
    world, (tokenizer, _) = distributed.world(), cfg.open_tokenizer_and_shape()
    corpus, models = cfg.open_corpus(tokenizer), cfg.pipeline.models(cfg.loader(tokenizer), tokenizer)
    engine = cfg.strategy.wrap(models.trained, cfg.optimizer, cfg.precision)
    models.trained = engine.model
    cfg.pipeline.prepare(models, engine, corpus, cfg.data.cache_folder)
    watch = Stopwatch(world.device)
    plan = Plan(cfg.batch.size, cfg.batch.micro, cfg.batch.length, cfg.seed, watch)
    with closing(cfg.pipeline.batches(models, engine, corpus, plan)) as batches:
        taken = train(
            cfg.pipeline, models, engine, batches, lambda step: 1.0, Guard(cfg.guard, world.device), watch, seed=cfg.seed,
            first=1, last=FEW, accumulate=cfg.batch.size // (cfg.batch.micro * world.data.size),
        )  # fmt: skip
        return [{name: float(value) for name, value in step.metrics.items()} for step in taken]


def on_a_rank(cells: list[tuple[str, str, str]], folder: Path, overrides: list[str]) -> list[list[dict[str, float]]]:
    """The steps of several runs, one after the other."""
    os.chdir(folder)
    return [steps_of(configured(*cell, *overrides)) for cell in cells]


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_ranks_under_every_strategy_have_the_same_reference(strategy, world, monkeypatch):
    monkeypatch.chdir(world)
    cells = square()[strategy]
    assert {kind for _, _, kind in cells} == {"model", "precomputed", "adapters_off"}
    together, _ = on_ranks(2, on_a_rank, cells, world, STRATEGIES[strategy])
    for (algorithm, start, kind), steps in zip(cells, together, strict=True):
        alone = steps_of(configured(algorithm, start, kind))
        assert {name: steps[0][name] for name in STILL[algorithm]} == pytest.approx(STILL[algorithm], abs=1e-5)
        # Sums in another order, through steps of Adam.
        expected = pytest.approx([step["loss"] for step in alone], rel=1e-4, abs=1e-5)
        assert [step["loss"] for step in steps] == expected, (algorithm, start, kind)
        assert abs(steps[-1]["loss"] - steps[0]["loss"]) > 1e-3
