"""Inspect the training targets: the first units that a run would learn from, with its own overrides, and what was counted.

    onecurve preview experiment=sft model.path=DIR data.train=[chats.jsonl] data.eval=[held.jsonl] --rows 3

Any data of any pipeline is shown: packed rows, preferences, labelled completions, prompts. Trained tokens are green, context
is plain, a red bar ends a document, grey is padding. Where the output is no terminal, trained text stands in ⟦ ⟧.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice

from rich.console import Console
from rich.table import Table
from rich.text import Text

from trainer.cli.parsing import add_run_arguments, compose_run, parser_of
from trainer.data.corpus import Corpus
from trainer.data.rows import RowStore
from trainer.data.store import Span, UnitStore
from trainer.data.streaming import Stream
from trainer.data.tokenizer import Tokenizer


def main(arguments: Sequence[str]) -> int:
    """Print what was counted, and the units."""
    parser = parser_of("preview", __doc__)
    add_run_arguments(parser)
    parser.add_argument("--rows", type=int, default=3, help="units of every source to show, from the first")
    a, cfg = compose_run(parser, arguments, "preview")
    tokenizer, _ = cfg.open_tokenizer_and_shape()
    corpus = cfg.open_corpus(tokenizer)
    console = Console(highlight=False, soft_wrap=True)
    for line in corpus.summary:
        console.print(line, style="dim", markup=False)
    stores = sources(corpus)
    if stores:
        console.print(counted(stores))
    for title, spans, length in units(corpus, stores, a.rows):
        console.rule(Text(title))
        console.print(painted(spans, tokenizer, length, color=console.is_terminal))
    return 0


def sources(corpus: Corpus) -> dict[str, UnitStore]:
    """What is learnt from and measured on, by name; nothing for a stream, which is prepared while it is read."""
    parts: Sequence[UnitStore] = getattr(corpus.train, "parts", ())
    names = ["train"] if len(parts) == 1 else [f"train {number}" for number in range(1, len(parts) + 1)]
    return {**dict(zip(names, parts, strict=True)), **{f"eval/{name}": store for name, store in corpus.heldout.items()}}


def counted(stores: Mapping[str, UnitStore]) -> Table:
    """A row for each source: what preparing it counted."""
    counts = {name: store.counts() for name, store in stores.items()}
    columns = list(dict.fromkeys(column for row in counts.values() for column in row))
    table = Table("source", box=None, header_style="dim")
    for column in columns:
        table.add_column(column, justify="right")
    for name, row in counts.items():
        table.add_row(Text(name), *(f"{row[column]:,}" if column in row else "" for column in columns))
    return table


def units(corpus: Corpus, stores: Mapping[str, UnitStore], count: int) -> Iterator[tuple[str, list[Span], int | None]]:
    """The first units of every source that is learnt from: a title, what is in it, and how many positions it has."""
    if isinstance(corpus.train, Stream):
        rows = (
            row
            for shard in range(len(corpus.train.shards))
            for window in corpus.train.windows(shard, 0)
            for row in window
        )
        for number, segments in enumerate(islice(rows, count)):
            yield f"row {number} of the stream", [Span("", s.ids.tolist()) for s in segments], corpus.train.length
    for name, store in stores.items():
        for number in range(min(count, len(store)) if name.startswith("train") else 0):
            spans, length = store.spans(number), store.length if isinstance(store, RowStore) else None
            used = sum(len(span.ids) - 1 for span in spans)
            what = f"{len(spans)} documents, {used} of {length} tokens" if length else f"{used + len(spans)} tokens"
            yield f"{name}, {'row' if length else 'unit'} {number}: {what}", spans, length


def painted(spans: Sequence[Span], tokenizer: Tokenizer, length: int | None, *, color: bool) -> Text:
    """A unit's ids as text, with what is trained of them set apart; ``length``: positions of a row, the rest is padding."""
    text = Text()
    for title, ids, mask, _ in spans:
        if title:
            text.append(f"{title}: ", "bold")
        trained = [True] * len(ids) if mask is None else list(mask)
        first = 0
        for at in range(1, len(ids) + 1):
            if at == len(ids) or trained[at] != trained[first]:
                part = tokenizer.decode(ids[first:at], specials=True)
                text.append(part if color or not trained[first] else f"⟦{part}⟧", "green" if trained[first] else "")
                first = at
        text.append("┃\n", "bold red")
    if length is None:
        return text
    padding = length - sum(len(span.ids) - 1 for span in spans)
    return text.append(f"{padding} padding", "bright_black")
