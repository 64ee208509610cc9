"""Answer the same prompts by several models, and score the answers.

    onecurve compare runs/compared prompts.jsonl sft=runs/sft/export dpo=runs/dpo/export --function my.brevity
    onecurve compare runs/compared prompts.jsonl sft=runs/sft/export dpo=runs/dpo/export --reward runs/rm/export

`answers.jsonl` gets a row a prompt: `prompt`, `answers` and `scores` by model. `metrics.json` gets by model the mean `score`
and its standard `error`, the part of the scores above 0 (`positive`), and the mean `length` of an answer in characters. What
is drawn depends on the seed and the prompt's number alone. A function is called as PPO calls its rewards:
f(prompts, completions, rows) -> scores.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from trainer.cli.parsing import add_sampling_arguments, add_template_arguments, parser_of, template_options
from trainer.config import InputError
from trainer.data.corpus import Prompt
from trainer.data.messages import Chat
from trainer.data.prompts import PROMPT_FORMATS
from trainer.data.row_formats import read_rows
from trainer.data.sources import DataSource
from trainer.data.templates import TOOL_USE, TemplateError, open_template
from trainer.data.tokenizer import open_tokenizer
from trainer.disk import new_folder, write_text
from trainer.generation.completion import Response
from trainer.generation.pretrained import ChatModel, RewardModel
from trainer.generation.sampling import Sampling
from trainer.models.header import read_shape
from trainer.rl.rewards import FunctionReward

Row = dict[str, Any]


def main(arguments: Sequence[str]) -> int:
    """Answer, score, write; the folder appears when all of it is there."""
    parser = parser_of("compare", __doc__)
    parser.add_argument("out", type=Path, help="the folder to write; must not exist")
    parser.add_argument("prompts", help="a file of prompts, as GRPO reads them")
    parser.add_argument(
        "models", nargs="+", type=_named, metavar="NAME=FOLDER", help="exports, or other folders or hub ids"
    )
    parser.add_argument("--function", help="scores the answers: package.module.name, or file.py:name")
    parser.add_argument(
        "--reward", type=Path, help="a reward model's export or hub id, which scores them where there is no function"
    )
    parser.add_argument("--rows", type=int, default=None, help="so many prompts; default all")
    add_template_arguments(parser, instead="for models that have none")
    add_sampling_arguments(parser, temperature=1.0, tokens=128)
    a = parser.parse_args(arguments)
    if a.out.exists():
        raise InputError(f"{a.out} exists already; name another folder")
    names = [name for name, _ in a.models]
    if len(set(names)) < len(names):
        parser.error(f"two models have one name ({', '.join(names)}); give each its own")
    questions = list(islice(read_rows(DataSource(a.prompts), PROMPT_FORMATS, "prompt", mixed=True), a.rows))
    written = compared([chat for _, chat, _ in questions], [dict(row) for _, _, row in questions], a)
    metrics = {name: measured(written, name) for name in names}
    with new_folder(a.out) as folder:
        folder.mkdir()
        write_text(folder / "answers.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in written))
        write_text(folder / "metrics.json", json.dumps(metrics, indent=1) + "\n")
    for name, values in metrics.items():
        print(f"{name:12} " + "  ".join(f"{key} {value:.4g}" for key, value in values.items()))
    return 0


def compared(chats: Sequence[Chat], rows: Sequence[Row], a: argparse.Namespace) -> list[Row]:
    """Every prompt with its answers and their scores, by model."""
    sampling = Sampling(a.tokens, a.temperature)
    templates = [chosen_template(folder, a) for _, folder in a.models]  # before a model is loaded
    score = scorer(a)
    written: list[Row] = [{"prompt": c.messages[-1]["content"], "answers": {}, "scores": {}} for c in chats]
    for (name, folder), template in zip(a.models, templates, strict=True):
        model = ChatModel.open(folder, template, **template_options(a))
        texts = model.complete(chats, sampling, [(a.seed, n) for n in range(len(rows))])
        scores = score(rows, chats, texts) if score is not None else [None] * len(rows)
        for row, text, value in zip(written, texts, scores, strict=True):
            row["answers"][name] = text.strip()
            row["scores"][name] = value
    return written


def _named(text: str) -> tuple[str, Path]:
    name, _, folder = text.partition("=")
    if not (name and folder):
        raise argparse.ArgumentTypeError(f"{text} is no NAME=FOLDER; write sft=runs/sft/export")
    return name, Path(folder)


def chosen_template(folder: Path, a: argparse.Namespace) -> str | None:
    """The template that the arguments name, for a model that has none of its own; else None.

    Raises:
        TemplateError: naming the folder, if its template is none that fits the arguments.
    """
    read_shape(folder)  # a folder that is no model is named as such
    tokenizer = open_tokenizer(folder)
    name = None if tokenizer.chat_template or TOOL_USE in tokenizer.named_templates else a.template
    try:
        open_template(name, tokenizer, **template_options(a))
    except TemplateError as error:
        raise TemplateError(f"{folder}: {error}") from None
    return name


def scorer(
    a: argparse.Namespace,
) -> Callable[[Sequence[Row], Sequence[Chat], Sequence[str]], list[float | None]] | None:
    """What scores answers, if anything does."""
    if a.function:
        function = FunctionReward(function=a.function).scorer()
        return lambda rows, chats, texts: function(
            [
                Response(Prompt([], chat.messages[-1]["content"], row=row), [], text, number)
                for number, (row, chat, text) in enumerate(zip(rows, chats, texts, strict=True))
            ]
        )
    if a.reward:
        judge = RewardModel.open(a.reward)
        return lambda rows, chats, texts: list(
            judge.score(
                [
                    replace(chat, messages=[*chat.messages, {"role": "assistant", "content": text}])
                    for chat, text in zip(chats, texts, strict=True)
                ]
            )
        )
    return None


def measured(rows: Sequence[Row], name: str) -> dict[str, float]:
    """The figures of a model."""
    scores = [value for row in rows if (value := row["scores"][name]) is not None]
    figures = {"length": statistics.fmean(len(row["answers"][name]) for row in rows)}
    if scores:
        figures["score"] = statistics.fmean(scores)
        figures["error"] = statistics.pstdev(scores) / math.sqrt(len(scores))
        figures["positive"] = sum(value > 0 for value in scores) / len(scores)
    return figures
