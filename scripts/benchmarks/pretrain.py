"""How fast Onecurve trains, beside Hugging Face's Trainer on the same machine, model and data.

    python scripts/benchmarks/pretrain.py [--rounds 3] [--steps 3] [--model smollm2-135m] [--length 512] [--size 8]

Both sides run in processes of their own, alternating, so that a machine that slows down slows both; the figure to read is the
ratio of neighbours. Then one profiled step says where our time goes, beside the rate of a bare matrix product.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from side_by_side import KEPT_MEMORY

ROWS = 512


def main() -> None:
    """Run the comparison, or one side of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--side", choices=["onecurve", "transformers", "profile", "product"], help="one process of the comparison"
    )
    parser.add_argument("--rounds", type=int, default=3, help="alternations")
    parser.add_argument("--steps", type=int, default=3, help="timed steps a process, after one that is not")
    parser.add_argument("--model", default="smollm2-135m", help="a choice of configs/model")
    parser.add_argument("--length", type=int, default=512, help="tokens a row")
    parser.add_argument("--size", type=int, default=8, help="rows a step")
    parser.add_argument("--micro", type=int, default=2, help="rows a forward, ours")
    parser.add_argument("--their-micro", type=int, default=2, help="rows a forward, theirs")
    parser.add_argument("--precision", default="bf16", choices=["fp32", "bf16"])
    parser.add_argument("--compile", action="store_true", help="compile both")
    a = parser.parse_args()
    if a.side:
        result = {"onecurve": ours, "transformers": theirs, "profile": profile, "product": product}[a.side](a)
        print(f"RESULT {json.dumps(result)}", flush=True)
        return
    compare(a)


def compare(a: argparse.Namespace) -> None:
    """Alternate the two sides and print a table."""
    runs: dict[str, list[dict[str, float]]] = {"onecurve": [], "transformers": []}
    rate = child("product")["flops"]
    for number in range(a.rounds):
        for side in runs if number % 2 == 0 else reversed(runs):
            runs[side].append(child(side))
            print(f"round {number + 1}: {side:12} {json.dumps(runs[side][-1])}", flush=True)
    ratios = [o["tokens_per_second"] / t["tokens_per_second"] for o, t in zip(*runs.values(), strict=True)]
    print(f"\n{a.model}, {a.size} rows of {a.length} a step, {a.precision}, {device_name()}, torch {torch.__version__}")
    print(f"bare matrix product ({a.precision}, 2048): {rate / 1e9:,.0f} GFLOP/s")
    for side, held in runs.items():
        tokens = statistics.median(r["tokens_per_second"] for r in held)
        memory = max(r["memory_gb"] for r in held)
        used = statistics.median(r["flops_per_token"] for r in runs["onecurve"]) * tokens / rate
        print(f"{side:12} {tokens:9,.1f} tokens/s   {memory:5.2f} GB   {used:5.1%} of the matrix product's rate")
    print(f"ratio of neighbours: median {statistics.median(ratios):.2f}, from {min(ratios):.2f} to {max(ratios):.2f}")
    print("\nwhere a step's time goes (ours):")
    for part, share in child("profile")["shares"].items():
        print(f"  {part:28} {share:5.1%}")


def child(side: str) -> dict[str, Any]:
    """One process of the comparison."""
    # It helps both sides; ours asks for it itself.
    environment = {**os.environ, **KEPT_MEMORY}
    command = [sys.executable, __file__, *sys.argv[1:], "--side", side]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if not lines:
        sys.exit(f"{side} failed:\n{done.stdout}\n{done.stderr}")
    return json.loads(lines[-1].removeprefix("RESULT "))  # type: ignore[no-any-return]


def rows_of(a: argparse.Namespace) -> torch.Tensor:
    """Token ids ``(ROWS, length + 1)``, one document a row, the same on both sides."""
    return torch.randint(
        0, architecture(a).vocab_size, (ROWS, a.length + 1), generator=torch.Generator().manual_seed(0)
    )


def architecture(a: argparse.Namespace) -> Any:
    """The shape that ``configs/model`` gives; a vocabulary of 50,304 where it leaves that to the tokenizer."""
    model = settings(a).model
    return model.architecture(model.vocab_size or 50304)


def settings(a: argparse.Namespace) -> Any:
    """The composed configuration of our side."""
    from trainer.compose import compose

    overrides = [f"model={a.model}", f"precision={a.precision}", f"batch.length={a.length}",
                 f"batch.size={a.size}", f"batch.micro={a.micro}", f"model.compile={str(a.compile).lower()}"]  # fmt: skip
    return compose(overrides, name="benchmark")


class Steps:
    """Our side: the loop's own optimizer step on fixed rows."""

    def __init__(self, a: argparse.Namespace) -> None:
        from trainer.diagnostics.guard import Guard
        from trainer.models.load import ModelLoader
        from trainer.parallel import distributed
        from trainer.pipelines.base import Models
        from trainer.tracking.throughput import Stopwatch

        cfg = settings(a)
        self.cfg, self.a, self.rows, self.at = cfg, a, rows_of(a), 0
        self.world = distributed.world()
        model = ModelLoader(cfg.model, cfg.strategy, 0, cfg.model.vocab_size or 50304).load()
        cfg.optimizer.lr = 3e-4
        self.engine = cfg.strategy.wrap(model, cfg.optimizer, cfg.precision)
        self.models = Models(self.engine.model, None)  # type: ignore[arg-type]
        self.guard, self.watch = Guard(cfg.guard, self.world.device), Stopwatch(self.world.device)

    def step(self) -> None:
        """One optimizer step."""
        from trainer.data.rows import Segment, collate
        from trainer.loop import train_step

        micro_batches = []
        for _ in range(self.a.size // self.a.micro):
            numbers = [(self.at + n) % ROWS for n in range(self.a.micro)]
            self.at += self.a.micro
            micro_batches.append(collate([[Segment(self.rows[n].numpy())] for n in numbers], numbers, self.a.length, 0))
        train_step(self.cfg.pipeline, self.models, self.engine, self.guard, self.watch, micro_batches)
        if self.world.device.type == "cuda":
            torch.cuda.synchronize()


def ours(a: argparse.Namespace) -> dict[str, float]:
    """Tokens per second and memory of Onecurve."""
    from trainer.parallel import distributed
    from trainer.tracking.throughput import peak_memory_gb, training_flops

    with distributed.session() as world:
        steps = Steps(a)
        steps.step()
        started = time.perf_counter()
        for _ in range(a.steps):
            steps.step()
        seconds = time.perf_counter() - started
        flops = training_flops(architecture(a), 1.0, (a.length + 1) / 2)
        return {"tokens_per_second": a.steps * a.size * a.length / seconds, "memory_gb": peak_memory_gb(world.device),
                "flops_per_token": flops}  # fmt: skip


def theirs(a: argparse.Namespace) -> dict[str, float]:
    """Tokens per second and memory of Hugging Face's Trainer, fused AdamW, SDPA."""
    from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

    from trainer.models.hf_format import config_json
    from trainer.tracking.throughput import peak_memory_gb

    described = config_json(architecture(a), torch.float32, {})
    kind = described.pop("model_type")
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **described), attn_implementation="sdpa")
    rows = [{"input_ids": row[:-1], "labels": row[:-1]} for row in rows_of(a)]
    times: list[float] = []

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *_: Any, **__: Any) -> None:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            times.append(time.perf_counter())

    arguments = TrainingArguments(
        output_dir="/tmp/benchmark-transformers", max_steps=a.steps + 1, per_device_train_batch_size=a.their_micro,
        gradient_accumulation_steps=a.size // a.their_micro, bf16=a.precision == "bf16", optim="adamw_torch_fused",
        learning_rate=3e-4, weight_decay=0.1, max_grad_norm=1.0, logging_steps=1000, save_strategy="no", report_to=[],
        torch_compile=a.compile, use_cpu=not torch.cuda.is_available(), disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip
    Trainer(model=model, args=arguments, train_dataset=rows, callbacks=[Clock()]).train()
    seconds = times[-1] - times[0]
    memory = peak_memory_gb(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    return {"tokens_per_second": a.steps * a.size * a.length / seconds, "memory_gb": memory}


def product(a: argparse.Namespace) -> dict[str, float]:
    """The rate of a bare matrix product in the compute format."""
    from trainer.tracking.throughput import measured_flops

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    size = 8192 if device.type == "cuda" else 2048
    dtype = torch.bfloat16 if a.precision == "bf16" else torch.float32
    return {"flops": measured_flops(device, dtype, size=size, seconds=3.0)}


PARTS = {
    "matrix products": ("aten::mm", "aten::addmm", "aten::bmm", "aten::matmul", "aten::linear"),
    "attention": ("scaled_dot_product", "flash_attention", "varlen"),
    "optimizer": ("adamw", "norm", "foreach"),
    "softmax of the vocabulary": ("exp", "aten::sum", "amax", "log"),
    "copies and casts": ("copy", "aten::to", "clone", "contiguous", "cat", "index"),
}


def profile(a: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Shares of self time of one step, by kind of operation."""
    from trainer.parallel import distributed

    with distributed.session():
        steps = Steps(a)
        steps.step()
        with torch.profiler.profile() as profiler:
            steps.step()
    cuda = torch.cuda.is_available()
    seconds = dict.fromkeys([*PARTS, "other (norms, activations, ...)"], 0.0)
    for event in profiler.key_averages():
        spent = event.self_device_time_total if cuda else event.self_cpu_time_total
        name = event.key.lower()
        part = next((p for p, words in PARTS.items() if any(w in name for w in words)), list(seconds)[-1])
        seconds[part] += spent
    total = sum(seconds.values())
    return {"shares": {part: value / total for part, value in seconds.items()}}


def device_name() -> str:
    """What the figures were measured on."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    names = [line.partition(":")[2].strip() for line in info.splitlines() if line.startswith("model name")]
    return f"{len(names)} cores of {names[0]}" if names else "CPU"


if __name__ == "__main__":
    main()
