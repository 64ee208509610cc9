"""How fast Onecurve fine-tunes, beside TRL's SFTTrainer: same model, same real conversations, alternating in one run.

    python scripts/benchmarks/sft.py MODEL_DIR CHATS.jsonl [--rounds 3] [--steps 4] [--length 512]
    python scripts/benchmarks/sft.py MODEL_DIR CHATS.jsonl --sides onecurve,lora,qlora,8bit --rounds 1 --steps 100

TRL gets its own defaults with bf16, rows cut at the same length: as they come (``trl``), and packed (``trl-packed``), where
without FlashAttention its documents see each other. What counts is real tokens a second: no padding.

Ours are all weights (``onecurve``), ``lora`` and ``qlora`` of rank 16, and all weights with 8-bit states (``8bit``), each at
the learning rate that it has by default. Beside their memory stands what the estimate says (``estimate_gb``), and the mean
loss of the last ten steps; ``trl-qlora`` is TRL with PEFT and bitsandbytes, rank and rate as ours.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from side_by_side import alternate, lines_of, memory_gb

OURS = {
    "onecurve": [],
    "lora": ["adapter=lora"],
    "qlora": ["adapter=qlora"],
    "8bit": ["optimizer.state=8bit"],
}
"""Overrides of `experiment=sft` by side."""
THEIRS = ("trl", "trl-packed", "trl-qlora")
RANK, ALPHA, LORA_LR = 16, 32, 2e-4
LAST = 10
"""Steps over which a loss is averaged."""


def main() -> None:
    """Compare, or be one side."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a Hugging Face folder")
    parser.add_argument("chats", type=Path, help="JSON lines with messages")
    parser.add_argument("--side", choices=(*OURS, *THEIRS), help="one process of the comparison")
    parser.add_argument("--sides", default="onecurve,trl,trl-packed", help="those to compare, the first with each")
    parser.add_argument("--rounds", type=int, default=3, help="alternations")
    parser.add_argument("--steps", type=int, default=4, help="timed steps a process, after one that is not")
    parser.add_argument("--length", type=int, default=512, help="longest row, tokens")
    parser.add_argument("--size", type=int, default=2, help="packed rows a step, of both")
    parser.add_argument("--rows", type=int, default=4, help="unpacked rows a step, of TRL")
    parser.add_argument("--kept-memory", action="store_true", help="TRL keeps freed memory too, as we do")
    parser.add_argument("--no-recompute", action="store_true", help="TRL without its default recomputation")
    a = parser.parse_args()
    if a.side:
        result = ours(a, OURS[a.side]) if a.side in OURS else theirs(a)
        print(f"RESULT {json.dumps(result)}", flush=True)
        return
    alternate(__file__, a.sides.split(","), a.rounds, "tokens_per_second", "real tokens/s")


def ours(a: argparse.Namespace, overrides: Sequence[str]) -> dict[str, float]:
    """The loop's own steps on the packed conversations."""
    from trainer.compose import compose
    from trainer.diagnostics.guard import Guard
    from trainer.diagnostics.memory import memory
    from trainer.loop import train
    from trainer.parallel import distributed
    from trainer.tracking.throughput import Stopwatch

    cfg = compose(
        [
            "experiment=sft", f"model.path={a.model}", f"data.train=[{a.chats}]", "data.eval=[]", "data.on_bad_row=skip",
            f"batch.length={a.length}", f"batch.size={a.size}", f"batch.micro={a.size}", *overrides,
        ],
        name="benchmark",
    )  # fmt: skip
    tokenizer, architecture = cfg.open_tokenizer_and_shape()
    estimate = memory(architecture, cfg.layout(architecture)).total
    with distributed.session() as world, tempfile.TemporaryDirectory() as cache:
        cfg.data.cache = cache
        corpus = cfg.data.open(tokenizer, a.length, 0)
        models = cfg.pipeline.models(cfg.loader(tokenizer), tokenizer)
        engine = cfg.strategy.wrap(models.trained, cfg.optimizer, cfg.precision)
        models.trained = engine.model
        rows = corpus.train.loader(micro=a.size, seed=0, rank=0, ranks=1)
        clock, tokens, losses = [], [], []
        for step in train(
            cfg.pipeline, models, engine, rows, lambda n: 1.0, Guard(cfg.guard, world.device), Stopwatch(world.device),
            seed=0, first=1, last=a.steps + 1, accumulate=1,
        ):  # fmt: skip
            tokens.append(float(step.metrics["tokens"]))
            losses.append(float(step.metrics["loss"]))
            clock.append(time.perf_counter())
        rows.close()
        return {**figures(clock, tokens, losses), "estimate_gb": estimate / 1e9}


def theirs(a: argparse.Namespace) -> dict[str, float]:
    """TRL's SFTTrainer."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    chats = [json.loads(line) for line in lines_of(a.chats)]
    clock: list[float] = []
    packing, lora = a.side == "trl-packed", a.side == "trl-qlora"

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *_: Any, **__: Any) -> None:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            clock.append(time.perf_counter())

    config = SFTConfig(
        output_dir=tempfile.mkdtemp(), max_steps=a.steps + 1, per_device_train_batch_size=a.size if packing else a.rows,
        bf16=True, max_length=a.length, packing=packing, report_to=[], save_strategy="no", logging_steps=1,
        disable_tqdm=True, optim="adamw_torch_fused", use_cpu=not torch.cuda.is_available(), dataloader_pin_memory=False,
        **({"gradient_checkpointing": False} if a.no_recompute else {}),
        **({"learning_rate": LORA_LR, "lr_scheduler_type": "constant"} if lora else {}),
    )  # fmt: skip
    dataset = Dataset.from_list([{"messages": chat["messages"]} for chat in chats])
    model, adapter = four_bit(a.model) if lora else (str(a.model), None)
    trainer = SFTTrainer(model=model, args=config, train_dataset=dataset, callbacks=[Clock()], peft_config=adapter)
    collate, tokens = trainer.data_collator, []

    def counted(rows: Any) -> Any:
        batch = collate(rows)
        mask = batch.get("attention_mask")
        tokens.append(float(batch["input_ids"].numel() if mask is None else mask.sum()))
        return batch

    trainer.data_collator = counted
    trainer.train()
    return figures(clock, tokens, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry])


def four_bit(folder: Path) -> tuple[Any, Any]:
    """The model in NF4 with double quantisation, and adapters as ours, for PEFT."""
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    settings = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype="bfloat16"
    )
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=settings, dtype=torch.bfloat16)
    return model, LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")


def figures(clock: list[float], tokens: list[float], losses: list[float]) -> dict[str, float]:
    """Real tokens a second of all steps but the first, the process's peak memory, and the loss at the end."""
    steps = len(clock) - 1
    return {
        "tokens_per_second": sum(tokens[1 : steps + 1]) / (clock[-1] - clock[0]),
        "memory_gb": memory_gb(),
        "loss": statistics.fmean(losses[-LAST:]),
    }


if __name__ == "__main__":
    main()
