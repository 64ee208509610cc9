"""A tokenizer whose ids are bytes, so that spans can be written down by hand, and a few conversations."""

import json
from collections.abc import Sequence
from pathlib import Path

import tokenizers

from trainer.data.chats import ChatData
from trainer.data.prompts import PromptData
from trainer.data.tokenizer import Tokenizer

SPECIALS = [
    "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<tool_call>",
    "</tool_call>",
]  # fmt: skip


def byte_tokenizer(
    eos: str = "</s>", pad: str | None = None, template: str | None = None, merged: Sequence[str] = ()
) -> Tokenizer:
    """Every byte is a token, and so is every name in ``SPECIALS``; ``merged``: texts whose pairs are merged, words or not."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(tokenizers.models.BPE({c: n for n, c in enumerate(alphabet)}, []))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    if merged:
        trainer = tokenizers.trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
        backend.train_from_iterator(merged, trainer)
    backend.add_special_tokens(SPECIALS)
    settings = {
        "bos_token": "<s>",
        "add_bos_token": True,
        "eos_token": eos,
        "pad_token": pad,
        "chat_template": template,
    }
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


TOOL_TEMPLATE = """\
{%- if tools %}{{ 'T' + tools | tojson + '\\n' }}{% endif %}
{%- for m in messages %}
{{- '<|im_start|>' + m.role + '\\n' }}
{%- if m.role == 'assistant' %}{% generation %}{{ (m.reasoning_content or '') + m.content }}
{%- for c in m.tool_calls or [] %}
{{- '<tool_call>' + c.function.name + c.function.arguments | tojson + '</tool_call>' }}
{%- endfor %}
{{- '<|im_end|>' }}{% endgeneration %}{% else %}{{- m.content + '<|im_end|>' }}{% endif %}
{{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% endif %}"""
TOOL_TOKENIZER = byte_tokenizer("<|im_end|>", template=TOOL_TEMPLATE)


def message(role: str, content, **keys) -> dict:
    return {"role": role, "content": content, **keys}


def encoded(kind, file: str, tokenizer: Tokenizer = TOOL_TOKENIZER, **changed) -> list[tuple[list[int], list[bool]]]:
    """Ids of every conversation of a file, and whether each is learnt, as a stage encodes it."""
    data = kind(train=[file], **changed)
    [source], template = data.sources(data.train), data.open_template(tokenizer)
    if kind is ChatData:
        return [(list(e.ids), list(e.trained)) for e in data.encoded(source, template, 4096)]
    if kind is PromptData:
        return [(list(p.ids), [False] * len(p.ids)) for p in data._encoded(source, template)]
    pairs = list(data.encoded(source, template, 4096, dict.fromkeys(["too long", "equal answers", "repeated"], 0)))
    return [(list(p.chosen.ids), list(p.chosen.trained)) for p in pairs]


def rendered(kind, file: str, **changed) -> list[str]:
    """Every conversation of a file, with what is learnt of it in brackets, as a stage encodes it."""
    texts = [marked(TOOL_TOKENIZER, *one) for one in encoded(kind, file, **changed)]
    return [text.removesuffix("\n") for text in texts] if kind is ChatData else texts
