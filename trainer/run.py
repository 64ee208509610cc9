"""A run: the configuration's root, and the straight line from it to an exported model."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from trainer.checkpoint import Checkpointer, Checkpoints, Part, run_folder
from trainer.checkpoint.record import defaults, plain, texts_of
from trainer.config import ConfigError, Node, schema, setting
from trainer.data.corpus import Corpus, Data
from trainer.data.tokenizer import Tokenizer, TokenizerChoice, open_tokenizer
from trainer.diagnostics import preflight
from trainer.diagnostics.first_step import FirstStep, validate_first_step
from trainer.diagnostics.guard import FirstStepPolicy, Guard, GuardSettings
from trainer.diagnostics.layout import Layout
from trainer.diagnostics.memory import fit, print_estimate
from trainer.diagnostics.stragglers import Stragglers
from trainer.evaluate import Evaluation
from trainer.export.hugging_face import Export
from trainer.export.lineage import ancestry, model_digests
from trainer.export.peft import export_adapter, merged_weights
from trainer.loop import Step, train
from trainer.models.adapter import Adapter
from trainer.models.architecture import Architecture
from trainer.models.division import validate_mesh
from trainer.models.load import Model, ModelLoader
from trainer.models.qat import QAT
from trainer.models.sizes import parameters_of
from trainer.models.vocabulary import refuse_foreign_tokenizer
from trainer.optim import Optimizer, Schedule
from trainer.parallel import distributed
from trainer.parallel.distributed import World
from trainer.parallel.engine import Engine
from trainer.parallel.malloc import tune_malloc
from trainer.parallel.precision import Precision
from trainer.parallel.strategy import Strategy
from trainer.parallel.watchdog import Watchdog, WatchdogSettings
from trainer.pipelines.base import Models, Pipeline, Plan
from trainer.settings import BatchSizes, Resume, Sweep
from trainer.shipped import SHIPPED as SHIPPED
from trainer.step_log import StepLog, TokenCounter
from trainer.stopping import StopConsensus, Stopped
from trainer.tracking.profiling import Profile
from trainer.tracking.throughput import Speed, Stopwatch
from trainer.tracking.tracker import Tracker, Tracking


@schema("run")
@dataclass
class Run(Node):
    """Everything about a run."""

    name: str = setting("run", "what the run is called")
    run_dir: str = setting("runs/${name}", "the folder of everything that the run leaves behind")
    resume: Resume = setting(
        Resume.auto, "auto: continue what is in run_dir, else start; new: a fresh run_dir-2, -3, ...; never: refuse"
    )
    seed: int = setting(0, "of initialisation, the order of data, and sampling", least=0)
    deterministic: bool = setting(False, "the same bytes again on GPUs, too; attention's backward takes longer there")
    steps: int | None = setting(None, "optimizer steps; or give epochs", least=1)
    epochs: float | None = setting(None, "passes over the data instead of steps", above=0)
    imports: list[str] = setting(list, "modules to import first: they register your own pipelines and data")
    batch: BatchSizes = setting(BatchSizes)
    pipeline: Pipeline = setting()
    model: Model = setting()
    tokenizer: TokenizerChoice = setting(TokenizerChoice)
    data: Data = setting()
    adapter: Adapter = setting()
    qat: QAT = setting(QAT)
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
        self.optimizer.lr = self.base_lr

    def problems(self) -> Iterator[str]:
        if (self.steps is None) == (self.epochs is None):
            given = f"steps={self.steps} and epochs={self.epochs}: give exactly one of them, the other null"
            yield "steps and epochs are both null: give one of them, such as epochs=1" if self.steps is None else given
        if not issubclass(self.data.batch_type, self.pipeline.batch_type):
            wanted, offered = self.pipeline.batch_type.unit, self.data.batch_type.unit
            yield f"the pipeline learns from {wanted} and the data holds {offered}; choose another data="
        yield from self.strategy.validate_optimizer(self.optimizer)
        yield from (*self.pipeline.validate_adapter(self.adapter), *self.model.validate_adapter(self.adapter))
        yield from self.qat.validate_run(self.adapter, self.steps, self.export.dtype, self.export.formats)
        yield from self.pipeline.validate_layout(self.batch, self.strategy.mesh, distributed.ranks())

    def validate_division(self, a: Architecture) -> Iterator[str]:
        """One sentence for everything of a model, and of those that go with it, that the strategy cannot divide."""
        auxiliary, packed = [model for model, _ in self.pipeline.auxiliary_models(a)], self.adapter.packed(a)
        quantizer = self.qat.fake_quantizer(a)
        yield from self.strategy.validate_packed() if packed else ()
        yield from validate_mesh(self.strategy.mesh, a, self.batch.length, packed, auxiliary, quantizer)

    @property
    def base_lr(self) -> float:
        """The learning rate at the top of the schedule."""
        default = self.pipeline.learning_rate * self.adapter.rate
        return default if self.optimizer.lr is None else self.optimizer.lr

    def loader(self, tokenizer: Tokenizer) -> ModelLoader:
        """What builds the models of the run."""
        load = ModelLoader(
            self.model, self.strategy, self.seed, tokenizer.vocab_size, self.adapter, tokenizer.new_tokens,
            self.precision, self.pipeline.scores, longest=self.batch.length,
        )  # fmt: skip
        return load.rounded(self.qat).fitted(self.layout(load.architecture).recompute)

    def open_tokenizer_and_shape(self) -> tuple[Tokenizer, Architecture]:
        """The tokenizer named, else the one in ``model.path``, else the data's own; and the model's shape for it.

        Raises:
            ConfigError: if there is no tokenizer, or the shape does not fit it or the rows.
        """
        path = self.tokenizer.path or self.model.path
        tokenizer = open_tokenizer(path) if path else self.data.default_tokenizer()
        if tokenizer is None:
            raise ConfigError(["model.path is required, or tokenizer.path; 'onecurve tokenize' makes a tokenizer"])
        tokenizer = tokenizer.extended(self.tokenizer.add)
        architecture = self.loader(tokenizer).architecture
        refuse_foreign_tokenizer(tokenizer, self.tokenizer.path, self.model.path, architecture.vocab_size)
        if architecture.scores:
            tokenizer = tokenizer.with_own_pad()
        if self.batch.length > (longest := architecture.max_position_embeddings):
            rule = f"more than the model's {longest} positions; use at most {longest}"
            raise ConfigError([f"batch.length={self.batch.length} is {rule}"])
        self.adapter.validate_architecture(architecture)
        exports = self.export.validate(architecture, tokenizer, self.adapter)
        problems = [*self.validate_division(architecture), *self.pipeline.validate_tokenizer(tokenizer), *exports]
        if problems := [*problems, *self.pipeline.validate_adapter(self.adapter, tokenizer.new_tokens)]:
            raise ConfigError(problems)
        return tokenizer, architecture

    def open_corpus(self, tokenizer: Tokenizer) -> Corpus:
        """The run's data, prepared now or before."""
        return self.data.open(tokenizer, self.pipeline.data_length(self.batch.length), self.seed)

    def summary(self, architecture: Architecture) -> str:
        """What is trained, and how, in a line."""
        pipeline, dtype = type(self.pipeline).__name__.lower(), str(self.precision.dtype).removeprefix("torch.")
        model = self.model.path or f"a new {architecture.family} model"
        adapters = self.adapter.trained(architecture, grown=bool(self.tokenizer.add))
        trained = f"{adapters:,} beside them trained" if adapters else "all trained"
        how = f"{dtype}, strategy={self.strategy.name}, {distributed.ranks()} rank(s)"
        return f"{pipeline} of {model}: {parameters_of(architecture):,} parameters, {trained}; {how}"

    def remarks(self, load: ModelLoader, engine: Engine, last: int) -> Iterator[str]:
        """What is to be said at the start of a run of ``last`` steps: what was decided, and what is not as it is set."""
        yield from (*self.model.decided(load.config), *load.remarks())
        yield from (*self.schedule.remarks(last), *self.qat.remarks())
        yield from self.optimizer.remarks(engine.module, self.strategy.shape_of)
        yield from filter(None, [distributed.world().attention])

    def layout(
        self, a: Architecture, ranks: int | None = None, *, cuda: bool | None = None, limit: float | None = None
    ) -> Layout:
        """What the estimate of memory and time needs to know, on ``ranks`` ranks of ``limit`` bytes; None = as here."""
        cuda = torch.cuda.is_available() if cuda is None else cuda
        layout = Layout.of(
            self.strategy, self.precision, self.batch, ranks or distributed.ranks(), cuda=cuda, moment=self.optimizer.moment,
            adapters=self.adapter.trained(a, bool(self.tokenizer.add)), packed=self.adapter.packed_elements(a),
            auxiliary=tuple(self.pipeline.auxiliary_models(a)),
        )  # fmt: skip
        recompute = self.model.activation_checkpointing
        return replace(layout, recompute=recompute) if recompute else fit(a, layout, limit)

    def made_from(self, tokenizer: Tokenizer, corpus: Corpus) -> dict[str, Any]:
        """Fingerprints that a resumed run must have again, and what the report says about the start."""
        return {
            "data": corpus.fingerprint,
            "tokenizer": tokenizer.fingerprint,
            "floors": corpus.floors,
            "statistics": corpus.summary,
            "models": model_digests(texts_of(self)),
            "defaults": defaults(self),
            "initial_loss": self.pipeline.initial_loss,
        }

    def check_ranks(self, folder: Path, architecture: Architecture, world: World) -> Mapping[int, str]:
        """Compare software, settings and machines of several ranks; gives where each runs, if it was asked for."""
        if not self.preflight or world.devices == 1:
            return {}
        return preflight.quick(folder, plain(self), architecture, self.layout(architecture, world.devices))

    def length(self, corpus: Corpus) -> int:
        """Optimizer steps of the whole run."""
        steps = self.pipeline.steps(len(corpus.train), self.epochs or 0, self.batch.size)
        return self.steps or max(1, math.ceil(steps))


def run(cfg: Run) -> dict[str, float]:
    """Carry out a run, from its configuration to its exported model; gives the last value of every metric.

    Raises:
        Stopped: saved before its last step, because a signal or a time limit asked for it.
    """
    tune_malloc()
    tokenizer, architecture = cfg.open_tokenizer_and_shape()
    if cfg.estimate:
        return print_estimate(cfg.summary(architecture), architecture, cfg.layout(architecture))
    cfg.optimizer.check_machine()
    load, corpus = cfg.loader(tokenizer).validated(), cfg.open_corpus(tokenizer)
    made_from, lineage = cfg.made_from(tokenizer, corpus), ancestry(texts_of(cfg))
    folder = run_folder.choose(cfg.run_dir, cfg.resume, cfg, made_from)
    with (
        Watchdog(cfg.watchdog) as watchdog,
        distributed.session(same_bytes=cfg.deterministic, replica=cfg.strategy.mesh.replica) as world,
        run_folder.begin(folder, cfg, made_from, world.devices) as attempt,
    ):
        record = {**attempt.facts, "config": plain(cfg), **lineage}
        hosts = cfg.check_ranks(folder, architecture, world)
        models = cfg.pipeline.models(load, tokenizer)
        engine = cfg.strategy.wrap(models.trained, cfg.optimizer, cfg.precision)
        models.trained, models.balancer = engine.model, cfg.model.balancer(engine.module, cfg.adapter)
        watchdog.started()
        cfg.pipeline.prepare(models, engine, corpus, cfg.data.cache_folder)
        watch = Stopwatch(world.device, watchdog)
        guard, tokens = Guard(cfg.guard, world.device), TokenCounter(world.device)
        plan = Plan(cfg.batch.size, cfg.batch.micro, cfg.batch.length, cfg.seed, watch)
        with closing(cfg.pipeline.batches(models, engine, corpus, plan)) as batches:
            parts: dict[str, Part] = {"data": batches, "guard": guard, "seen": tokens, **models.parts}
            with watchdog.phase("restore"):
                checkpoints = Checkpointer(cfg.checkpoint, folder / "checkpoints", engine, parts, attempt.facts)
                done, last = checkpoints.restore(), cfg.length(corpus)
                attempt.accept(done, last)
            schedule = partial(cfg.schedule, steps=last)
            speed = Speed(watch, architecture, world, cfg.precision.dtype, float(tokens.tokens))
            with (
                Tracker(cfg.tracking, folder, main=world.is_main, done=done, last=last, facts=record) as tracker,
                cfg.profile.recording(folder / "profile", done + 1) as profiler,
                watchdog.phase("step"),  # between the laps of a step, where metrics meet and saves are completed
            ):
                tracker.say([cfg.summary(architecture), *cfg.remarks(load, engine, last), *corpus.summary])
                stop = StopConsensus(cfg.checkpoint.before_deadline)
                log = StepLog(tracker, guard, stop, speed, tokens, Stragglers(engine.module, world.device, hosts))
                session = Session(cfg, load, corpus, models, engine, checkpoints, tracker, log, watch)
                if cfg.evaluation.first and done == 0:
                    session.evaluate(0)
                for step in train(
                    cfg.pipeline, models, engine, batches, schedule, guard, watch, seed=cfg.seed, first=done + 1, last=last,
                    accumulate=cfg.batch.size // (cfg.batch.micro * world.data.size),
                ):  # fmt: skip
                    watchdog.done(step.number, engine)
                    profiler.done(step.number)
                    log.push(step, lr=cfg.base_lr * schedule(step.number))
                    session.after(step, last)
                with watchdog.phase("export"):
                    session.export(folder, record, last)
        return tracker.latest


@dataclass(frozen=True)
class Session:
    """The parts of a run while it trains, and what happens between its steps."""

    cfg: Run
    load: ModelLoader
    corpus: Corpus
    models: Models
    engine: Engine
    checkpoints: Checkpointer
    tracker: Tracker
    log: StepLog
    watch: Stopwatch

    def after(self, step: Step, last: int) -> None:
        """Validate, evaluate and save where that is due after ``step``.

        Raises:
            Stopped: where the ranks agreed to stop; the run is saved then.
        """
        cfg, number = self.cfg, step.number
        self.checkpoints.advance()
        if number == 1 and cfg.guard.first_step is not FirstStepPolicy.off:
            self._validate_first(step)
        stopping = self.log.stop.reached and number < last
        if stopping:  # there may be no time for an evaluation
            self.save(number)
        if cfg.evaluation.due(number, last):
            self.evaluate(number, final=number == last)
        if cfg.checkpoint.due(number, last) and not stopping:
            self.save(number)
        if stopping:
            self.checkpoints.close()
            raise Stopped(number, last, self.log.stop.reason)

    def evaluate(self, step: int, *, final: bool = False) -> None:
        """Measure held-out data and answer held-out prompts; collective. ``final``: after it the model is exported."""
        self.log.flush()
        evaluation, tracker, micro = self.cfg.evaluation, self.tracker, self.cfg.batch.micro
        parts = (self.cfg.pipeline, self.models, self.engine)
        with self.watch.lap("evaluation"):
            measured = evaluation.measure(*parts, self.corpus.heldout, micro)
            scores, samples = evaluation.answer(*parts, self.corpus, step, self.cfg.seed)
            scores |= evaluation.measure_on_original(*parts, self.corpus, self.load, micro) if final else {}
        tracker.log(step, {**{name: float(value) for name, value in measured.values.items()}, **scores})
        tracker.histograms(step, measured.units)
        tracker.table(step, "errors", measured.errors)
        tracker.table(step, "samples", samples)
        tracker.report()

    def save(self, step: int) -> None:
        """Write a checkpoint that counts on everything that was logged; collective."""
        self.log.flush()
        self.tracker.sync()
        with self.watch.lap("checkpoint"):
            self.checkpoints.save(step)

    def export(self, folder: Path, record: Mapping[str, Any], step: int) -> None:
        """Write the model in the formats that others read, with the ``record`` of how it was made; collective."""
        self.log.flush()
        self.checkpoints.close()
        tokenizer = self.models.tokenizer
        facts = {**record, **self.cfg.adapter.record(self.cfg.model.path, self.tracker.latest), "step": step}
        facts |= self.cfg.pipeline.finalize(self.models, self.engine, self.corpus)
        if self.cfg.adapter.exports:
            weights = partial(merged_weights, self.engine, self.load, self.cfg.pipeline.exports)
            self.cfg.export.write(folder / "export", weights, self.load, tokenizer, facts)
            self.tracker.next_command = self.cfg.pipeline.next_command.format(export=folder / "export")
        export_adapter(folder / "adapter", self.engine, self.load, tokenizer, facts)
        with self.watch.unlimited("formats"):
            self.cfg.export.write_formats(folder, self.corpus, self.cfg.evaluation.sample_tokens, self.tracker.say)

    def _validate_first(self, step: Step) -> None:
        self.log.flush()
        compute, tokenizer = self.cfg.precision.compute, self.models.tokenizer
        first = FirstStep(self.tracker.latest, step.micro_batches, self.load, tokenizer, compute)
        validate_first_step(self.cfg.pipeline.first_step_problems(first), self.cfg.guard.first_step)
