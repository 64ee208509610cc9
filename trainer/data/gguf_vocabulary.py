"""A tokenizer as the metadata of a GGUF file, and back: what llama.cpp makes the same tokens of as this tokenizer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from trainer.config import InputError
from trainer.data.sentencepiece_format import BYTE, CONTROL, NORMAL, SPACE, UNKNOWN, UNUSED, USER, merges_by_score
from trainer.data.tokenizer import Tokenizer

KEYS = "tokenizer.ggml."
DIGIT = r"\p{N}"
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + REST
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", DIGIT)
QWEN35 = (
    CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SEED = (
    CONTRACTIONS
    + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1}| ?[^\s\p{L}\p{N}"
    + "\r\n"
    + r"]+|\s*["
    + "\r\n"
    + r"]+|\s+(?!\S)|\s+"
)
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*|\p{{N}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT4O = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+{CONTRACTIONS}?|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*{CONTRACTIONS}?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
DEEPSEEK3 = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^" + "\r\n" + r"\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+["
    + "\r\n" + r"]*|\s*[" + "\r\n" + r"]+|\s+(?!\S)|\s+"
)  # fmt: skip


@dataclass(frozen=True)
class PreTokenizer:
    """How text is cut before merging.

    ``patterns``: one after the other. ``direct``: whether what they leave in one is a piece if it can be, whichever merges
    lead to it.
    """

    patterns: tuple[str, ...]
    direct: bool = False


PRE_TOKENIZERS = {
    "gpt-2": PreTokenizer((GPT2,)),
    "smollm": PreTokenizer((DIGIT, GPT2)),
    "llama-bpe": PreTokenizer((LLAMA3,), direct=True),
    "smaug-bpe": PreTokenizer((LLAMA3,)),
    "qwen2": PreTokenizer((QWEN2,)),
    "qwen35": PreTokenizer((QWEN35,)),
    "deepseek-v3": PreTokenizer((r"\p{N}{1,3}", "[一-龥぀-ゟ゠-ヿ]+", DEEPSEEK3)),
    "seed-coder": PreTokenizer((SEED,)),
    "tekken": PreTokenizer((TEKKEN,), direct=True),
    "gpt-4o": PreTokenizer((GPT4O,)),
}
"""By ``tokenizer.ggml.pre``; of several names for the same the one that is written."""
OTHER_NAMES = {
    "default": "gpt-2", "exaone4": "gpt-2", "olmo": "gpt-2", "phi-2": "gpt-2", "starcoder": "smollm", "refact": "smollm",
    "command-r": "smollm", "exaone": "smollm", "codeshell": "smollm", "llama3": "llama-bpe", "llama-v3": "llama-bpe",
    "falcon3": "llama-bpe", "dbrx": "smaug-bpe", "glm4": "smaug-bpe", "chatglm-bpe": "smaug-bpe", "stablelm2": "qwen2",
    "deepseek-r1-qwen": "qwen2", "megrez": "qwen2", "hunyuan-dense": "deepseek-v3", "llama4": "gpt-4o",
}  # fmt: skip
ASCII_CASE = ("tekken", "gpt-4o")
"""Names of those that tell upper from lower case, which llama.cpp does for ASCII alone."""
ROLES = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}
ENDS = ("eot", "eom")
"""Keys of further tokens that end a generation."""


def vocabulary_problems(tokenizer: Tokenizer, size: int) -> Iterator[str]:
    """One sentence for each thing of a tokenizer that llama.cpp has not; ``size``: of the model's vocabulary."""
    definition = tokenizer.definition
    model = definition["model"]
    if tokenizer.vocab_size > size:
        yield f"the tokenizer has {tokenizer.vocab_size} tokens, more than the model's {size}"
    if model["type"] != "BPE":
        yield f"a {model['type']} tokenizer is not written as GGUF; only byte-level and SentencePiece BPE are"
        return
    if _is_byte_level(definition):
        yield from _byte_level_problems(definition)
    else:
        yield from _sentencepiece_problems(definition)


def vocabulary_remarks(tokenizer: Tokenizer) -> Iterator[str]:
    """One sentence for each thing that llama.cpp does otherwise with a tokenizer that is written."""
    definition = tokenizer.definition
    if any(step["type"] == "NFC" for step in _steps(definition["normalizer"], "normalizers")):
        yield "llama.cpp does not compose characters (NFC): text with combining marks becomes other tokens there"
    if _is_byte_level(definition) and _name_of(definition) in ASCII_CASE:
        yield "llama.cpp tells upper from lower case in ASCII alone: words in other scripts may become other tokens there"
    if any(step["type"] == "Metaspace" and step["prepend_scheme"] != "never" for step in _cuts(definition)):
        yield "llama.cpp puts a space before a text that begins with one, too: such texts become other tokens there"
    flags = ("lstrip", "rstrip", "single_word")
    if names := [t["content"] for t in definition["added_tokens"] if any(t[flag] for flag in flags)]:
        yield f"llama.cpp keeps spaces around {', '.join(names[:3])} ({len(names)} tokens), which are dropped here"
    if len(tokenizer.stops) > 1 + len(ENDS):
        yield f"llama.cpp ends a generation at three of the {len(tokenizer.stops)} tokens that do here"


def vocabulary_of(tokenizer: Tokenizer, size: int) -> dict[str, Any]:
    """The metadata of a tokenizer of which `vocabulary_problems` says nothing; ids without a piece are unused."""
    definition = tokenizer.definition
    names = {number: piece for piece, number in tokenizer.pieces.items()}
    types = _types(definition, names, size)
    pieces = [names.get(number, f"[PAD{number}]") for number in range(size)]
    metadata: dict[str, Any] = {f"{KEYS}tokens": pieces, f"{KEYS}token_type": types}
    merges = [pair if isinstance(pair, list) else pair.split(" ") for pair in definition["model"]["merges"]]
    if _is_byte_level(definition):
        metadata |= {f"{KEYS}model": "gpt2", f"{KEYS}pre": _name_of(definition)}
        metadata[f"{KEYS}merges"] = [" ".join(pair) for pair in merges]
    else:
        metadata |= {f"{KEYS}model": "llama", f"{KEYS}pre": "default", f"{KEYS}scores": _scores(pieces, types, merges)}
        metadata |= {f"{KEYS}add_space_prefix": _has_prefix(definition), f"{KEYS}remove_extra_whitespaces": False}
    for role, name in tokenizer.role_names.items():
        if name in tokenizer.pieces:
            metadata[f"{KEYS}{ROLES[role]}_token_id"] = tokenizer.pieces[name]
    further = [number for number in tokenizer.stops if number != tokenizer.eos]
    metadata |= {f"{KEYS}{key}_token_id": number for key, number in zip(ENDS, further, strict=False)}
    metadata |= {f"{KEYS}add_bos_token": tokenizer.adds_bos, f"{KEYS}add_eos_token": False}
    if tokenizer.chat_template is not None:
        metadata["tokenizer.chat_template"] = tokenizer.chat_template
    if tokenizer.named_templates:
        metadata["tokenizer.chat_templates"] = sorted(tokenizer.named_templates)
        metadata |= {f"tokenizer.chat_template.{name}": text for name, text in tokenizer.named_templates.items()}
    return metadata


def tokenizer_of(metadata: Mapping[str, Any], longest: int) -> Tokenizer:
    """The tokenizer that metadata describes; ``longest``: tokens of the model's longest document.

    Raises:
        InputError: if it is of a kind that is not supported.
    """
    kind, pre = metadata.get(f"{KEYS}model"), metadata.get(f"{KEYS}pre", "default")
    pre = OTHER_NAMES.get(pre, pre)
    if kind == "gpt2" and pre in PRE_TOKENIZERS:
        backend = _byte_level(metadata, PRE_TOKENIZERS[pre])
    elif kind == "llama":
        backend = _sentencepiece(metadata)
    else:
        names = ", ".join([*PRE_TOKENIZERS, *OTHER_NAMES])
        raise InputError(f"tokenizer {kind}/{pre} is not supported; use llama, or gpt2 with one of {names}")
    pieces, types = metadata[f"{KEYS}tokens"], metadata[f"{KEYS}token_type"]
    added = [
        tokenizers.AddedToken(piece, normalized=False, special=each != USER)
        for piece, each in zip(pieces, types, strict=True)
        if each in (CONTROL, UNKNOWN, USER)
    ]
    backend.add_tokens(added)
    ids = {f"{role}_token": metadata.get(f"{KEYS}{key}_token_id") for role, key in ROLES.items()}
    settings: dict[str, Any] = {role: pieces[number] for role, number in ids.items() if number is not None}
    ends = (metadata.get(f"{KEYS}{key}_token_id") for key in ENDS)
    settings["stops"] = [number for number in ends if number is not None]
    settings["model_max_length"] = longest
    settings["add_bos_token"] = metadata.get(f"{KEYS}add_bos_token")
    settings["chat_template"] = metadata.get("tokenizer.chat_template")
    settings["named_templates"] = {
        name: metadata[f"tokenizer.chat_template.{name}"]
        for name in metadata.get("tokenizer.chat_templates", ())
        if f"tokenizer.chat_template.{name}" in metadata
    }
    return Tokenizer(backend.to_str(), settings)


def _steps(part: Mapping[str, Any] | None, key: str) -> list[Any]:
    """The steps of a normalizer, or of what cuts text, of which there may be none or several."""
    if part is None:
        return []
    return [step for each in part[key] for step in _steps(each, key)] if part["type"] == "Sequence" else [part]


def _cuts(definition: Mapping[str, Any]) -> list[Any]:
    return _steps(definition["pre_tokenizer"], "pretokenizers")


def _is_byte_level(definition: Mapping[str, Any]) -> bool:
    return any(step["type"] == "ByteLevel" for step in _cuts(definition))


def _patterns(definition: Mapping[str, Any]) -> tuple[str, ...] | None:
    """What a byte-level tokenizer cuts by; None if it is no list of patterns."""
    patterns: list[str] = []
    for step in _cuts(definition):
        match step:
            case {"type": "Digits", "individual_digits": True}:
                patterns.append(DIGIT)
            case {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}:
                patterns.append(pattern)
            case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": use}:
                patterns += [GPT2] if use else []
            case _:
                return None
    return tuple(patterns)


def _name_of(definition: Mapping[str, Any]) -> str | None:
    """llama.cpp's name for how a byte-level tokenizer cuts; None if it has none."""
    patterns, direct = _patterns(definition), bool(definition["model"].get("ignore_merges"))
    return next(
        (name for name, each in PRE_TOKENIZERS.items() if (each.patterns, each.direct) == (patterns, direct)), None
    )


def _byte_level_problems(definition: Mapping[str, Any]) -> Iterator[str]:
    if _name_of(definition) is None:
        yield (
            f"the tokenizer cuts text by {str(_patterns(definition) or definition['pre_tokenizer'])[:120]}, for which "
            f"llama.cpp has no name that is known here ({', '.join(PRE_TOKENIZERS)})"
        )
    others = [step["type"] for step in _steps(definition["normalizer"], "normalizers") if step["type"] != "NFC"]
    if others:
        yield f"the tokenizer normalises text ({', '.join(others)}), which llama.cpp does not"


def _sentencepiece_problems(definition: Mapping[str, Any]) -> Iterator[str]:
    model = definition["model"]
    missing = [f"<0x{byte:02X}>" for byte in range(256) if f"<0x{byte:02X}>" not in model["vocab"]]
    if not model.get("byte_fallback") or missing:
        yield "the tokenizer has no token for every byte, without which llama.cpp reads no SentencePiece vocabulary"
    spaces = 0
    for step in [*_steps(definition["normalizer"], "normalizers"), *_cuts(definition)]:
        match step:
            case {"type": "Prepend", "prepend": prefix} if prefix == SPACE:
                pass
            case {"type": "Replace", "pattern": {"String": " "}, "content": content} if content == SPACE:
                spaces += 1
            case {"type": "Metaspace", "replacement": replacement, "split": False} if replacement == SPACE:
                spaces += 1
            case {"type": "Split", "pattern": {"String": " "}}:  # of spaces that were replaced before
                pass
            case _:
                yield f"the tokenizer changes text by {str(step)[:100]}, which llama.cpp does not"
    if not spaces:
        yield f"the tokenizer does not write spaces as {SPACE}, as llama.cpp does"


def _has_prefix(definition: Mapping[str, Any]) -> bool:
    steps = [*_steps(definition["normalizer"], "normalizers"), *_cuts(definition)]
    return any(
        step["type"] == "Prepend" or (step["type"] == "Metaspace" and step["prepend_scheme"] != "never")
        for step in steps
    )


def _types(definition: Mapping[str, Any], names: Mapping[int, str], size: int) -> list[int]:
    added = {token["id"]: CONTROL if token["special"] else USER for token in definition["added_tokens"]}
    types = [added.get(number, NORMAL if number in names else UNUSED) for number in range(size)]
    if _is_byte_level(definition):
        return types
    for number, piece in names.items():
        if piece == definition["model"].get("unk_token"):
            types[number] = UNKNOWN
        elif number not in added and len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
            types[number] = BYTE
    return types


def _scores(pieces: list[str], types: list[int], merges: list[list[str]]) -> list[float]:
    """How early a piece is merged: the rank of the first merge that makes it."""
    ranks: dict[str, int] = {}
    for rank, pair in enumerate(merges):
        ranks.setdefault("".join(pair), rank)
    unmerged = (CONTROL, UNKNOWN, BYTE, UNUSED)
    return [
        -1e6 if kind in unmerged else float(-ranks.get(piece, len(ranks) + number))
        for number, (piece, kind) in enumerate(zip(pieces, types, strict=True))
    ]


def _ids(metadata: Mapping[str, Any]) -> dict[str, int]:
    """Pieces by id, but for those that stand for none."""
    pieces, types = metadata[f"{KEYS}tokens"], metadata[f"{KEYS}token_type"]
    both = enumerate(zip(pieces, types, strict=True))
    return {piece: number for number, (piece, kind) in both if kind != UNUSED or piece != f"[PAD{number}]"}


def _byte_level(metadata: Mapping[str, Any], pre: PreTokenizer) -> tokenizers.Tokenizer:
    merges = [tuple(merge.split(" ", 1)) for merge in metadata[f"{KEYS}merges"]]
    backend = tokenizers.Tokenizer(models.BPE(_ids(metadata), merges, ignore_merges=pre.direct))
    cuts = [
        pre_tokenizers.Digits(individual_digits=True)
        if pattern == DIGIT
        else pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")
        for pattern in pre.patterns
    ]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*cuts, byte_level])
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentencepiece(metadata: Mapping[str, Any]) -> tokenizers.Tokenizer:
    pieces, types, scores = (metadata[f"{KEYS}{key}"] for key in ("tokens", "token_type", "scores"))
    ids = _ids(metadata)
    ranked = {p: score for p, score, kind in zip(pieces, scores, types, strict=True) if kind in (NORMAL, USER)}
    unknown = next((piece for piece, kind in zip(pieces, types, strict=True) if kind == UNKNOWN), None)
    backend = tokenizers.Tokenizer(
        models.BPE(ids, merges_by_score(ranked, ids), unk_token=unknown, fuse_unk=True, byte_fallback=True)
    )
    prefix = metadata.get(f"{KEYS}add_space_prefix", True)
    steps: list[Any] = [normalizers.Prepend(SPACE)] if prefix else []
    backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])
    ending: list[Any] = [decoders.Strip(content=" ", left=1)] if prefix else []
    backend.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *ending]
    )
    return backend
