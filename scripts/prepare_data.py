"""Tokenise and pack the data of a run before it, on a machine without its devices.

    python scripts/prepare_data.py data=text data.train=[corpus.jsonl.gz] tokenizer.path=tok batch.length=2048

takes the overrides of the run. The rows go to the cache (data.cache, $ONECURVE_CACHE or ~/.cache/onecurve), where the run
finds them; a run without this prepares them itself.
"""

from __future__ import annotations

import sys

from trainer.cli import refusal
from trainer.compose import compose
from trainer.config import ConfigError
from trainer.data.sources import DataError


def main() -> None:
    """Prepare what the command line describes; exit code 2 and all problems where it cannot work."""
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__)
        return
    try:
        cfg = compose(arguments, name="prepare")
        tokenizer, _ = cfg.open_tokenizer_and_shape()
        corpus = cfg.data.open(tokenizer, cfg.batch.length, cfg.seed)
    except ConfigError as error:
        print(refusal(error), file=sys.stderr)
        sys.exit(2)
    except DataError as error:
        sys.exit(f"{error}")
    print("\n".join(corpus.summary))


if __name__ == "__main__":
    main()
