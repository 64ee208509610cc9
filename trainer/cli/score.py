"""Score answers with a reward model: a JSON line in, the same line with its ``score`` out.

    onecurve score runs/reward/export answers.jsonl > scored.jsonl

Rows are conversations in any form that SFT reads (messages, prompt and completion). Scores are normalised by the mean and
deviation that were stored with the model, unless --raw.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from trainer.cli.parsing import add_template_arguments, parser_of, template_options
from trainer.data.hub import local_folder
from trainer.data.row_formats import CHAT_FORMATS, read_rows
from trainer.data.sources import DataSource
from trainer.generation.pretrained import RewardModel, validate_scoring

BATCH = 16
"""Rows that are scored at once."""


def main(arguments: Sequence[str]) -> int:
    """Score every line."""
    parser = parser_of("score", __doc__)
    parser.add_argument("model", type=Path, help="an exported reward model, or a hub id")
    parser.add_argument("answers", type=Path, help="JSON lines")
    parser.add_argument("--raw", action="store_true", help="not normalised")
    add_template_arguments(parser)
    a = parser.parse_args(arguments)
    for row, score in scored(a):
        print(json.dumps({**row, "score": score}, ensure_ascii=False), flush=True)
    return 0


def scored(a: argparse.Namespace) -> Iterator[tuple[dict[str, Any], float]]:
    """Every row with its score."""
    validate_scoring(local_folder(a.model))
    rows = list(read_rows(DataSource(str(a.answers)), CHAT_FORMATS))  # all of them before a model is loaded
    model = RewardModel.open(a.model, a.template, **template_options(a))
    for first in range(0, len(rows), BATCH):
        group = rows[first : first + BATCH]
        scores = model.score([chat for _, chat, _ in group], raw=a.raw)
        yield from ((dict(row), score) for (_, _, row), score in zip(group, scores, strict=True))
