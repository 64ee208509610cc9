"""What a section of `onecurve check-gpu` works with: a device, small models and data, and a place for its findings."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainer.batch import Documents, PackedRows
from trainer.compose import compose
from trainer.diagnostics.guard import Guard
from trainer.loop import train_step
from trainer.parallel import distributed
from trainer.parallel.engine import Engine
from trainer.pipelines.base import Models, Plan, Source
from trainer.run import Run
from trainer.tinyworld.tasks import files
from trainer.tracking.throughput import Stopwatch

QUIET = ("tracking.wandb.mode=disabled", "tracking.tensorboard=false", "evaluation.samples=0")
SMALL = (
    "model.hidden_size=128", "model.intermediate_size=256", "model.num_hidden_layers=2", "model.num_attention_heads=2",
    "model.num_key_value_heads=1", "model.head_dim=64",
)  # fmt: skip
"""A model that every kernel takes."""
TINYWORLD = (*QUIET, "data.documents=400", "data.heldout=20", "batch.size=8", "batch.micro=4", "batch.length=128")
"""A pretraining run of a few steps."""


@dataclass
class Training:
    """A run up to its first step: what `trainer.run.run` sets up."""

    cfg: Run
    models: Models
    engine: Engine
    batches: Source
    guard: Guard
    watch: Stopwatch

    def micro_batches(self) -> list[Any]:
        """What the next step learns from."""
        return list(islice(self.batches, self.cfg.batch.size // self.cfg.batch.micro))

    def step(self, micro_batches: Sequence[Any] | None = None) -> dict[str, Tensor]:
        """Take a step at the base learning rate; its metrics, on the device."""
        self.engine.set_lr(1.0)
        batches = self.micro_batches() if micro_batches is None else micro_batches
        return train_step(self.cfg.pipeline, self.models, self.engine, self.guard, self.watch, batches)


@dataclass
class Bench:
    """The device of a section, its folder, and what it finds.

    device: what is checked
    reduced: whether everything is small, because the device is a CPU
    folder: a new folder of the section's own
    figures: what was measured, by name
    problems: what is wrong, a sentence each
    """

    device: torch.device
    reduced: bool
    folder: Path
    figures: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def note(self, name: str, value: float) -> None:
        """Record a figure, to four digits."""
        self.figures[name] = float(f"{value:.4g}") if math.isfinite(value) else str(value)

    def at_most(self, name: str, value: float, limit: float) -> None:
        """Record a figure, and that it is wrong where it is above its limit or not a number."""
        self.note(name, value)
        self.require(value <= limit, f"{name} is {value:.4g}, above {limit:g}")

    def require(self, holds: bool, sentence: str) -> None:
        """Record a problem unless it ``holds``."""
        if not holds:
            self.problems.append(sentence)

    def attempt(self, name: str, action: Callable[[], None]) -> None:
        """Run a part of a section; where it fails that is a problem, and the next part follows."""
        try:
            action()
        except Exception as error:
            self.problems.append(f"{name}: {type(error).__name__}: {str(error).strip().splitlines()[0][:300]}")

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def seconds(self, action: Callable[[], Any], times: int = 1) -> float:
        """Seconds of ``action`` on the device, the mean of ``times`` in a row."""
        self.synchronize()
        began = time.perf_counter()
        for _ in range(times):
            action()
        self.synchronize()
        return (time.perf_counter() - began) / times

    @contextmanager
    def training(self, *overrides: str) -> Iterator[Training]:
        """A run of these overrides up to its first step; inside a session of ranks."""
        cfg = compose([*QUIET, f"run_dir={self.folder / 'run'}", f"data.cache={self.folder / 'cache'}", *overrides])
        tokenizer, _ = cfg.open_tokenizer_and_shape()
        load, corpus = cfg.loader(tokenizer), cfg.open_corpus(tokenizer)
        models = cfg.pipeline.models(load, tokenizer)
        engine = cfg.strategy.wrap(models.trained, cfg.optimizer, cfg.precision)
        models.trained = engine.model
        cfg.pipeline.prepare(models, engine, corpus, cfg.data.cache_folder)
        device = distributed.world().device
        watch = Stopwatch(device)
        plan = Plan(cfg.batch.size, cfg.batch.micro, cfg.batch.length, cfg.seed, watch)
        with closing(cfg.pipeline.batches(models, engine, corpus, plan)) as batches:
            yield Training(cfg, models, engine, batches, Guard(cfg.guard, device), watch)

    def run_by_pipeline(self) -> dict[str, list[str]]:
        """Overrides of a small run of every pipeline, on tasks of tiny world that are written now."""
        for name, rows in files(0, {"sft": (64, 8), "preference": (64, 8), "prompts": (64, 8)}):
            _write(self.folder / name, rows)
            if name.startswith("preference"):
                sides = (("chosen", True), ("rejected", False))
                labelled = [
                    {"prompt": r["prompt"], "completion": r[s], "label": good} for r in rows for s, good in sides
                ]
                _write(self.folder / name.replace("preference", "labelled"), labelled)
        rollout = [
            "pipeline=ppo", *self._data("prompts", "prompts"), "reward@pipeline.reward.main=function",
            f"pipeline.reward.main.function={__name__}.brevity",
            "pipeline.rollout.size=16", "pipeline.rollout.tokens=16", "pipeline.rollout.temperature=1",
        ]  # fmt: skip
        tasks = {
            "sft": ["pipeline=sft", *self._data("chat", "sft")],
            "lora": ["pipeline=sft", "adapter=lora", "adapter.rank=8", *self._data("chat", "sft")],
            "reward": ["pipeline=reward", *self._data("preference", "preference")],
            "dpo": ["pipeline=dpo", *self._data("preference", "preference")],
            "kto": ["pipeline=kto", *self._data("labelled", "labelled")],
            "ppo": ["pipeline.critic=policy", *rollout],
            "grpo": ["pipeline.advantage=grpo", "pipeline.samples_per_prompt=4", *rollout],
        }
        start = f"model.path={self.folder / 'pretrain' / 'export'}"
        return {"pretrain": [*SMALL, *TINYWORLD], **{name: [start, *task] for name, task in tasks.items()}}

    def _data(self, kind: str, stem: str) -> list[str]:
        return [
            f"data={kind}", f"data.train=[{self.folder}/{stem}_train.jsonl]", "data.template=plain", "batch.length=128",
            f"data.eval=[{self.folder}/{stem}_held.jsonl]", "batch.size=8", "batch.micro=4",
        ]  # fmt: skip


def brevity(prompts: list[str], completions: list[str], rows: list[dict[str, Any]]) -> list[float]:
    """A reward that a model without any knowledge earns differently from sample to sample."""
    return [-len(text) / 20 for text in completions]


def random_rows(vocabulary: int, rows: int, length: int) -> PackedRows:
    """Rows of one document each, of tokens without meaning: the work of real ones."""
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(vocabulary, (rows, length + 1), generator=draw)
    documents, mask = Documents.from_lengths([length] * rows, rows), torch.ones(rows, length)
    real = torch.tensor(float(rows * length), dtype=torch.float64)
    return PackedRows(torch.arange(rows), ids[:, :-1].contiguous(), documents, real, ids[:, 1:].contiguous(), mask)


def _write(file: Path, rows: Sequence[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
