"""A SentencePiece model as a ``tokenizer.json``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers
from sentencepiece import sentencepiece_model_pb2
from tokenizers import decoders, models, normalizers, pre_tokenizers

from trainer.data import charsmap

SPACE = "\u2581"
NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = 1, 2, 3, 4, 5, 6


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
    settings: dict[str, Any] = {role: piece for role, (number, piece) in roles.items() if number >= 0}
    # SentencePiece puts it there unless a folder says otherwise, and so does transformers.
    return backend.to_str(), {**settings, "add_bos_token": trainer.bos_id >= 0}


def with_added_tokens(definition: str, added: Mapping[int, tuple[str, bool]]) -> str:
    """A definition with tokens that stand beside its model: by id a name, and whether it is a control token.

    Raises:
        ValueError: if they do not follow the model's own, without a gap.
    """
    backend = tokenizers.Tokenizer.from_str(definition)
    for number, (name, special) in sorted(added.items()):
        if backend.token_to_id(name) is None:
            backend.add_tokens([tokenizers.AddedToken(name, normalized=False, special=special)])
        if backend.token_to_id(name) != number:
            rule = "tokens added to a tokenizer.model follow its own without a gap"
            raise ValueError(f"{name} has id {number} beside it and {backend.token_to_id(name)} in it; {rule}")
    return backend.to_str()


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
    merges = merges_by_score({p.piece: p.score for p in pieces if p.type in (NORMAL, USER)}, vocabulary)
    return models.BPE(vocabulary, merges, unk_token=trainer.unk_piece, fuse_unk=True, byte_fallback=fallback)


def merges_by_score(scores: Mapping[str, float], vocabulary: Mapping[str, int]) -> list[tuple[str, str]]:
    """Every way to split a piece into two others; a piece's score says how early it is merged.

    Among equal scores SentencePiece merges the leftmost pair, so a piece goes on growing: longer left parts come first.
    """
    merges = []
    for piece, score in scores.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in scores and right in scores:
                merges.append((-score, -len(left), vocabulary[left], vocabulary[right], left, right))
    return [(left, right) for *_, left, right in sorted(merges)]


def _normalizer(model: Any) -> Any:
    rules = model.normalizer_spec
    steps: list[Any] = []
    if rules.precompiled_charsmap:
        steps += charsmap.normalizers_of(rules.precompiled_charsmap)
    if rules.remove_extra_whitespaces:
        # Spaces alone: `Strip` takes newlines, too.
        steps += [
            normalizers.Replace(tokenizers.Regex(r"\A +| +\z"), ""),
            normalizers.Replace(tokenizers.Regex(" {2,}"), " "),
        ]
    if rules.add_dummy_prefix:
        steps.append(normalizers.Prepend(SPACE))
    return normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])


def _decoder(model: Any) -> Any:
    steps: list[Any] = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if model.normalizer_spec.add_dummy_prefix:
        steps.append(decoders.Strip(content=" ", left=1))
    return decoders.Sequence(steps)
