"""Split a data set into rows to learn from and rows to hold out, so that near-equal prompts stay on one side.

    onecurve split chats.jsonl train.jsonl held.jsonl --held 500

Two prompts are near-equal if they share at least half of the words that either has (Jaccard index), names and numbers
included; chains of such prompts are one cluster. Rows come from anything that a run reads, and are written as JSON lines.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from trainer.cli.parsing import parser_of
from trainer.config import InputError
from trainer.data.sources import DataSource
from trainer.data.splitting import prompt_text, split
from trainer.disk import writing


def main(arguments: Sequence[str]) -> int:
    """Cluster, shuffle, split."""
    parser = parser_of("split", __doc__)
    parser.add_argument("rows", help="JSON lines, Parquet, a folder, or a hub id")
    parser.add_argument("train", type=Path, help="JSON lines to write")
    parser.add_argument("heldout", type=Path, help="JSON lines to write", metavar="held")
    parser.add_argument("--held", dest="count", type=int, default=500, help="rows to hold out at least; default 500")
    parser.add_argument("--column", help="the column that holds the prompt; default: the usual ones")
    parser.add_argument("--alike", type=_share, default=0.5, help="part of the words that near-equal prompts share")
    parser.add_argument("--seed", type=int, default=0)
    a = parser.parse_args(arguments)
    if taken := [str(file) for file in (a.train, a.heldout) if file.exists()]:
        raise InputError(f"{' and '.join(taken)} would be overwritten; move it away first")
    source = DataSource(a.rows)
    if problem := source.problem():
        raise InputError(problem)
    rows = [row for _, row in source.rows()]
    heldout = split([prompt_text(row, a.column) for row in rows], a.count, a.alike, a.seed)
    _write(a.train, (row for n, row in enumerate(rows) if n not in heldout))
    _write(a.heldout, (row for n, row in enumerate(rows) if n in heldout))
    print(f"{len(rows) - len(heldout)} rows to learn from, {len(heldout)} held out")
    return 0


def _share(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not above 0 and at most 1")
    return value


def _write(file: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    with writing(file):
        file.write_text("".join(f"{json.dumps(row, ensure_ascii=False, default=str)}\n" for row in rows))
