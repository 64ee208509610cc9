"""Mistral's ``tekken.json`` as a ``tokenizer.json``: byte pairs by rank, and control tokens that come before them."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

FIRST_CONTROL_TOKENS = (
    "<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]",
    "[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]", "[PREFIX]", "[MIDDLE]", "[SUFFIX]",
    "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]",
)  # fmt: skip
"""Those of files up to version 7, which do not list them."""
NEEDED = ("pattern", "default_vocab_size", "default_num_special_tokens")
ROLE_NAMES = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}


def is_tekken(file: Path) -> bool:
    """Whether a file is in this format, by its name."""
    return "tekken" in file.name and file.suffix == ".json"


def definition_of(file: Path) -> tuple[str, dict[str, Any]]:
    """``tokenizer.json`` and the names of the special tokens of a ``tekken.json``.

    Raises:
        ValueError: naming what the file lacks, or what contradicts itself.
    """
    stored = json.loads(file.read_text(encoding="utf-8"))
    config = stored.get("config", {})
    if missing := [key for key in NEEDED if key not in config] + ["vocab"] * ("vocab" not in stored):
        raise ValueError(f"missing keys {', '.join(missing)}; download it again")
    special = _control_tokens(stored.get("special_tokens"), config["default_num_special_tokens"])
    pieces = [base64.b64decode(entry["token_bytes"]) for entry in sorted(stored["vocab"], key=lambda e: e["rank"])]
    ranks = {piece: rank for rank, piece in enumerate(pieces[: config["default_vocab_size"] - len(special)])}
    letters = _letters()
    spelled = {piece: "".join(letters[byte] for byte in piece) for piece in ranks}
    vocabulary = {name: number for number, name in enumerate(special)}
    if both := [name for name in spelled.values() if name in vocabulary]:
        raise ValueError(f"{both[0]} is a piece of text and a control token; download it again")
    vocabulary |= {name: len(special) + ranks[piece] for piece, name in spelled.items()}
    merges = [(spelled[left], spelled[right]) for left, right in _merges(ranks)]
    split = pre_tokenizers.Split(tokenizers.Regex(config["pattern"]), "isolated")
    # What the pattern leaves in one is a piece if it can be, whichever merges lead to it; but never a control token.
    direct = all(len(split.pre_tokenize_str(name)) > 1 for name in special)
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, merges, ignore_merges=direct))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([tokenizers.AddedToken(name, normalized=False, special=True) for name in special])
    roles = {role: name for role, name in ROLE_NAMES.items() if name in vocabulary}
    return backend.to_str(), {**roles, "add_bos_token": True}


def _control_tokens(listed: Sequence[Mapping[str, Any]] | None, count: int) -> list[str]:
    """Names of the first ``count`` ids, which no text becomes; ids without a name get one."""
    names = dict(enumerate(FIRST_CONTROL_TOKENS))
    if listed is not None:
        names = {token["rank"]: token["token_str"] for token in listed}
    return [names.get(n, f"<SPECIAL_{n}>") for n in range(count)]


def _merges(ranks: Mapping[bytes, int]) -> list[tuple[bytes, bytes]]:
    """Every way to split a piece into two others, by the piece's rank.

    Among pairs of one rank the leftmost is merged, so a piece goes on growing: longer left parts come first.
    """
    merges = []
    for piece, rank in ranks.items():
        for cut in range(1, len(piece)):
            if piece[:cut] in ranks and piece[cut:] in ranks:
                merges.append((rank, -cut, piece[:cut], piece[cut:]))
    return [(left, right) for _, _, left, right in sorted(merges)]


def _letters() -> list[str]:
    """The character that stands for each byte in a byte-level vocabulary: its own where it can be seen."""
    seen = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in seen]
    return [chr(byte) if byte in seen else chr(256 + others.index(byte)) for byte in range(256)]
