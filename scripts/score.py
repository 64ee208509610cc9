"""Score answers with a reward model: a JSON line in, the same line with its ``score`` out.

    python scripts/score.py runs/reward/export answers.jsonl > scored.jsonl

Rows are conversations in any form that SFT reads (messages, prompt and completion). Scores are normalised by the mean and
deviation that were stored with the model, unless --raw.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from trainer.config import ConfigError
from trainer.data.chats import ChatData
from trainer.data.sources import DataError, DataSource
from trainer.data.templates import TemplateError
from trainer.generation.pretrained import RewardModel
from trainer.models.hf_format import FormatError

TOGETHER = 16


def main() -> None:
    """Score every line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="an exported reward model")
    parser.add_argument("answers", type=Path, help="JSON lines")
    parser.add_argument("--raw", action="store_true", help="not normalised")
    a = parser.parse_args()
    try:
        for row, score in scored(a):
            print(json.dumps({**row, "score": score}, ensure_ascii=False), flush=True)
    except (ConfigError, FormatError, DataError, TemplateError) as error:
        sys.exit(f"error: {error}")


def scored(a: argparse.Namespace) -> Iterator[tuple[dict[str, Any], float]]:
    """Every row with its score."""
    model = RewardModel.open(a.model)
    chats = ChatData(train=[str(a.answers)]).chats(DataSource(str(a.answers)))
    rows = zip(DataSource(str(a.answers)).rows(), chats, strict=True)
    while group := list(islice(rows, TOGETHER)):
        scores = model.score([chat for _, (_, chat) in group], raw=a.raw)
        yield from ((dict(row), score) for ((_, row), _), score in zip(group, scores, strict=True))


if __name__ == "__main__":
    main()
