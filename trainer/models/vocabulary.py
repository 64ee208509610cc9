"""Whether a tokenizer is a model's own: ids of another one are words that the model never learnt."""

from __future__ import annotations

from trainer.config import ConfigError
from trainer.data.tokenizer import Tokenizer, open_tokenizer

ALIKE = 0.9
"""Least part of a model's pieces that have the same ids: reserved tokens may have been given other names."""
PADDED = 1.2
"""Most rows of a vocabulary for each token: tables are made larger than their tokenizer, to a multiple."""


def refuse_foreign_tokenizer(tokenizer: Tokenizer, path: str | None, folder: str | None, rows: int) -> None:
    """Compare the tokenizer from ``path`` with that of the model in ``folder``, which has ``rows`` embeddings.

    Raises:
        ConfigError: if it is another model's, as far as that can be seen.
    """
    if path is None or folder is None:
        return
    remedy = f"leave tokenizer.path out, or train a new model (model=...) instead of model.path={folder}"
    try:
        own = open_tokenizer(folder)
    except ConfigError:
        if rows > PADDED * tokenizer.vocab_size:
            rule = f"has {tokenizer.vocab_size:,} tokens and model.path={folder} {rows:,}"
            raise ConfigError([f"tokenizer.path={path} {rule}; {remedy}"]) from None
        return
    if tokenizer.ids_as(own):
        return
    pieces, theirs = own.pieces, tokenizer.pieces
    if sum(theirs.get(piece) == number for piece, number in pieces.items()) >= ALIKE * len(pieces):
        return
    piece = next(piece for piece, number in pieces.items() if theirs.get(piece) != number)
    given = f"the id {theirs[piece]:,}" if piece in theirs else "no id"
    rule = f"is another model's: it gives {piece!r} {given}, and the tokenizer in model.path={folder} {pieces[piece]:,}"
    raise ConfigError([f"tokenizer.path={path} {rule}; {remedy}"])
