"""Make preferences out of prompts: a model answers each twice, a judge says which answer is better (RLAIF for DPO).

    onecurve label runs/sft/export prompts.jsonl pairs.jsonl --reward runs/reward/export
    onecurve label runs/sft/export prompts.jsonl pairs.jsonl --judge http://localhost:8000/v1 --judge-model NAME

Rows of prompts have ``prompt`` (text or messages) or ``messages``, whose last answer is left out. A judge is asked in both
orders and must say the same twice; its key comes from OPENAI_API_KEY. Equal answers, ties and unclear verdicts are counted
and left out. Started again, it goes on behind the last prompt that is finished in pairs.jsonl.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from trainer.cli.parsing import add_sampling_arguments, add_template_arguments, parser_of, template_options
from trainer.config import InputError
from trainer.data.messages import Chat
from trainer.data.prompts import PROMPT_FORMATS
from trainer.data.row_formats import read_rows
from trainer.data.sources import DataSource
from trainer.disk import read_lines, write_bytes, writing
from trainer.generation.pretrained import ChatModel, RewardModel, validate_scoring
from trainer.generation.sampling import Sampling
from trainer.rl.judge import Endpoint, compare

Prompt = list[dict[str, Any]]
Judge = Callable[[list[Prompt], list[tuple[str, str]]], list[tuple[int | None, dict[str, Any]]]]
"""From prompts with two answers each: which is better (0, 1 or None), and facts for the row."""


def main(arguments: Sequence[str]) -> int:
    """Answer, judge, write."""
    parser = parser_of("label", __doc__)
    parser.add_argument("model", type=Path, help="answers: an export or a hub id, with a chat template")
    parser.add_argument("prompts", type=Path, help="JSON lines")
    parser.add_argument("out", type=Path, help="JSON lines of prompt, chosen, rejected")
    judge = parser.add_mutually_exclusive_group(required=True)
    judge.add_argument("--reward", type=Path, help="an exported reward model, or a hub id")
    judge.add_argument("--judge", help="the URL of an OpenAI-compatible endpoint, up to /v1")
    parser.add_argument("--judge-model", help="the model's name at the endpoint")
    add_template_arguments(parser)
    add_sampling_arguments(parser, temperature=1.0, tokens=256)
    parser.add_argument("--batch", type=int, default=16, help="prompts that are answered and judged at once")
    a = parser.parse_args(arguments)
    if a.judge and not a.judge_model:
        parser.error("--judge needs --judge-model")
    if a.judge and (problem := Endpoint(a.judge, a.judge_model).url_problem()):
        parser.error(problem)
    if a.temperature <= 0:
        parser.error(f"--temperature {a.temperature} would give the same answer twice; use a number above 0")
    label(a)
    return 0


def label(a: argparse.Namespace) -> None:
    """Append a pair for every prompt where one answer is found better."""
    asked = list(read(a.prompts))  # all of them before a model is loaded
    if a.reward:
        validate_scoring(a.reward)
    model = ChatModel.open(a.model, a.template, **template_options(a))
    judge = reward_judge(RewardModel.open(a.reward)) if a.reward else endpoint_judge(Endpoint(a.judge, a.judge_model))
    sampling, counts = Sampling(a.tokens, a.temperature), Counter[str]()
    prompts, done = enumerate(asked), finished(a.out)
    waiting = islice(prompts, done, None)
    with writing(a.out), a.out.open("a") as out:
        while group := list(islice(waiting, a.batch)):
            twice = [(n, prompt, turn) for n, prompt in group for turn in (0, 1)]
            keys = [(a.seed, n, turn) for n, _, turn in twice]
            texts = model.complete([Chat(p, len(p)) for _, p, _ in twice], sampling, keys)
            pairs = [(first.strip(), second.strip()) for first, second in zip(texts[::2], texts[1::2], strict=True)]
            differ = [i for i, (first, second) in enumerate(pairs) if first != second and first and second]
            verdicts = judge([group[i][1] for i in differ], [pairs[i] for i in differ])
            for i, (better, facts) in zip(differ, verdicts, strict=True):
                if better is None:
                    counts["without a clear verdict"] += 1
                    continue
                row = {
                    "prompt": group[i][1],
                    "chosen": answer(pairs[i][better]),
                    "rejected": answer(pairs[i][1 - better]),
                }
                out.write(json.dumps({**row, **facts, "number": group[i][0]}, ensure_ascii=False) + "\n")
                counts["pairs"] += 1
            counts["with equal or empty answers"] += len(pairs) - len(differ)
            out.flush()
            print(
                f"{group[-1][0] + 1} prompts: {', '.join(f'{n} {what}' for what, n in counts.items())}", file=sys.stderr
            )


def reward_judge(model: RewardModel) -> Judge:
    """The higher score is better; both are kept, so that reward modelling can use their difference."""

    def judge(prompts: list[Prompt], pairs: list[tuple[str, str]]) -> list[tuple[int | None, dict[str, Any]]]:
        chats = [Chat([*p, *answer(text)], len(p)) for p, both in zip(prompts, pairs, strict=True) for text in both]
        scores, verdicts = model.score(chats), list[tuple[int | None, dict[str, Any]]]()
        for both in zip(scores[::2], scores[1::2], strict=True):
            facts = {"score_chosen": max(both), "score_rejected": min(both)}
            verdicts.append((None if both[0] == both[1] else int(both[1] > both[0]), facts))
        return verdicts

    return judge


def endpoint_judge(endpoint: Endpoint) -> Judge:
    """What the endpoint says in both orders."""

    def judge(prompts: list[Prompt], pairs: list[tuple[str, str]]) -> list[tuple[int | None, dict[str, Any]]]:
        return [(better, {"judge": endpoint.model}) for better in compare(endpoint, prompts, pairs)] if pairs else []

    return judge


def read(file: Path) -> Iterator[Prompt]:
    """Every row's prompt."""
    for where, chat, _ in read_rows(DataSource(str(file)), PROMPT_FORMATS, "prompt", mixed=True):
        if chat.tools:
            raise InputError(f"{where}: tools are not offered to the model that answers; leave such rows out")
        yield chat.messages


def finished(out: Path) -> int:
    """How many prompts lie behind the last pair that was written."""
    lines = list(read_lines(out)) if out.exists() else []
    if damaged := [line for line, row in lines if row is None]:
        aside = out.with_name(f"{out.name}.damaged")
        print(f"{out}: {len(damaged)} damaged line(s) were moved to {aside}", file=sys.stderr)
        with writing(aside), aside.open("ab") as file:
            file.writelines(damaged)
        write_bytes(out, b"".join(line for line, row in lines if row is not None))
    rows = [row for _, row in lines if row is not None]
    return int(rows[-1]["number"]) + 1 if rows else 0


def answer(text: str) -> Prompt:
    """An answer as messages."""
    return [{"role": "assistant", "content": text}]
