"""Train a SentencePiece tokenizer on text.

    python scripts/train_tokenizer.py OUT corpus.jsonl.gz --vocab-size 8192 --kind bpe
    python scripts/train_tokenizer.py OUT tinyworld            the one of the generated language, 512 pieces

OUT gets tokenizer.json (what runs use), tokenizer.model and tokenizer_config.json; ``tokenizer.path=OUT`` names it to a run.
"""

from __future__ import annotations

import argparse
import sys
from itertools import islice
from pathlib import Path

from trainer.config import ConfigError
from trainer.data.sources import DataError, DataSource, OnBadRow
from trainer.data.tokenizer_training import ModelType, train
from trainer.tinyworld.data import TinyWorldData


def main() -> None:
    """Train what the command line describes; exit code 2 and a sentence where it cannot work."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="the folder to write; must not exist")
    parser.add_argument("sources", nargs="+", help="text, JSONL (.gz, .zst), Parquet, folders of them, or hub ids")
    parser.add_argument("--vocab-size", type=int, default=8192, help="pieces, the 256 bytes and specials included")
    parser.add_argument("--kind", choices=list(ModelType), default=ModelType.bpe.value, help="how pieces are found")
    parser.add_argument("--special", action="append", default=[], help="a further control token; may be repeated")
    parser.add_argument("--column", default="text", help="the column that holds the text")
    parser.add_argument("--documents", type=int, default=None, help="how many documents to look at; default all")
    parser.add_argument("--skip-bad-rows", action="store_true", help="leave bad rows out instead of stopping")
    a = parser.parse_args()
    try:
        if a.sources == ["tinyworld"]:
            TinyWorldData().train_tokenizer(a.out)
            print(f"{a.out}: use it with tokenizer.path={a.out}")
            return
        sources = [DataSource(s, a.column, OnBadRow.skip if a.skip_bad_rows else OnBadRow.error) for s in a.sources]
        problems = [p for s in sources if (p := s.problem())]
        if problems:
            raise ConfigError(problems)
        documents = (text for source in sources for text in source.documents())
        tokenizer = train(
            islice(documents, a.documents),
            a.out,
            vocab_size=a.vocab_size,
            model_type=ModelType(a.kind),
            specials=tuple(a.special),
        )
    except (ConfigError, DataError, FileExistsError, ValueError) as error:
        sys.exit(f"{error}")
    print(f"{a.out}: {tokenizer.vocab_size} pieces; use it with tokenizer.path={a.out}")


if __name__ == "__main__":
    main()
