"""Chat templates as they were released: what transformers renders is encoded, and no mask holds what others wrote."""

import copy
import re

import pytest
import tokenizers
from transformers import PreTrainedTokenizerFast

from tests.command import ROOT
from trainer.config import InputError
from trainer.data.messages import validate_messages
from trainer.data.templates import Template
from trainer.data.tokenizer import Tokenizer

RELEASED = sorted((ROOT.parent / "shared" / "data" / "templates").glob("*/*.jinja"))
TOKEN = re.compile(r"<[|｜][^<>\n{}'\"]{1,40}[|｜]>|\[/?[A-Z_]+\]|<(?:start|end)_of_turn>|</?s>|<[be]os>")
LAST = [
    "<|im_end|>",
    "<|eot_id|>",
    "<|eot|>",
    "<end_of_turn>",
    "<|end|>",
    "<|return|>",
    "<｜end▁of▁sentence｜>",
    "</s>",
]
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "100% of 1234567 cities.",  # neither a format nor a width
        "parameters": {"type": "object", "properties": {"city": {"type": "string", "description": "A city."}}},
    },
}
CALL = {"name": "get_weather", "arguments": {"city": "Cword1", "time": 1790000000}}
TURNS = [
    {"role": "user", "content": "Uword1?"},
    {"role": "assistant", "content": "", "tool_calls": [{"id": "abcdefgh1", "type": "function", "function": CALL}]},
    {"role": "tool", "name": "get_weather", "tool_call_id": "abcdefgh1", "content": "Tword1"},
    {"role": "assistant", "content": "Aword1."},
]
CONVERSATIONS = [
    (TURNS, [TOOL]),
    (
        [
            {"role": "user", "content": "Uword1?"},
            {"role": "assistant", "content": "Aword1.", "reasoning_content": "Rword1."},
            {"role": "user", "content": "Uword2?"},
            {"role": "assistant", "content": "Aword2.", "reasoning_content": "Rword2."},
        ],
        None,
    ),
]


def letters() -> str:
    """A tokenizer of single bytes, as `tokenizers` writes it: quick to make 108 times."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE({letter: n for n, letter in enumerate(alphabet)}, []))
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    return bpe.to_str()


def both(source: str, definition: str) -> tuple[Tokenizer, PreTrainedTokenizerFast]:
    """Our tokenizer and transformers', with the tokens that a template names."""
    backend = tokenizers.Tokenizer.from_str(definition)
    ends = [token for token in LAST if token in source] or ["</s>"]
    names = list(dict.fromkeys([*TOKEN.findall(source), "<s>", *ends]))
    backend.add_special_tokens([tokenizers.AddedToken(name, normalized=False, special=True) for name in names])
    tokens = {"bos_token": "<s>", "eos_token": ends[0], "pad_token": ends[0]}
    theirs = PreTrainedTokenizerFast(tokenizer_object=backend, **tokens)
    theirs.chat_template = source
    return Tokenizer(backend.to_str(), {**tokens, "chat_template": source}), theirs


@pytest.mark.slow
@pytest.mark.skipif(not RELEASED, reason="the released templates are not here")
def test_what_transformers_renders_is_encoded_and_only_the_assistant_is_learnt():
    definition, wrong, encoded = letters(), [], 0
    for file in RELEASED:
        source = file.read_text()
        ours, theirs = both(source, definition)
        for messages, tools in CONVERSATIONS:
            try:
                theirs.apply_chat_template(copy.deepcopy(messages), tools=tools, tokenize=False)
            except Exception:  # whatever a template raises: then it takes no such conversation
                continue
            try:
                whole = Template(source, ours).encode(validate_messages(copy.deepcopy(messages), "messages"), tools)
            except InputError as error:
                wrong.append(f"{file.stem}: {error}")
                continue
            encoded += 1
            learnt = ours.decode([i for i, t in zip(whole.ids, whole.trained, strict=True) if t], specials=True)
            text = ours.decode(list(whole.ids), specials=True)
            wrong += [f"{file.stem}: {w} learnt" for w in re.findall(r"[UT]word\d", learnt)]
            wrong += [f"{file.stem}: {w} not learnt" for w in re.findall(r"[AC]word\d", text) if w not in learnt]
    assert wrong == []
    assert encoded >= len(RELEASED)
