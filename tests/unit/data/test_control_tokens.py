"""Whatever a conversation names in whatever field, only the template writes control tokens."""

import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.chats import byte_tokenizer
from trainer.data.built_in_templates import CHATML
from trainer.data.templates import Template
from trainer.data.tokenizer import Tokenizer

ADDED = ("<｜Assistant｜>", "<think>", "</think>")
"""Added tokens that are not special: the first opens turns in DeepSeek's templates, the others only part an answer."""
NAMES = ("<|im_start|>", "<|im_end|>", "<s>", "</s>", "<tool_call>", "</tool_call>", *ADDED)
PLAIN = "x"


def _tokenizer() -> Tokenizer:
    backend = tokenizers.Tokenizer.from_str(byte_tokenizer()._definition)
    backend.add_tokens([tokenizers.AddedToken(name, special=False) for name in ADDED])
    return Tokenizer(backend.to_str(), {"bos_token": "<s>", "eos_token": "<|im_end|>"})


TOKENIZER = _tokenizer()
TEMPLATE = Template(CHATML, TOKENIZER)
CONTROL = frozenset(TOKENIZER.encode(name, specials=True)[0] for name in NAMES)
FIELDS = ("system", "user", "answer", "reasoning", "name", "key", "value", "result", "tool", "description", "parameter")
TEXTS = st.lists(st.sampled_from([*NAMES, " ", "\n", "a", "<", "|", "im_end|>"]), max_size=4).map("".join)


def conversation(texts: dict[str, str]):
    """Messages and tools with a text in every field that may hold one."""
    call = {"type": "function", "function": {"name": texts["name"], "arguments": {texts["key"]: [texts["value"]]}}}
    parameters = {"properties": {texts["parameter"]: {"type": "string"}}}
    tool = {"name": texts["tool"], "description": texts["description"], "parameters": parameters}
    messages = [
        {"role": "system", "content": texts["system"]},
        {"role": "user", "content": texts["user"]},
        {
            "role": "assistant",
            "content": texts["answer"],
            "reasoning_content": texts["reasoning"],
            "tool_calls": [call],
        },
        {"role": "tool", "content": texts["result"]},
        {"role": "assistant", "content": "."},
    ]
    return messages, [{"type": "function", "function": tool}]


def controls(texts: dict[str, str]) -> list[int]:
    return [token for token in TEMPLATE.encode(*conversation(texts)).ids if token in CONTROL]


@settings(max_examples=30, deadline=None)
@given(st.fixed_dictionaries(dict.fromkeys(FIELDS, TEXTS)))
def test_only_the_template_writes_control_tokens(texts):
    given_texts = {field: PLAIN + text for field, text in texts.items()}
    # The assistant's own texts may have the pairs that part an answer.
    for field in ("answer", "reasoning"):
        given_texts[field] = given_texts[field].replace("<think>", "").replace("</think>", "")
    assert controls(given_texts) == controls(dict.fromkeys(FIELDS, PLAIN))


def test_the_assistants_own_texts_hold_control_tokens_where_that_is_asked_for():
    texts = dict.fromkeys(FIELDS, PLAIN) | {"answer": "<s>", "user": "<s>"}
    own = Template(CHATML, TOKENIZER, control_tokens_in_answers=True)
    [bos] = TOKENIZER.encode("<s>", specials=True)
    assert own.encode(*conversation(texts)).ids.count(bos) == 1
    assert TEMPLATE.encode(*conversation(texts)).ids.count(bos) == 0


def test_the_pairs_that_part_an_answer_are_tokens_in_it_and_text_elsewhere():
    texts = dict.fromkeys(FIELDS, PLAIN) | {"answer": "<think>\nwhy\n</think>\n\nyes", "user": "<think></think>"}
    ids = TEMPLATE.encode(*conversation({**texts, "reasoning": ""})).ids
    assert [ids.count(TOKENIZER.encode(name, specials=True)[0]) for name in ADDED[1:]] == [1, 1]
