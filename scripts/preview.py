"""Look at what a run would learn: a few packed rows in colour, with a job's own overrides.

    python scripts/preview.py experiment=sft model.path=DIR data.train=[chats.jsonl] data.eval=[held.jsonl] [--rows 3]

Trained tokens are green, context is plain, a red bar is the end of a document, grey dots are padding. Where the output is no
terminal, trained text stands in ⟦ ⟧.
"""

from __future__ import annotations

import argparse
import sys

from rich.console import Console
from rich.text import Text

from trainer.cli import refusal
from trainer.compose import compose
from trainer.config import ConfigError
from trainer.data.rows import Segment
from trainer.data.sources import DataError
from trainer.data.tokenizer import Tokenizer


def main() -> None:
    """Print the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="as of the job")
    parser.add_argument("--rows", type=int, default=3, help="rows to show, from the first")
    a = parser.parse_args()
    try:
        cfg = compose(a.overrides, name="preview")
        tokenizer, _ = cfg.open_tokenizer_and_shape()
        corpus = cfg.data.open(tokenizer, cfg.batch.length, cfg.seed)
    except ConfigError as error:
        print(refusal(error), file=sys.stderr)
        sys.exit(2)
    except DataError as error:
        sys.exit(f"{error}")
    console = Console(highlight=False, soft_wrap=True)
    for line in corpus.summary:
        console.print(line, style="dim", markup=False)
    part = getattr(corpus.train, "parts", [None])[0]
    if part is None:
        sys.exit("error: data.streaming=true packs while it trains; preview it with data.streaming=false")
    for number in range(min(a.rows, len(part))):
        pieces = part.unit(number)
        console.rule(
            f"row {number}: {len(pieces)} documents, {sum(len(p.ids) - 1 for p in pieces)} of {part.length} tokens"
        )
        console.print(painted(pieces, tokenizer, part.length, colour=console.is_terminal))


def painted(pieces: list[Segment], tokenizer: Tokenizer, length: int, *, colour: bool) -> Text:
    """A row's documents, what is trained of them told apart."""
    text = Text()
    for ids, trained in pieces:
        learnt = [True] * len(ids) if trained is None else trained.tolist()
        first = 0
        for at in range(1, len(ids) + 1):
            if at == len(ids) or learnt[at] != learnt[first]:
                part = tokenizer.decode(ids[first:at].tolist(), specials=True)
                text.append(part if colour or not learnt[first] else f"⟦{part}⟧", "green" if learnt[first] else "")
                first = at
        text.append("┃\n", "bold red")
    left = length - sum(len(ids) - 1 for ids, _ in pieces)
    return text.append(f"{left} padding", "bright_black")


if __name__ == "__main__":
    main()
