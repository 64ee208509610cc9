"""SentencePiece: training, and the same model as a ``tokenizer.json``."""

from __future__ import annotations

import io
import re
import shutil
import uuid
from collections.abc import Iterable, Iterator
from enum import StrEnum, auto
from pathlib import Path
from typing import Any

import sentencepiece
import tokenizers
from sentencepiece import sentencepiece_model_pb2
from tokenizers import decoders, models, normalizers, pre_tokenizers

from trainer.data.tokenizer import Tokenizer, open_tokenizer

SPACE = "\u2581"
NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = 1, 2, 3, 4, 5, 6


class Kind(StrEnum):
    """How pieces are found."""

    bpe = auto()
    unigram = auto()


def train(
    documents: Iterable[str],
    out: Path,
    *,
    vocab_size: int,
    kind: Kind = Kind.bpe,
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
            sentence_iterator=_sentences(documents), model_writer=model, vocab_size=vocab_size, model_type=kind.value,
            normalization_rule_name="identity", add_dummy_prefix=False, remove_extra_whitespaces=False,
            split_digits=True, byte_fallback=True, character_coverage=character_coverage, max_sentence_length=1 << 20,
            allow_whitespace_only_pieces=True, unk_id=0, bos_id=1, eos_id=2, pad_id=3, control_symbols=list(specials),
            num_threads=1, minloglevel=2, train_extremely_large_corpus=False,
        )  # fmt: skip
    except RuntimeError as error:
        raise ValueError(f"vocab_size={vocab_size} does not fit this text: {str(error).rpartition(') ')[2]}") from None
    partial = out.with_name(f"{out.name}.tmp-{uuid.uuid4().hex[:8]}")
    partial.mkdir(parents=True)
    try:
        (partial / "tokenizer.model").write_bytes(model.getvalue())
        definition, settings = definition_of(partial / "tokenizer.model")
        Tokenizer(definition, settings).save(partial)
        partial.rename(out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return open_tokenizer(out)


def _sentences(documents: Iterable[str]) -> Iterator[str]:
    """Lines with their line ends: SentencePiece takes a sentence at a time, and NUL ends one for it."""
    for document in documents:
        for line in document.splitlines(keepends=True):
            if cleaned := line.replace("\0", ""):
                yield cleaned


def definition_of(file: Path) -> tuple[str, dict[str, Any]]:
    """``tokenizer.json`` and the names of the special tokens of a SentencePiece model."""
    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString(file.read_bytes())
    backend = tokenizers.Tokenizer(_model(model))
    backend.normalizer = _normalizer(model)
    backend.decoder = _decoder(model)
    trainer = model.trainer_spec
    if trainer.model_type == trainer.UNIGRAM:
        backend.pre_tokenizer = _keep_apart([p.piece for p in model.pieces if p.type in (UNKNOWN, CONTROL)])
    backend.add_special_tokens([_exact(p.piece) for p in model.pieces if p.type in (UNKNOWN, CONTROL)])
    backend.add_tokens([_exact(p.piece) for p in model.pieces if p.type == USER])
    roles = {
        "bos_token": (trainer.bos_id, trainer.bos_piece),
        "eos_token": (trainer.eos_id, trainer.eos_piece),
        "pad_token": (trainer.pad_id, trainer.pad_piece),
        "unk_token": (trainer.unk_id, trainer.unk_piece),
    }
    return backend.to_str(), {role: piece for role, (number, piece) in roles.items() if number >= 0}


def _exact(piece: str) -> tokenizers.AddedToken:
    return tokenizers.AddedToken(piece, normalized=False, special=True)


def _keep_apart(names: list[str]) -> Any:
    """Cut text that happens to read like a control token behind its first character, or a unigram model would find it."""
    pattern = "|".join(f"{re.escape(name[0])}(?={re.escape(name[1:])})" for name in names)
    return pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")


def _model(model: Any) -> Any:
    pieces, trainer = model.pieces, model.trainer_spec
    fallback = bool(trainer.byte_fallback)
    if trainer.model_type == trainer.UNIGRAM:
        scored = [(p.piece, p.score) for p in pieces]
        return models.Unigram(scored, unk_id=trainer.unk_id, byte_fallback=fallback)
    vocabulary = {p.piece: number for number, p in enumerate(pieces)}
    return models.BPE(
        vocabulary, _merges(pieces, vocabulary), unk_token=trainer.unk_piece, fuse_unk=True, byte_fallback=fallback
    )


def _merges(pieces: Any, vocabulary: dict[str, int]) -> list[tuple[str, str]]:
    """Every way to split a piece into two others; a piece's score says how early it is merged.

    Among equal scores SentencePiece merges the leftmost pair, so a piece goes on growing: longer left parts come first.
    """
    scores = {p.piece: p.score for p in pieces if p.type in (NORMAL, USER)}
    found = []
    for piece, score in scores.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in scores and right in scores:
                found.append((-score, -len(left), vocabulary[left], vocabulary[right], left, right))
    return [(left, right) for *_, left, right in sorted(found)]


def _normalizer(model: Any) -> Any:
    rules = model.normalizer_spec
    steps: list[Any] = []
    if rules.precompiled_charsmap:
        steps.append(normalizers.Precompiled(rules.precompiled_charsmap))
    if rules.remove_extra_whitespaces:
        steps += [normalizers.Strip(left=True, right=True), normalizers.Replace(tokenizers.Regex(" {2,}"), " ")]
    if rules.add_dummy_prefix:
        steps.append(normalizers.Prepend(SPACE))
    return normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])


def _decoder(model: Any) -> Any:
    steps: list[Any] = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if model.normalizer_spec.add_dummy_prefix:
        steps.append(decoders.Strip(content=" ", left=1))
    return decoders.Sequence(steps)
