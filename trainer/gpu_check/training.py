"""Sections on whole runs: every pipeline, every strategy, host stalls, checkpoints, and a launcher."""

from __future__ import annotations

import math
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from torch import nn

from trainer.checkpoint import Checkpointer, Checkpoints
from trainer.compose import compose
from trainer.diagnostics import preflight
from trainer.disk import read_objects
from trainer.gpu_check.bench import SMALL, TINYWORLD, Bench, Training
from trainer.jobs.stages import stage_environment
from trainer.parallel import distributed
from trainer.run import run


def pipelines(bench: Bench) -> None:
    """Three steps of every pipeline by its command line, resumed once for a fourth."""
    for name, overrides in bench.run_by_pipeline().items():
        bench.attempt(name, partial(_run_and_resume, bench, name, overrides))


def _run_and_resume(bench: Bench, name: str, overrides: list[str]) -> None:
    folder = bench.folder / name
    shared = [*QUIET_RUN, f"run_dir={folder}", f"data.cache={bench.folder / 'cache'}", "precision=bf16", *overrides]
    began = time.perf_counter()
    # A rehearsal resumes one that has rows and one that has rollouts.
    last = 4 if not bench.reduced or name in ("pretrain", "ppo") else 3
    for steps in range(3, last + 1):
        run(compose([*shared, f"steps={steps}"]))
    rows = [row for row in _metrics(folder) if "loss" in row]
    bench.note(f"{name}_seconds", time.perf_counter() - began)
    logged = [row["step"] for row in rows]
    bench.require(logged == [*range(1, last + 1)], f"{name}: the steps logged are {logged}")
    bench.require(all(math.isfinite(row["loss"]) for row in rows), f"{name}: a loss is not a number")
    bench.require(any(row["grad_norm"] > 0 for row in rows), f"{name}: nothing is learnt")


QUIET_RUN = ("checkpoint.every=3", "tracking.every=1", "tracking.wandb.mode=disabled", "tracking.tensorboard=false",
             "evaluation.samples=0", "guard.first_step=warn")  # fmt: skip
"""Also: a policy that knows nothing earns nothing, and so learns nothing from its first samples."""


def _metrics(folder: Path) -> list[dict[str, float]]:
    return read_objects(folder / "metrics.jsonl")


def stalls(bench: Bench) -> None:
    """How often the host waits for the device in a step of every pipeline; once is what the contract allows."""
    runs = bench.run_by_pipeline()
    run(compose([*QUIET_RUN, f"run_dir={bench.folder / 'pretrain'}", *runs["pretrain"], "steps=1"]))
    with distributed.session():
        for name, overrides in runs.items() if not bench.reduced else list(runs.items())[:1]:
            bench.attempt(name, partial(_stalls_of, bench, name, overrides))


def _stalls_of(bench: Bench, name: str, overrides: list[str]) -> None:
    with bench.training("precision=bf16", *overrides) as training:
        for _ in range(2):
            training.step()
        micro_batches = training.micro_batches()
        with _counted_stalls(bench) as seen:
            training.step(micro_batches)
    bench.at_most(f"{name}_stalls", len(seen), 1)
    for sentence in dict.fromkeys(seen) if len(seen) > 1 else ():
        bench.problems.append(f"{name}: {sentence}")


@contextmanager
def _counted_stalls(bench: Bench) -> Iterator[list[str]]:
    """Where the host waited, each time; on a CPU nobody waits."""
    seen: list[str] = []
    bench.synchronize()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if bench.device.type == "cuda":
            torch.cuda.set_sync_debug_mode("warn")
        try:
            yield seen
        finally:
            if bench.device.type == "cuda":
                torch.cuda.set_sync_debug_mode("default")
    seen += [f"{Path(w.filename).name}:{w.lineno} waits" for w in caught if "synchronizing" in str(w.message)]


def strategies(bench: Bench) -> None:
    """Two steps of every strategy and format: attention computes in the format, and losses are those of DDP in it."""
    formats = {"bf16": torch.bfloat16} if bench.reduced else {"bf16": torch.bfloat16, "fp16": torch.float16}
    with distributed.session():
        for compute, dtype in formats.items():
            reference: list[float] = []
            variants = [["strategy=ddp"], *([f"strategy=zero{stage}"] for stage in (1, 2, 3)), ["strategy=fsdp"]]
            variants += [
                ["strategy=zero2", "strategy.offload=optimizer"],
                ["strategy=zero3", "strategy.offload=parameters"],
            ]
            if compute == "bf16":
                variants += [[f"strategy={name}", "strategy.autocast=true"] for name in ("zero2", "zero3", "fsdp")]
            if bench.device.type == "cuda":
                variants += [["strategy=fsdp", "strategy.offload=parameters"]]
            for variant in variants:
                name = "_".join([*(v.partition("=")[2] for v in variant), compute])
                bench.attempt(name, partial(_strategy, bench, name, variant, compute, dtype, reference))


def _strategy(
    bench: Bench, name: str, variant: list[str], compute: str, dtype: torch.dtype, reference: list[float]
) -> None:
    with bench.training(*SMALL, *TINYWORLD, f"precision={compute}", *variant) as training:
        formats = _formats_of_attention(training.engine.module)
        losses = [float(training.step()["loss"]) for _ in range(2)]
        trained, before = set(formats), len(formats)
        with training.engine.evaluating(), torch.no_grad():
            batch = training.micro_batches()[0].to(bench.device)
            training.cfg.pipeline.loss(training.models, batch)
        evaluated = set(formats[before:])
    bench.figures[name] = f"{losses[-1]:.4f}"
    bench.require(trained == {dtype}, f"{name}: attention computes in {trained} in training")
    bench.require(evaluated == {dtype}, f"{name}: attention computes in {evaluated} in evaluation")
    if not reference:
        reference += losses
    apart = max(abs(mine - other) for mine, other in zip(losses, reference, strict=True))
    bench.require(apart <= 0.02 * max(reference), f"{name}: losses {losses} are not DDP's, {reference}")


def _formats_of_attention(module: nn.Module) -> list[torch.dtype]:
    """A list that grows by the format of what every attention gives."""
    formats: list[torch.dtype] = []
    for name, layer in module.named_modules():
        if name.endswith("o_proj"):
            layer.register_forward_pre_hook(lambda _, inputs: formats.append(inputs[0].dtype))
    return formats


def checkpoints(bench: Bench) -> None:
    """A checkpoint gives every bit back; how long training stands still for one, written at once and in the background."""
    shape = SMALL if bench.reduced else ("model=125m", "model.compile=false", "model.vocab_size=50304")
    with distributed.session(), bench.training(*TINYWORLD, *shape, "precision=bf16") as training:
        training.step()
        for asynchronous in (False, True):
            folder = bench.folder / f"asynchronous-{asynchronous}"
            checkpointer = Checkpointer(Checkpoints(asynchronous=asynchronous), folder, training.engine, {}, {})
            name = "asynchronous" if asynchronous else "synchronous"
            bench.note(f"{name}_stop_seconds", bench.seconds(lambda c=checkpointer: c.save(1)))  # type: ignore[misc]
            saved = _digest(training)
            training.step()  # while it is written
            checkpointer.close()
            bench.require(_digest(training) != saved, f"{name}: a step changed nothing")
            bench.note(f"{name}_restore_seconds", bench.seconds(checkpointer.restore))
            bench.require(_digest(training) == saved, f"{name}: what was restored is not what was saved")
        size = sum(f.tensor.nbytes for f in training.engine.fragments(owned=True))
    bench.note("checkpoint_gb", size / 1e9)


def _digest(training: Training) -> list[float]:
    return [float(f.tensor.double().sum()) for f in training.engine.fragments(owned=True)]


def launcher(bench: Bench) -> None:
    """The preflight of this machine; through torchrun, a run under ZeRO-2 (NCCL on a GPU) whose steps are profiled."""
    with distributed.session():
        facts = preflight.facts(bench.folder) | preflight.speeds(bench.folder, 16)
    bench.problems += [f"preflight: {problem}" for problem in preflight.problems([facts])]
    bench.note("write_mb_per_second", facts["write"])
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1", "-m", "trainer"]
    overrides = [*QUIET_RUN, *SMALL, *TINYWORLD, f"data.cache={bench.folder / 'cache'}", "run_dir=run", "steps=3"]
    command = [*torchrun, *overrides, "strategy=zero2", "precision=bf16", "profile.steps=2-3"]
    # From another folder, where a relative PYTHONPATH would lead nowhere.
    environment = stage_environment(1)
    done = subprocess.run(command, cwd=bench.folder, env=environment, capture_output=True, text=True, timeout=180)
    print(done.stdout, done.stderr)  # to the section's log
    errors = [line for line in f"{done.stdout}\n{done.stderr}".splitlines() if "Error" in line]
    reason = errors[0].strip()[:300] if errors else "its log says more"
    bench.require(done.returncode == 0, f"torchrun: exit code {done.returncode}; {reason}")
    if done.returncode == 0:
        bench.note("steps", sum("loss" in row for row in _metrics(bench.folder / "run")))
        traces = len(list((bench.folder / "run" / "profile").glob("*.trace.json.gz")))
        bench.require(traces == 1, f"profile.steps=2-3 left {traces} traces")
