"""How fast Onecurve does PPO, beside TRL's experimental PPOTrainer: same models, same prompts, alternating in one run.

    python scripts/benchmarks/ppo.py update --trl-python PYTHON
    python scripts/benchmarks/ppo.py generation --trl-python PYTHON --model MODEL_DIR --prompts CHATS.jsonl

``update``: a new Llama of 6 layers x 256, four epochs of four mini-batches on every 32 episodes; most time goes into updates.
``generation``: a real model as policy, critic, reference and reward, one epoch; most time goes into sampling. The newest TRL
has no PPO: ``--trl-python`` is the interpreter of an environment that holds this package and trl==1.9.2. TRL has its own
defaults, our side its temperature. What counts is episodes a second, from the first rollout to the last update.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from side_by_side import alternate, lines_of, memory_gb

SIDES = ("onecurve", "trl")


@dataclass(frozen=True)
class Sizes:
    """``rollout``: episodes of an iteration, cut into ``parts`` mini-batches; ``tokens``: of the longest response."""

    episodes: int
    rollout: int
    tokens: int
    epochs: int
    parts: int
    precision: str


SIZES = {
    "update": Sizes(episodes=128, rollout=32, tokens=64, epochs=4, parts=4, precision="fp32"),
    "generation": Sizes(episodes=64, rollout=64, tokens=128, epochs=1, parts=4, precision="bf16"),
}
SHAPE = {
    "vocab_size": 8192, "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 6, "num_attention_heads": 4,
    "num_key_value_heads": 4, "max_position_embeddings": 512, "tie_word_embeddings": False,
}  # fmt: skip
PROMPT = 32
"""Tokens of a prompt of ``update``."""
TEMPERATURE = 0.7
"""TRL's default."""


def main() -> None:
    """Compare, or be one side."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("setting", choices=list(SIZES))
    parser.add_argument("--trl-python", help="an interpreter that has trl==1.9.2; without it our side runs alone")
    parser.add_argument("--model", type=Path, help="generation: a Hugging Face folder")
    parser.add_argument("--prompts", type=Path, help="generation: JSON lines with messages")
    parser.add_argument("--longest", type=int, default=128, help="generation: longest prompt, tokens")
    parser.add_argument("--rounds", type=int, default=3, help="alternations")
    parser.add_argument("--episodes", type=int, help="fewer than usual")
    parser.add_argument(
        "--work", type=Path, default=Path("runs/benchmark-ppo"), help="where models and prompts are kept"
    )
    parser.add_argument("--profile", action="store_true", help="our side: a table of its operations")
    parser.add_argument("--kept-memory", action="store_true", help="TRL keeps freed memory too, as we do")
    parser.add_argument("--no-reread", action="store_true", help="our side: pipeline.rollout.recompute_logprobs=false")
    parser.add_argument("--side", choices=SIDES, help="one process of the comparison")
    a = parser.parse_args()
    a.work /= a.setting
    if a.side:
        result = ours(a) if a.side == "onecurve" else theirs(a)
        print(f"RESULT {json.dumps(result)}", flush=True)
        return
    prepare(a)
    sides = SIDES if a.trl_python else SIDES[:1]
    alternate(__file__, sides, a.rounds, "episodes_per_second", "episodes/s", {"trl": a.trl_python or sys.executable})


def sizes_of(a: argparse.Namespace) -> Sizes:
    """The setting's sizes."""
    usual = SIZES[a.setting]
    episodes = a.episodes or usual.episodes
    return replace(usual, episodes=episodes, rollout=min(usual.rollout, episodes))


def rows_of(a: argparse.Namespace) -> list[dict[str, Any]]:
    """One prompt for each episode."""
    lines = lines_of(a.work / "prompts.jsonl")
    return [json.loads(line) for line in lines[: sizes_of(a).episodes]]


def prepare(a: argparse.Namespace) -> None:
    """Write ``policy/``, ``reward/`` and ``prompts.jsonl`` once: what both sides start from."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, LlamaConfig

    if (a.work / "prompts.jsonl").exists():
        return
    torch.manual_seed(0)
    count = SIZES[a.setting].episodes
    if a.setting == "update":
        tokenizer = words()
        kinds = (AutoModelForCausalLM, AutoModelForSequenceClassification)
        ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
        policy, reward = (kind.from_config(LlamaConfig(**SHAPE, **ids, num_labels=1)) for kind in kinds)
        draw = random.Random(0)
        rows = [{"prompt": " ".join(f"w{draw.randrange(8190)}" for _ in range(PROMPT))} for _ in range(count)]
    else:
        tokenizer = AutoTokenizer.from_pretrained(a.model)
        policy = AutoModelForCausalLM.from_pretrained(a.model)
        reward = AutoModelForSequenceClassification.from_pretrained(a.model, num_labels=1)
        rows = random.Random(0).sample(list(questions(a, tokenizer)), count)
    for model, name in ((policy, "policy"), (reward, "reward")):
        model.save_pretrained(a.work / name)
        tokenizer.save_pretrained(a.work / name)
    (a.work / "prompts.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))


def words() -> Any:
    """A tokenizer whose every word is a token: w0, w1, ..."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from trainer.data.templates import BUILT_IN

    names = ["<eos>", "<pad>", *(f"w{n}" for n in range(SHAPE["vocab_size"] - 2))]
    backend = Tokenizer(models.WordLevel({name: n for n, name in enumerate(names)}, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", pad_token="<pad>")
    tokenizer.chat_template = BUILT_IN["raw"]
    return tokenizer


def questions(a: argparse.Namespace, tokenizer: Any) -> Iterator[dict[str, Any]]:
    """What is asked first in each conversation, where it is short enough."""
    for line in dict.fromkeys(lines_of(a.prompts)):
        messages = json.loads(line)["messages"]
        first = next(n for n, message in enumerate(messages) if message["role"] == "assistant")
        row = {"prompt": messages[:first]}
        if first and len(asked(row, tokenizer)) <= a.longest:
            yield row


def asked(row: dict[str, Any], tokenizer: Any) -> list[int]:
    """The ids of a prompt, for TRL."""
    if isinstance(row["prompt"], str):
        return tokenizer(row["prompt"], add_special_tokens=False)["input_ids"]  # type: ignore[no-any-return]
    return tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=False)  # type: ignore[no-any-return]


def ours(a: argparse.Namespace) -> dict[str, Any]:
    """The loop's own steps."""
    from trainer.compose import compose
    from trainer.diagnostics.guard import Guard
    from trainer.loop import train
    from trainer.parallel import distributed
    from trainer.pipelines.base import Plan
    from trainer.tracking.throughput import Stopwatch

    s = sizes_of(a)
    with distributed.session() as world, tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "prompts.jsonl")
        file.write_text("".join(f"{json.dumps(row)}\n" for row in rows_of(a)))
        cfg = compose(
            [
                "pipeline=ppo", "data=prompts", f"precision={s.precision}", f"model.path={a.work / 'policy'}",
                f"data.train=[{file}]", "data.eval=[]", f"data.cache={folder}", "steps=1",
                f"pipeline.reward.main.path={a.work / 'reward'}", f"pipeline.rollout.size={s.rollout}",
                f"pipeline.rollout.tokens={s.tokens}", f"pipeline.rollout.temperature={TEMPERATURE}",
                f"pipeline.ppo_epochs={s.epochs}", f"batch.size={s.rollout // s.parts}",
                f"batch.micro={s.rollout // s.parts}", "batch.length=512",
                f"pipeline.rollout.recompute_logprobs={not a.no_reread}",
                *(["data.template=raw"] if a.setting == "update" else []),
            ],
            name="benchmark",
        )  # fmt: skip
        tokenizer, _ = cfg.open_tokenizer_and_shape()
        corpus = cfg.data.open(tokenizer, cfg.pipeline.data_length(cfg.batch.length), 0)
        models = cfg.pipeline.models(cfg.loader(tokenizer), tokenizer)
        engine = cfg.strategy.wrap(models.trained, cfg.optimizer, cfg.precision)
        models.trained = engine.model
        watch = Stopwatch(world.device)
        plan = Plan(cfg.batch.size, cfg.batch.micro, cfg.batch.length, 0, watch)
        batches = cfg.pipeline.batches(models, engine, corpus, plan)
        seen, sample = Seen(), batches.actor.sample

        def counted(prompts: Any, keys: Any) -> Any:
            completions = sample(prompts, keys)
            for prompt, completion in zip(prompts, completions, strict=True):
                seen.add(len(prompt), len(completion.ids), ended=completion.ended)
            return completions

        batches.actor.sample = counted
        steps = s.episodes * s.epochs // cfg.batch.size
        with clocked(a, s) as result:
            for _ in train(
                cfg.pipeline, models, engine, batches, lambda n: 1.0, Guard(cfg.guard, world.device), watch,
                seed=0, first=1, last=steps, accumulate=1,
            ):  # fmt: skip
                pass
        batches.close()
        shares = {name: round(value / result["seconds"], 3) for name, value in watch.take().items()}
        return {**result, "updates": steps, "generation": shares["rollout"], **seen.facts, "shares": shares}


class Seen:
    """What was asked and answered."""

    def __init__(self) -> None:
        self._rows: list[tuple[int, int, bool]] = []

    def add(self, prompt: int, response: int, *, ended: bool) -> None:
        """Count an episode; tokens."""
        self._rows.append((prompt, response, ended))

    @property
    def facts(self) -> dict[str, float]:
        """Tokens of all prompts; of a response on average, at least and at most; the part that ended by itself."""
        prompts, responses, ended = zip(*self._rows, strict=True)
        return {
            "prompt_tokens": sum(prompts), "response": statistics.mean(responses), "shortest": min(responses),
            "longest": max(responses), "ended": statistics.mean(ended),
        }  # fmt: skip


@contextmanager
def clocked(a: argparse.Namespace, s: Sizes) -> Iterator[dict[str, Any]]:
    """Episodes a second of what is done inside, by the clock and by the processor's time."""
    result: dict[str, Any] = {}
    clock, processor = time.perf_counter(), time.process_time()
    with torch.profiler.profile() if a.profile else nullcontext() as profiler:
        yield result
    seconds, busy = time.perf_counter() - clock, time.process_time() - processor
    result.update(
        episodes_per_second=s.episodes / seconds, episodes_per_cpu_second=s.episodes / busy, seconds=seconds,
        memory_gb=memory_gb(),
    )  # fmt: skip
    if profiler:
        print(profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=40))


def theirs(a: argparse.Namespace) -> dict[str, Any]:
    """TRL's PPOTrainer."""
    s = sizes_of(a)
    if s.precision == "bf16":
        # PPOTrainer hands args.bf16 to nobody: this is what `accelerate launch --mixed_precision bf16` sets.
        os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16"
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
    from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

    tokenizer = AutoTokenizer.from_pretrained(a.work / "policy", padding_side="left")
    if tokenizer.pad_token_id == tokenizer.eos_token_id:
        # It takes every padding token for padding, so the end of a response must be another one.
        tokenizer.pad_token = tokenizer.unk_token
    data = Dataset.from_list([{"input_ids": asked(row, tokenizer)} for row in rows_of(a)])
    frozen = torch.bfloat16 if s.precision == "bf16" else torch.float32
    policy, reference = (
        AutoModelForCausalLM.from_pretrained(a.work / "policy", dtype=dtype) for dtype in (torch.float32, frozen)
    )
    critic, reward = (
        AutoModelForSequenceClassification.from_pretrained(a.work / "reward", num_labels=1, dtype=dtype)
        for dtype in (torch.float32, frozen)
    )
    generating, updates, seen = [0.0], [0], Seen()
    generate = ppo_trainer.batch_generation

    def timed(model: Any, queries: Any, *rest: Any) -> Any:
        started = time.perf_counter()
        found = generate(model, queries, *rest)
        generating[0] += time.perf_counter() - started
        for prompt, response in zip(queries, found[0][:, queries.shape[1] :].tolist(), strict=True):
            ended = tokenizer.eos_token_id in response
            length = response.index(tokenizer.eos_token_id) + 1 if ended else len(response)
            seen.add(int((prompt != tokenizer.pad_token_id).sum()), length, ended=ended)
        return found

    ppo_trainer.batch_generation = timed
    config = PPOConfig(
        output_dir=tempfile.mkdtemp(), total_episodes=s.episodes, per_device_train_batch_size=s.rollout,
        gradient_accumulation_steps=1, num_mini_batches=s.parts, num_ppo_epochs=s.epochs, response_length=s.tokens,
        stop_token="eos", temperature=TEMPERATURE, num_sample_generations=0, bf16=s.precision == "bf16", report_to=[],
        save_strategy="no", use_cpu=not torch.cuda.is_available(), disable_tqdm=True,
    )  # fmt: skip
    trainer = PPOTrainer(
        args=config, processing_class=tokenizer, model=policy, ref_model=reference, reward_model=reward, value_model=critic,
        train_dataset=data, eval_dataset=data,
    )  # fmt: skip
    trainer.optimizer.optimizer.register_step_post_hook(lambda *_: updates.__setitem__(0, updates[0] + 1))
    with clocked(a, s) as result:
        trainer.train()
    return {**result, "updates": updates[0], "generation": round(generating[0] / result["seconds"], 3), **seen.facts}


if __name__ == "__main__":
    main()
