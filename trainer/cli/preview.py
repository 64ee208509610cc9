"""Inspect the training targets: the first units that a run would learn from, with its own overrides.

    onecurve preview experiment=sft model.path=DIR data.train=[chats.jsonl] data.eval=[held.jsonl] --rows 3

Trained tokens are green, context is plain, a red bar ends a document, grey is padding. Where the output is no terminal,
trained text stands in ⟦ ⟧. Preferences, labelled completions and prompts are shown as texts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.text import Text

from trainer.cli.parsing import add_run_arguments, compose_run, parser_of
from trainer.config import ConfigError
from trainer.data.rows import RowStore, Segment
from trainer.data.tokenizer import Tokenizer


def main(arguments: Sequence[str]) -> int:
    """Print the units."""
    parser = parser_of("preview", __doc__)
    add_run_arguments(parser)
    parser.add_argument("--rows", type=int, default=3, help="units to show, from the first")
    a, cfg = compose_run(parser, arguments, "preview")
    tokenizer, _ = cfg.open_tokenizer_and_shape()
    corpus = cfg.open_corpus(tokenizer)
    console = Console(highlight=False, soft_wrap=True)
    for line in corpus.summary:
        console.print(line, style="dim", markup=False)
    units: Any = getattr(corpus.train, "parts", [None])[0]
    if units is None:
        raise ConfigError(["data.streaming=true packs while it trains; preview it with data.streaming=false"])
    for number in range(min(a.rows, len(units))):
        if isinstance(units, RowStore):
            pieces = units.unit(number)
            used = sum(len(piece.ids) - 1 for piece in pieces)
            console.rule(f"row {number}: {len(pieces)} documents, {used} of {units.length} tokens")
            console.print(painted(pieces, tokenizer, units.length, color=console.is_terminal))
        else:
            console.rule(f"unit {number}")
            for name, text in units.preview(number, tokenizer).items():
                if text:
                    console.print(Text(f"{name}: ", "bold").append(text, ""))
    return 0


def painted(pieces: Sequence[Segment], tokenizer: Tokenizer, length: int, *, color: bool) -> Text:
    """A packed row's documents, with what is trained of them set apart."""
    text = Text()
    for ids, mask in pieces:
        trained = [True] * len(ids) if mask is None else mask.tolist()
        first = 0
        for at in range(1, len(ids) + 1):
            if at == len(ids) or trained[at] != trained[first]:
                part = tokenizer.decode(ids[first:at].tolist(), specials=True)
                text.append(part if color or not trained[first] else f"⟦{part}⟧", "green" if trained[first] else "")
                first = at
        text.append("┃\n", "bold red")
    padding = length - sum(len(ids) - 1 for ids, _ in pieces)
    return text.append(f"{padding} padding", "bright_black")
