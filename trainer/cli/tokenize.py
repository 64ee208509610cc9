"""Train a SentencePiece tokenizer on text.

    onecurve tokenize runs/tokenizer corpus.jsonl.gz --vocab-size 8192 --kind bpe
    onecurve tokenize runs/tokenizer tinyworld            the one of the generated language, 512 pieces

The folder gets tokenizer.json (what runs use), tokenizer.model and tokenizer_config.json; tokenizer.path=FOLDER names it to a
run.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from pathlib import Path

from trainer.cli.parsing import parser_of
from trainer.config import ConfigError, InputError
from trainer.data.sources import DataSource, OnBadRow
from trainer.data.tokenizer_training import ModelType, train
from trainer.tinyworld.data import TinyWorldData


def main(arguments: Sequence[str]) -> int:
    """Train what the command line describes."""
    parser = parser_of("tokenize", __doc__)
    parser.add_argument("out", type=Path, help="the folder to write; must not exist")
    parser.add_argument("sources", nargs="+", help="text, JSONL (.gz, .zst), Parquet, folders of them, or hub ids")
    parser.add_argument("--vocab-size", type=int, default=8192, help="pieces, the 256 bytes and specials included")
    parser.add_argument("--kind", choices=list(ModelType), default=ModelType.bpe.value, help="how pieces are found")
    parser.add_argument("--special", action="append", default=[], help="a further control token; may be repeated")
    parser.add_argument("--column", default="text", help="the column that holds the text")
    parser.add_argument("--documents", type=int, default=None, help="how many documents to look at; default all")
    parser.add_argument("--skip-bad-rows", action="store_true", help="leave bad rows out instead of stopping")
    a = parser.parse_args(arguments)
    if a.out.exists():
        raise InputError(f"{a.out} exists already; name another folder")
    if a.sources == ["tinyworld"]:
        TinyWorldData().train_tokenizer(a.out)
        print(f"{a.out}: use it with tokenizer.path={a.out}")
        return 0
    sources = [DataSource(s, a.column, OnBadRow.skip if a.skip_bad_rows else OnBadRow.error) for s in a.sources]
    if problems := [problem for source in sources if (problem := source.problem())]:
        raise ConfigError(problems, "This tokenizer")
    documents = (text for source in sources for text in source.documents())
    try:
        tokenizer = train(
            islice(documents, a.documents),
            a.out,
            vocab_size=a.vocab_size,
            model_type=ModelType(a.kind),
            specials=tuple(a.special),
        )
    except ValueError as error:
        raise InputError(str(error)) from None
    print(f"{a.out}: {tokenizer.vocab_size} pieces; use it with tokenizer.path={a.out}")
    return 0
