"""A tokenizer whose ids are bytes, so that spans can be written down by hand, and a few conversations."""

import json
from pathlib import Path

import tokenizers

from trainer.data.tokenizer import Tokenizer

SPECIALS = [
    "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<tool_call>",
    "</tool_call>",
]  # fmt: skip


def byte_tokenizer(eos: str = "</s>", pad: str | None = None, template: str | None = None) -> Tokenizer:
    """Every byte is a token, and so is every name in ``SPECIALS``."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(tokenizers.models.BPE({c: n for n, c in enumerate(alphabet)}, []))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(SPECIALS)
    settings = {"bos_token": "<s>", "eos_token": eos, "pad_token": pad, "chat_template": template}
    return Tokenizer(backend.to_str(), {k: v for k, v in settings.items() if v is not None})


def marked(tokenizer: Tokenizer, ids, trained) -> str:
    """The text of ``ids`` with ⟦ and ⟧ around what is learnt."""
    runs: list[tuple[bool, list[int]]] = []
    for token, learnt in zip(ids, trained, strict=True):
        if not runs or runs[-1][0] != learnt:
            runs.append((learnt, []))
        runs[-1][1].append(token)
    texts = [(learnt, tokenizer.decode(part, specials=True)) for learnt, part in runs]
    return "".join(f"⟦{text}⟧" if learnt else text for learnt, text in texts)


def write_jsonl(file: Path, rows) -> Path:
    """A JSON line for every row; bytes are written as they are."""
    with file.open("wb") as stream:
        for row in rows:
            stream.write((row if isinstance(row, bytes) else json.dumps(row, ensure_ascii=False).encode()) + b"\n")
    return file
