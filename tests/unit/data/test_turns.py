"""Where the assistant's turns begin and end in renderings of templates that have no marks."""

import json

import pytest
import tokenizers

from tests.chats import byte_tokenizer, marked
from trainer.data.templates import Template
from trainer.data.tokenizer import Tokenizer

ASK, ANSWER = {"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}
MANY = [ASK, ANSWER, {"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]
CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"function": {"name": "add", "arguments": {"a": 1, "of": "x"}}}],
}
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
TURN = "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
PROMPT = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
THINKING = (
    "{% set ns = namespace(last=-1) %}"
    "{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' and loop.index0 > ns.last %}"
    "{{ '<think>\n' + (m.reasoning_content or '') + '\n</think>\n\n' }}{% endif %}"
    "{{ m.content + '<|im_end|>\n' }}{% endfor %}" + PROMPT
)
"""Writes thinking in the last turn only, as Qwen3's does."""


def shown(source, messages, *, tools=None, **options) -> list[str]:
    """Every sample of a conversation, with what is learnt in brackets."""
    tokenizer = options.pop("tokenizer", byte_tokenizer("<|im_end|>"))
    samples = Template(source, tokenizer, **options).samples(messages, tools)
    return [marked(tokenizer, sample.ids, sample.trained) for sample in samples]


def with_tokens(*tokens: tokenizers.AddedToken, **roles) -> Tokenizer:
    """Bytes and further added tokens."""
    backend = tokenizers.Tokenizer.from_str(byte_tokenizer()._definition)
    backend.add_tokens(list(tokens))
    return Tokenizer(backend.to_str(), {"bos_token": "<s>", "eos_token": "</s>", **roles})


def test_old_reasoning_is_learnt_in_a_sample_of_its_own():
    first, second = ({**a, "reasoning": why} for a, why in ((ANSWER, "one more"), (MANY[3], "twice two")))
    assert shown(THINKING, [ASK, first, MANY[2], second]) == [
        "<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n⟦<think>\none more\n</think>\n\n2<|im_end|>⟧\n",
        "<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n2<|im_end|>\n"
        "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n⟦<think>\ntwice two\n</think>\n\n4<|im_end|>⟧\n",
    ]


def test_empty_thinking_is_learnt_where_that_is_asked_for():
    [sample] = shown(THINKING, [ASK, ANSWER])
    assert sample.endswith("assistant\n<think>\n\n</think>\n\n⟦2<|im_end|>⟧\n")
    [sample] = shown(THINKING, [ASK, ANSWER], train_empty_thinking=True)
    assert sample.endswith("assistant\n⟦<think>\n\n</think>\n\n2<|im_end|>⟧\n")


def test_turns_that_are_written_alike_are_one_sample():
    assert len(shown("{% for m in messages %}" + TURN + "{% endfor %}" + PROMPT, MANY)) == 1


def test_an_end_token_that_takes_in_the_newline_behind_it_is_learnt():
    tokenizer = with_tokens(tokenizers.AddedToken("<|end|>", special=True, rstrip=True))
    source = "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
    source += "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
    [sample] = shown(source, MANY, tokenizer=tokenizer)
    assert sample.count("⟦2<|end|>⟧") == sample.count("⟦4<|end|>⟧") == 1
    stops = [tokenizer.decode([stop], specials=True) for stop in Template(source, tokenizer).stops]
    assert stops == ["<|end|>", "</s>"]


@pytest.mark.parametrize(("end", "rest"), [("[end]", "\n"), ("\n", "")])
def test_the_next_turns_opening_is_no_end(end, rest):
    written = json.dumps(end + rest)
    source = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + " + written + " }}{% endfor %}" + PROMPT
    )
    [sample] = shown(source, MANY)
    assert sample == (
        f"<|im_start|>user\n1+1?{end}{rest}<|im_start|>assistant\n⟦2{end}⟧{rest}"
        f"<|im_start|>user\n2+2?{end}{rest}<|im_start|>assistant\n⟦4{end}⟧{rest}⟦<|im_end|>⟧"
    ).replace("⟧⟦", "")


def test_the_last_turn_may_end_with_another_token_than_earlier_ones():
    source = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content }}"
        "{{ '</s>' if loop.last else '<|im_end|>\n' }}{% endfor %}" + PROMPT
    )
    template = Template(source, byte_tokenizer())
    encoded = template.encode(MANY)
    text = marked(template.tokenizer, encoded.ids, encoded.trained)
    assert "⟦2<|im_end|>⟧\n" in text
    assert text.endswith("⟦4</s>⟧")


def test_a_header_behind_the_end_is_not_learnt():
    source = "{% for m in messages %}" + TURN + "{% endfor %}{{ '<|im_start|>assistant\n' }}"
    assert shown(source, [ASK, ANSWER])[0].endswith("assistant\n⟦2<|im_end|>⟧\n<|im_start|>assistant\n")


def test_a_header_that_the_prompt_lacks_is_put_there_and_not_learnt():
    source = "{% for m in messages %}" + TURN + "{% endfor %}"
    template = Template(source, byte_tokenizer("<|im_end|>"))
    encoded = template.encode([ASK, ANSWER])
    assert template.prompt([ASK]) == encoded.ids[: encoded.trained.index(True)]


def test_a_conversation_may_begin_with_the_assistant():
    [sample] = shown("{% for m in messages %}" + TURN + "{% endfor %}" + PROMPT, MANY[1:])
    assert sample.startswith("<|im_start|>assistant\n⟦2<|im_end|>⟧\n<|im_start|>user")


def test_ends_of_other_turns_are_stops_where_the_last_has_none():
    source = (
        "{% for m in messages %}{{ {'user': '<|user|>', 'assistant': '<|assistant|>', 'tool': '<|observation|>'}[m.role] }}"
        "{{ '\n' + m.content }}{% for c in m.tool_calls or [] %}"
        "{{ '\n<tool_call>' + (c.function | tojson) + '</tool_call>' }}{% endfor %}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
    )
    names = ("<|user|>", "<|assistant|>", "<|observation|>")
    tokenizer = with_tokens(*(tokenizers.AddedToken(name, special=True) for name in names))
    stops = [tokenizer.decode([stop], specials=True) for stop in Template(source, tokenizer).stops]
    assert stops == ["<|user|>", "<|observation|>", "</s>"]
    [sample] = shown(source, MANY, tokenizer=tokenizer)
    assert sample == "<|user|>\n1+1?<|assistant|>\n⟦2<|user|>⟧\n2+2?<|assistant|>\n⟦4</s>⟧"


@pytest.mark.parametrize("between", ["'{\"name\": ' + (f.name | tojson) + ', \"arguments\": ' + (f.arguments | tojson) + '}'",
                                     "f.name + ':' + f.arguments"])  # fmt: skip
def test_a_call_is_learnt_whole_in_the_form_that_the_template_takes(between):
    source = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content }}{% for c in m.tool_calls or [] %}"
        "{% set f = c.function %}{{ '<tool_call>' + " + between + " + '</tool_call>' }}{% endfor %}"
        "{{ '<|im_end|>\n' }}{% endfor %}" + PROMPT
    )  # fmt: skip
    [sample] = shown(source, [ASK, CALL, {"role": "tool", "content": "3"}, ANSWER])
    written = {"a": 1, "of": "x"}
    call = json.dumps({"name": "add", "arguments": written}) if "tojson" in between else f"add:{json.dumps(written)}"
    assert f"assistant\n⟦<tool_call>{call}</tool_call><|im_end|>⟧\n<|im_start|>tool\n3<|im_end|>" in sample


@pytest.mark.parametrize("end", ["<|im_end|>", "[{{ loop.index }}]<|im_end|>"])
def test_several_marked_blocks_make_up_a_turn(end):
    source = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
        "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}"
        "{% generation %}" + end + "{% endgeneration %}{% else %}{{ m.content + '<|im_end|>' }}"
        "{% endif %}{{ '\n' }}{% endfor %}" + PROMPT
    )
    [sample] = shown(source, MANY)
    for number in (2, 4):
        assert sample.count(f"⟦{number}{end.replace('{{ loop.index }}', str(number))}⟧") == 1


def test_a_token_that_reaches_over_a_turns_beginning_is_not_lost():
    merged = json.loads(byte_tokenizer()._definition)
    merged["model"]["vocab"]["Ġf"], merged["model"]["merges"] = 500, [["Ġ", "f"]]
    tokenizer = Tokenizer(json.dumps(merged), {"bos_token": "<s>", "eos_token": "</s>"})
    template = Template("{% for m in messages %}{{ m.content }}{% endfor %}", tokenizer)
    messages = [{"role": "user", "content": "Answer: "}, {"role": "assistant", "content": "four"}]
    whole, apart = template.encode(messages), template.encode(messages, apart=True)
    assert marked(tokenizer, whole.ids, whole.trained) == "Answer:⟦ four</s>⟧"
    assert marked(tokenizer, apart.ids, apart.trained) == "Answer: ⟦four</s>⟧"
    assert apart.ids[: apart.trained.index(True)] == template.prompt(messages[:1])


def test_the_number_of_renderings_does_not_grow_with_the_number_of_turns():
    class Counting(Template):
        count = 0

        def _render(self, *arguments, **options):
            self.count += 1
            return super()._render(*arguments, **options)

    template = Counting("{% for m in messages %}" + TURN + "{% endfor %}" + PROMPT, byte_tokenizer("<|im_end|>"))
    template.samples(MANY * 2)
    before = template.count
    assert len(template.samples(MANY * 50)) == 1
    assert template.count - before <= 4
