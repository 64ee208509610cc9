"""Training a SentencePiece tokenizer."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from enum import StrEnum, auto
from pathlib import Path

import sentencepiece

from trainer.data.sentencepiece_format import definition_of
from trainer.data.tokenizer import Tokenizer, open_tokenizer
from trainer.disk import new_folder, write_bytes


class ModelType(StrEnum):
    """How SentencePiece divides text."""

    bpe = auto()
    unigram = auto()


def train(
    documents: Iterable[str],
    out: Path,
    *,
    vocab_size: int,
    model_type: ModelType = ModelType.bpe,
    specials: tuple[str, ...] = (),
    character_coverage: float = 0.9995,
) -> Tokenizer:
    """Train on ``documents`` and write a folder; the same documents give the same bytes.

    Nothing is normalised, digits stand alone and unknown characters fall back to bytes, so decoding gives back every text.
    ``specials``: further control tokens, after ``<unk>``, ``<s>``, ``</s>`` and ``<pad>``.

    Raises:
        FileExistsError: nothing is overwritten.
        ValueError: if the text is too small for ``vocab_size``.
    """
    if out.exists():
        raise FileExistsError(f"{out} exists already; choose another folder")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_sentences(documents),
            model_writer=model,
            vocab_size=vocab_size,
            model_type=model_type.value,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            split_digits=True,
            byte_fallback=True,
            character_coverage=character_coverage,
            max_sentence_length=1 << 20,
            allow_whitespace_only_pieces=True,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=3,
            control_symbols=list(specials),
            num_threads=1,
            minloglevel=2,
            train_extremely_large_corpus=False,
        )
    except RuntimeError as error:
        raise ValueError(f"vocab_size={vocab_size} does not fit this text: {str(error).rpartition(') ')[2]}") from None
    with new_folder(out) as partial:
        partial.mkdir()
        write_bytes(partial / "tokenizer.model", model.getvalue())
        definition, settings = definition_of(partial / "tokenizer.model")
        Tokenizer(definition, settings).save(partial)
    return open_tokenizer(out)


def _sentences(documents: Iterable[str]) -> Iterator[str]:
    """Lines with their line ends: SentencePiece takes a sentence at a time, and NUL ends one for it."""
    for document in documents:
        for line in document.splitlines(keepends=True):
            if cleaned := line.replace("\0", ""):
                yield cleaned
