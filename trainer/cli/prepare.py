"""Tokenise and pack the data of a run before it, on a machine without its devices.

    onecurve prepare experiment=text data.train=[corpus.jsonl.gz] data.eval=[] tokenizer.path=tok batch.length=2048

Takes the overrides of the run. The rows go to the cache (data.cache, $ONECURVE_CACHE or ~/.cache/onecurve), where the run
finds them; a run without this prepares them itself.
"""

from __future__ import annotations

from collections.abc import Sequence

from trainer.cli.parsing import add_run_arguments, compose_run, parser_of


def main(arguments: Sequence[str]) -> int:
    """Prepare what the command line describes."""
    parser = parser_of("prepare", __doc__)
    add_run_arguments(parser)
    _, cfg = compose_run(parser, arguments, "prepare")
    tokenizer, _ = cfg.open_tokenizer_and_shape()
    print("\n".join(cfg.open_corpus(tokenizer).summary))
    return 0
