"""Tasks with a known best policy over a vocabulary of eight words: a bandit, and a chain that depends on where it is."""

import json
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers

WORDS = ["<eos>", "<pad>", "<unk>", "left", "right", "a", "b", "c"]
ARMS = {"a": 0.1, "b": 0.6, "c": 1.0}
"""What a pull is worth; every other word is worth nothing."""
MOVES = {"left": "abc", "right": "cca"}
"""The only right way to go on after each beginning: each right word in its place is worth a third."""


LONGEST = {"bandit": 1, "chain": 3}


def bandit(prompts, completions, rows):
    return [ARMS.get(text.strip(), 0.0) for text in completions]


def chain(prompts, completions, rows):
    return [
        sum(word == right for word, right in zip(text.split(), MOVES[row["prompt"]], strict=False)) / 3
        for text, row in zip(completions, rows, strict=True)
    ]


def write_world(folder: Path) -> Path:
    """A tokenizer of whole words, and prompts."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(models.WordLevel({word: n for n, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(WORDS[:3])
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    (folder / "tokenizer_config.json").write_text(json.dumps({**names, "chat_template": template}))
    rows = [{"prompt": beginning} for beginning in MOVES] * 32
    (folder / "prompts.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return folder


def overrides(folder: Path, task: str) -> list[str]:
    """A run of ``pipeline=ppo`` on a task (``bandit`` or ``chain``), with a model of a few thousand weights from scratch."""
    return [
        "pipeline=ppo", "data=prompts", f"tokenizer.path={folder}", f"data.train=[{folder}/prompts.jsonl]",
        f"data.eval=[{folder}/prompts.jsonl]", f"data.cache={folder}/cache", "reward@pipeline.reward.main=function",
        f"pipeline.reward.main.function=tests.small_world.{task}", f"pipeline.rollout.tokens={LONGEST[task]}",
        "pipeline.critic=policy", "model.hidden_size=32", "model.intermediate_size=64", "model.num_hidden_layers=2",
        "model.num_attention_heads=2", "model.num_key_value_heads=1", "model.head_dim=16", "batch.length=16",
        "tracking.wandb.mode=disabled", "tracking.tensorboard=false", "checkpoint.every=0", "schedule=constant",
        f"evaluation.sample_tokens={LONGEST[task]}", "pipeline.kl_coef=0", "tracking.every=10",
    ]  # fmt: skip
