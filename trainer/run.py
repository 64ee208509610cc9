"""A run: the configuration's root, and the straight line from it to an exported model."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from typing import Any

import torch
from torch import Tensor

from trainer import stopping
from trainer.checkpoint import Checkpointer, Checkpoints, Part, run_folder
from trainer.checkpoint.run_folder import plain
from trainer.config import ConfigError, Node, schema, setting
from trainer.data.chats import ChatData
from trainer.data.corpus import Corpus, Data
from trainer.data.labelled import LabelledData
from trainer.data.preferences import PreferenceData
from trainer.data.prompts import PromptData
from trainer.data.tokenizer import Tokenizer, TokenizerChoice, open_tokenizer
from trainer.diagnostics import preflight
from trainer.diagnostics.first_step import FirstStep, validate_first_step
from trainer.diagnostics.guard import FirstStepPolicy, Guard, GuardSettings
from trainer.diagnostics.memory import Layout, memory, parameters_of
from trainer.diagnostics.stragglers import Stragglers
from trainer.evaluate import Evaluation
from trainer.export.hugging_face import Export
from trainer.export.lineage import ancestry
from trainer.loop import train
from trainer.metrics import Readback
from trainer.models.architecture import Architecture
from trainer.models.load import Model, ModelLoader
from trainer.models.lora import Adapter, Full, LoRA
from trainer.optim import Optimizer, Schedule
from trainer.parallel import distributed
from trainer.parallel.ddp import DDP
from trainer.parallel.engine import Engine
from trainer.parallel.malloc import tune_malloc
from trainer.parallel.precision import Precision
from trainer.parallel.strategy import Strategy
from trainer.parallel.watchdog import Watchdog, WatchdogSettings
from trainer.parallel.zero import Zero1, Zero2, Zero3
from trainer.pipelines.base import Pipeline, Plan
from trainer.pipelines.dpo import DPO
from trainer.pipelines.kto import KTO
from trainer.pipelines.ppo import PPO
from trainer.pipelines.pretrain import Pretrain
from trainer.pipelines.reward import Reward
from trainer.pipelines.sft import SFT
from trainer.tinyworld.data import TinyWorldData
from trainer.tracking.profiling import Profile
from trainer.tracking.progress import PendingStep, TokenCounter
from trainer.tracking.throughput import Speed, Stopwatch
from trainer.tracking.tracker import Tracker, Tracking

SHIPPED = (
    Pretrain, SFT, Reward, DPO, KTO, PPO, Full, LoRA, DDP, Zero1, Zero2, Zero3, TinyWorldData, ChatData, PreferenceData,
    LabelledData, PromptData,
)  # fmt: skip
"""Choices that come with the framework: naming them here registers them."""


class Resume(StrEnum):
    """What to do with what is in ``run_dir``."""

    auto = "auto"
    new = "new"
    never = "never"


@schema("batch")
@dataclass
class BatchSizes(Node):
    """How much is learnt from at once. A unit is a packed row (pretrain, sft), a pair (reward, dpo) or a completion (ppo)."""

    size: int = setting(32, "units of a step, over all ranks", least=1)
    micro: int = setting(8, "units of a forward on one rank", least=1)
    length: int = setting(512, "tokens of a row", least=2)

    def problems(self) -> Iterator[str]:
        ranks = distributed.ranks()
        unit = self.micro * ranks
        if self.size % unit:
            below = self.size // unit * unit
            nearest = f"{below} or {below + unit}" if below else f"{unit}, or a smaller batch.micro"
            word = "rank" if ranks == 1 else "ranks"
            yield (
                f"batch.size={self.size} is not a multiple of {unit} ({ranks} {word} x batch.micro={self.micro}); "
                f"use {nearest}"
            )


class Direction(StrEnum):
    """Which end of the metric is the better one."""

    minimize = "minimize"
    maximize = "maximize"


@schema("sweep")
@dataclass
class Sweep(Node):
    """How the points of a sweep run (``--multirun``)."""

    ranks: int = setting(
        1, "ranks of a point on this machine; a point that is a job of its own has one a task", least=1
    )
    metric: str = setting("eval/loss", "the metric that points are compared by, at the end of each")
    direction: Direction = setting(Direction.minimize, "which end of the metric is the better one")


@schema("run")
@dataclass
class Run(Node):
    """Everything about a run."""

    name: str = setting("run", "what the run is called")
    run_dir: str = setting("runs/${name}", "the folder of everything that the run leaves behind")
    resume: Resume = setting(
        Resume.auto,
        "auto: continue what is in run_dir, else start; new: a fresh run_dir-2, -3, ...; never: refuse",
    )
    seed: int = setting(0, "of initialisation, the order of data, and sampling", least=0)
    steps: int | None = setting(None, "optimizer steps; or give epochs", least=1)
    epochs: float | None = setting(None, "passes over the data instead of steps", above=0)
    imports: list[str] = setting(list, "modules to import first: they register your own pipelines and data")
    batch: BatchSizes = setting(BatchSizes)
    pipeline: Pipeline = setting()
    model: Model = setting()
    tokenizer: TokenizerChoice = setting(TokenizerChoice)
    data: Data = setting()
    adapter: Adapter = setting()
    strategy: Strategy = setting()
    precision: Precision = setting()
    optimizer: Optimizer = setting()
    schedule: Schedule = setting()
    guard: GuardSettings = setting(GuardSettings)
    watchdog: WatchdogSettings = setting(WatchdogSettings)
    checkpoint: Checkpoints = setting(Checkpoints)
    evaluation: Evaluation = setting(Evaluation)
    export: Export = setting(Export)
    tracking: Tracking = setting()
    profile: Profile = setting(Profile)
    sweep: Sweep = setting(Sweep)
    preflight: bool = setting(True, "several ranks: check first that software, settings, clocks, sums and room fit")
    estimate: bool = setting(False, "say what memory and time a rank would need, and run nothing")

    def __post_init__(self) -> None:
        if self.optimizer.lr is None:
            self.optimizer.lr = self.base_lr

    def problems(self) -> Iterator[str]:
        if (self.steps is None) == (self.epochs is None):
            given = f"steps={self.steps} and epochs={self.epochs}"
            yield f"{given}: give exactly one of them, the other null"
        if not issubclass(self.data.batch_type, self.pipeline.batch_type):
            wanted, held = self.pipeline.batch_type.unit, self.data.batch_type.unit
            yield f"the pipeline learns from {wanted} and the data holds {held}; choose another data="
        yield from self.strategy.refusals(self.optimizer)
        yield from self.pipeline.validate_adapter(self.adapter)
        yield from self.pipeline.validate_batch(self.batch, distributed.ranks())
        if self.steps is not None and self.schedule.warmup > self.steps:
            yield f"schedule.warmup={self.schedule.warmup} is more than steps={self.steps}; use at most {self.steps}"

    @property
    def base_lr(self) -> float:
        """The learning rate at the top of the schedule."""
        default = self.pipeline.learning_rate * self.adapter.rate
        return default if self.optimizer.lr is None else self.optimizer.lr

    def loader(self, tokenizer: Tokenizer) -> ModelLoader:
        """What builds the models of the run."""
        return ModelLoader(
            self.model, self.strategy, self.seed, tokenizer.vocab_size, self.adapter, bool(self.tokenizer.add),
            self.precision, self.pipeline.scores,
        )  # fmt: skip

    def open_tokenizer_and_shape(self) -> tuple[Tokenizer, Architecture]:
        """The tokenizer named, else the one in ``model.path``, else the data's own; and the model's shape for it.

        Raises:
            ConfigError: if there is no tokenizer, or the shape does not fit it or the rows.
        """
        path = self.tokenizer.path or self.model.path
        tokenizer = open_tokenizer(path) if path else self.data.default_tokenizer()
        if tokenizer is None:
            raise ConfigError(
                [
                    "tokenizer.path is required for this data and a new model; scripts/train_tokenizer.py makes a tokenizer"
                ]
            )
        tokenizer = tokenizer.extended(self.tokenizer.add)
        architecture = self.loader(tokenizer).architecture
        if architecture.scores:
            tokenizer = tokenizer.with_own_pad()
        longest = architecture.max_position_embeddings
        if self.batch.length > longest:
            raise ConfigError(
                [
                    f"batch.length={self.batch.length} is more than the model's {longest} positions; use at most {longest}"
                ]
            )
        self.adapter.check(architecture)
        if problems := list(self.pipeline.validate_tokenizer(tokenizer)):
            raise ConfigError(problems)
        return tokenizer, architecture

    def layout(self, architecture: Architecture, ranks: int, *, cuda: bool) -> Layout:
        """What the estimate of memory and time needs to know, on ``ranks`` ranks."""
        return Layout(
            stage=self.strategy.stage, ranks=ranks, low=self.strategy.low(self.precision, cuda=cuda),
            compute=self.precision.dtype.itemsize, micro=self.batch.micro, length=self.batch.length,
            recompute=self.model.activation_checkpointing, offload=getattr(self.strategy, "offload", "none"), cuda=cuda,
            adapters=self.adapter.trained(architecture), beside=tuple(self.pipeline.auxiliary_models(architecture)),
        )  # fmt: skip

    def length(self, corpus: Corpus) -> int:
        """Optimizer steps of the whole run."""
        return self.steps or max(
            1, math.ceil(self.pipeline.steps(len(corpus.train), self.epochs or 0, self.batch.size))
        )


def run(cfg: Run) -> dict[str, float]:
    """Carry a run out, to its exported model; gives the last value of every metric, or raises `Stopped` where asked to."""
    tune_malloc()
    tokenizer, architecture = cfg.open_tokenizer_and_shape()
    if cfg.estimate:
        return say_estimate(cfg, architecture)
    loader = cfg.loader(tokenizer)
    corpus = cfg.data.open(tokenizer, cfg.pipeline.data_length(cfg.batch.length), cfg.seed)
    made_from: dict[str, Any] = {
        "data": corpus.fingerprint,
        "tokenizer": tokenizer.fingerprint,
        "floors": corpus.floors,
    }
    made_from |= {"statistics": corpus.summary, "defaults": run_folder.defaults(cfg)}
    made_from["initial_loss"] = cfg.pipeline.initial_loss
    made_from |= cfg.adapter.made_from(loader.files)
    lineage = ancestry(plain(cfg))
    folder = run_folder.choose(cfg.run_dir, cfg.resume, plain(cfg), made_from)
    with (
        Watchdog(cfg.watchdog) as watchdog,
        distributed.session() as world,
        run_folder.begin(folder, plain(cfg), made_from, world.devices) as facts,
        ExitStack() as work,
    ):
        layout = cfg.layout(architecture, world.devices, cuda=world.device.type == "cuda")
        hosts = preflight.quick(folder, plain(cfg), architecture, layout) if cfg.preflight and world.devices > 1 else {}
        models = cfg.pipeline.models(loader, tokenizer)
        engine = cfg.strategy.wrap(models.trained, cfg.optimizer, cfg.precision)
        models.trained = engine.model
        watchdog.started()
        cfg.pipeline.prepare(models, engine, corpus, cfg.data.cache_folder)
        guard, seen, watch = (
            Guard(cfg.guard, world.device),
            TokenCounter(world.device),
            Stopwatch(world.device, watchdog),
        )
        plan = Plan(cfg.batch.size, cfg.batch.micro, cfg.batch.length, cfg.seed, watch)
        batches = cfg.pipeline.batches(models, engine, corpus, plan)
        work.callback(batches.close)
        parts: dict[str, Part] = {"data": batches, "guard": guard, "seen": seen}
        with watchdog.phase("restore"):
            checkpoints = Checkpointer(cfg.checkpoint, folder / "checkpoints", engine, parts, facts)
            done, last = checkpoints.restore(), cfg.length(corpus)
        schedule = partial(cfg.schedule, steps=last)
        steps = train(
            cfg.pipeline, models, engine, batches, schedule, guard, watch,
            seed=cfg.seed, first=done + 1, last=last, accumulate=cfg.batch.size // (cfg.batch.micro * world.data.size),
        )  # fmt: skip
        speed = Speed(watch, architecture, world, cfg.precision.dtype, float(seen.tokens))
        readback: Readback[PendingStep] = Readback()
        stop = stopping.Agreement(cfg.checkpoint.before_deadline)
        stragglers = Stragglers(engine.model, world.device, hosts)
        with (
            Tracker(cfg.tracking, folder, main=world.is_main, done=done, last=last, facts=facts) as tracker,
            cfg.profile.recording(folder / "profile", done + 1) as profiler,
            watchdog.phase("step"),  # what lies between the laps of a step: metrics meet there, and asynchronous saves
        ):
            tracker.say(corpus.summary)

            def log(arrived: list[tuple[dict[str, float], PendingStep]]) -> None:
                for values, step in arrived:
                    stop.hear(values.pop("stopping"))
                    guard.check(step.number, values, step.rows)
                    rates = speed.figures(values["tokens"], step.timing)
                    tracker.step(step.number, {**values, "lr": step.lr, **rates, **step.compared})

            def evaluate(number: int) -> None:
                log(readback.flush())
                with watch.lap("evaluation"):
                    found = cfg.evaluation.measure(cfg.pipeline, models, engine, corpus.heldout, cfg.batch.micro)
                    judged, samples = cfg.evaluation.answer(cfg.pipeline, models, engine, corpus, number, cfg.seed)
                tracker.log(number, {**{name: float(value) for name, value in found.values.items()}, **judged})
                tracker.histograms(number, found.units)
                tracker.table(number, "errors", found.errors)
                tracker.table(number, "samples", samples)
                tracker.report()

            def save(number: int) -> None:
                log(readback.flush())
                tracker.sync()
                with watch.lap("checkpoint"):
                    checkpoints.save(number)

            if cfg.evaluation.first and done == 0:
                evaluate(0)
            for step in steps:
                watchdog.done(step.number, engine)
                profiler.done(step.number)
                checkpoints.advance()
                tracker.table(step.number, "samples", step.shown)
                values = {**step.metrics, "tokens": seen.add(step.metrics["tokens"])}
                speed.count(sum(batch.pairs for batch in step.micro_batches))
                rows = [row for batch in step.micro_batches for row in batch.rows.tolist()]
                timing = speed.lap()
                compared = stragglers.observe(step.number, timing.laps.get("data", 0.0))
                lr = cfg.base_lr * schedule(step.number)
                log(readback.push(values, PendingStep(step.number, lr, rows, timing, compared)))
                if step.number == 1 and cfg.guard.first_step is not FirstStepPolicy.off:
                    log(readback.flush())
                    start = FirstStep(tracker.latest, step.micro_batches, loader, tokenizer, cfg.precision.compute)
                    validate_first_step(cfg.pipeline.first_step_problems(start), cfg.guard.first_step)
                stopped = stop.reached and step.number < last
                if stopped:  # there may be no time for an evaluation
                    save(step.number)
                if cfg.evaluation.due(step.number, last):
                    evaluate(step.number)
                if cfg.checkpoint.due(step.number, last) and not stopped:
                    save(step.number)
                if stopped:
                    checkpoints.close()
                    raise stopping.Stopped(step.number, last, stop.reason)
            log(readback.flush())
            with watchdog.phase("export"):
                checkpoints.close()
                record = {
                    "config": plain(cfg),
                    **lineage,
                    **cfg.pipeline.finalize(models, engine, corpus),
                    "step": last,
                }
                weights = partial(exported, cfg, engine, loader)
                if cfg.adapter.exports:
                    cfg.export.write(folder / "export", weights, architecture, tokenizer, {**facts, **record})
                cfg.adapter.write(folder / "adapter", engine, loader, tokenizer)
        return tracker.latest


def exported(cfg: Run, engine: Engine, loader: ModelLoader) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the model that is exported; collective, complete on the first rank."""
    return ((name, tensor) for name, tensor in cfg.adapter.weights(engine, loader) if cfg.pipeline.exports(name))


def say_estimate(cfg: Run, architecture: Architecture) -> dict[str, float]:
    """Print what a rank of this run would hold; gives the sum as ``memory_gb``."""
    layout = cfg.layout(architecture, distributed.ranks(), cuda=torch.cuda.is_available())
    found = memory(architecture, layout)
    print(
        f"{parameters_of(architecture):,} parameters, strategy={cfg.strategy.name}, {layout.ranks} rank(s); memory of a rank:"
    )
    print("\n".join(found.lines()))
    print("scripts/estimate.py does the same for other devices and ranks, with time and advice")
    return {"memory_gb": found.total / 1e9}
