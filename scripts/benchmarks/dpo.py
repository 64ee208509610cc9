"""How fast Onecurve optimises preferences, beside TRL's DPOTrainer: same model, same real pairs, alternating in one run.

    python scripts/benchmarks/dpo.py MODEL_DIR PAIRS.jsonl [--rounds 2] [--pairs 24] [--length 512] [--sides onecurve trl]
    python scripts/benchmarks/dpo.py MODEL_DIR PAIRS.jsonl --parts    (ours alone, with one idea less a side)

Every side learns from the same pairs once, in bf16, TRL with its own defaults; answers are cut at the same length. What
counts is pairs a second, of all steps. ``-precomputed``: the reference's log-probabilities are computed before the clock
starts. ``cpu_seconds`` a pair are the process's own, of all its threads: they hardly change where others use the machine too.
"""

from __future__ import annotations

import argparse
import functools
import json
import random
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from side_by_side import alternate, lines_of, memory_gb

SIDES = ("onecurve", "onecurve-precomputed", "trl", "trl-precomputed")
PARTS = {
    "precomputed": [],
    "live": ["pipeline.reference=model"],
    "unshared": ["data.share_prompt=false"],
    "unpacked": ["batch.micro=1"],
    "whole-logits": [],
}
"""Ours with one idea less each: overrides."""


def main() -> None:
    """Compare, or be one side."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a Hugging Face folder")
    parser.add_argument("file", type=Path, help="JSON lines with prompt, chosen, rejected")
    parser.add_argument("--side", choices=[*SIDES, *PARTS], help="one process of the comparison")
    parser.add_argument("--sides", nargs="+", choices=[*SIDES, *PARTS], default=SIDES, help="what is compared")
    parser.add_argument("--parts", action="store_true", help="compare ours with itself, one idea less a side")
    parser.add_argument("--rounds", type=int, default=2, help="alternations")
    parser.add_argument("--pairs", type=int, default=24, help="pairs to learn from, drawn from the file")
    parser.add_argument("--length", type=int, default=512, help="longest prompt with an answer, tokens")
    parser.add_argument("--size", type=int, default=4, help="pairs a step, of both")
    parser.add_argument("--micro", type=int, default=2, help="pairs a forward, ours")
    parser.add_argument("--recompute", default="selective", help="model.activation_checkpointing, ours")
    parser.add_argument("--their-micro", type=int, help="pairs a forward, theirs; those of a step unless given")
    parser.add_argument("--seed", type=int, default=0, help="which pairs are drawn")
    parser.add_argument("--kept-memory", action="store_true", help="TRL keeps freed memory too, as we do")
    parser.add_argument("--no-recompute", action="store_true", help="TRL without its default recomputation")
    a = parser.parse_args()
    if not a.side:
        alternate(__file__, list(PARTS) if a.parts else a.sides, a.rounds, "pairs_per_second", "pairs/s")
        return
    rows = [json.loads(line) for line in dict.fromkeys(lines_of(a.file))]
    rows = random.Random(a.seed).sample([row for row in rows if fits(row, a)], a.pairs)
    result = theirs(a, rows) if a.side.startswith("trl") else ours(a, rows)
    print(f"RESULT {json.dumps(result)}", flush=True)


@functools.cache
def opened(kind: Any, folder: Path) -> Any:
    """A tokenizer, once."""
    return kind.from_pretrained(folder)


def fits(row: dict[str, Any], a: argparse.Namespace) -> bool:
    """Whether at least an eighth of a row is left for the answers: TRL would learn nothing of a pair that we leave out."""
    from transformers import AutoTokenizer

    tokenizer = opened(AutoTokenizer, a.model)
    ids = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=False)
    return len(ids) <= a.length * 7 // 8 and row["chosen"] != row["rejected"]


def ours(a: argparse.Namespace, rows: list[dict[str, Any]]) -> dict[str, float]:
    """The loop's own steps."""
    from trainer.compose import compose
    from trainer.diagnostics.guard import Guard
    from trainer.loop import train
    from trainer.parallel import distributed
    from trainer.tracking.throughput import Stopwatch

    if a.side == "whole-logits":
        without_chunks()
    live = a.side == "onecurve"
    with distributed.session() as world, tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "pairs.jsonl")
        file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        cfg = compose(
            [
                "experiment=dpo", f"model.path={a.model}", f"data.train=[{file}]", "data.eval=[]", f"data.cache={folder}",
                "data.truncation=keep_start", f"batch.length={a.length}", f"batch.size={a.size}", f"batch.micro={a.micro}",
                f"model.activation_checkpointing={a.recompute}",
                f"pipeline.reference={'model' if live else 'precomputed'}", *PARTS.get(a.side, []),
            ],
            name="benchmark",
        )  # fmt: skip
        tokenizer, _ = cfg.open_tokenizer_and_shape()
        corpus = cfg.data.open(tokenizer, a.length, 0)
        models = cfg.pipeline.models(cfg.loader(tokenizer), tokenizer)
        engine = cfg.strategy.wrap(models.trained, cfg.optimizer, cfg.precision)
        models.trained = engine.model
        cfg.pipeline.prepare(models, engine, corpus, cfg.data.cache_folder)
        assert len(corpus.train) == len(rows), "a pair that TRL learns from was left out"
        steps = len(rows) // a.size
        batches = corpus.train.loader(micro=cfg.batch.micro, seed=0, rank=0, ranks=1)
        started, used = time.perf_counter(), time.process_time()
        tokens = 0.0
        for step in train(
            cfg.pipeline, models, engine, batches, lambda n: 1.0, Guard(cfg.guard, world.device),
            Stopwatch(world.device), seed=0, first=1, last=steps, accumulate=a.size // cfg.batch.micro,
        ):  # fmt: skip
            tokens += float(step.metrics["tokens"])
        seconds, used = time.perf_counter() - started, time.process_time() - used
        batches.close()
        pairs = steps * a.size
        return {
            "pairs_per_second": pairs / seconds,
            "memory_gb": memory_gb(),
            "cpu_seconds": used / pairs,
            "tokens": tokens,
        }


def without_chunks() -> None:
    """Log-probabilities from all logits at once, as frameworks without a chunked loss have them."""
    from trainer.functional import Head, logits
    from trainer.pipelines import answers

    def plain(hidden: torch.Tensor, head: Head, *, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        log_p = logits(hidden, head).float().log_softmax(-1)
        entropy = -(log_p.detach().exp() * log_p.detach()).sum(-1)
        return log_p.gather(-1, targets[..., None]).squeeze(-1), entropy

    answers.logprobs = plain  # type: ignore[assignment]


def theirs(a: argparse.Namespace, rows: list[dict[str, Any]]) -> dict[str, float]:
    """TRL's DPOTrainer."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import DPOConfig, DPOTrainer

    clock: list[float] = []
    used: list[float] = []
    micro = a.their_micro or a.size

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            clock.append(time.perf_counter())
            used.append(time.process_time())

        def on_step_end(self, *_: Any, **__: Any) -> None:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            clock.append(time.perf_counter())
            used.append(time.process_time())

    config = DPOConfig(
        output_dir=tempfile.mkdtemp(), num_train_epochs=1, per_device_train_batch_size=micro,
        gradient_accumulation_steps=a.size // micro, bf16=True, max_length=a.length,
        precompute_ref_log_probs=a.side == "trl-precomputed", report_to=[], save_strategy="no", logging_steps=1000,
        disable_tqdm=True, optim="adamw_torch_fused", use_cpu=not torch.cuda.is_available(), dataloader_pin_memory=False,
        **({"gradient_checkpointing": False} if a.no_recompute else {}),
    )  # fmt: skip
    trainer = DPOTrainer(model=str(a.model), args=config, train_dataset=Dataset.from_list(rows), callbacks=[Clock()])
    trainer.train()
    pairs = (len(clock) - 1) * a.size
    seconds = clock[-1] - clock[0]
    return {"pairs_per_second": pairs / seconds, "memory_gb": memory_gb(), "cpu_seconds": (used[-1] - used[0]) / pairs}


if __name__ == "__main__":
    main()
