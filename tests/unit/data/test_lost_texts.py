"""What a template does not write is an error, or counted; the settings of templates; what is exported of them."""

import json

import pytest

from tests.chats import byte_tokenizer, marked, write_jsonl
from trainer.config import ConfigError
from trainer.data.chats import ChatData
from trainer.data.conversations import OnLostText
from trainer.data.files import DataError
from trainer.data.preferences import PreferenceData
from trainer.data.prompts import PromptData
from trainer.data.templates import Template, open_template
from trainer.data.tokenizer import open_tokenizer

TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
CALL = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "add", "arguments": {"a": 1}}}]}
ASK, RESULT, ANSWER = (
    {"role": r, "content": c} for r, c in (("user", "1+1?"), ("tool", "2"), ("assistant", "It is 2."))
)
CALLS = {"messages": [ASK, CALL, RESULT, ANSWER], "tools": TOOLS}
ROWS = {
    ChatData: CALLS,
    PreferenceData: {"prompt": [ASK], "chosen": [CALL], "rejected": [ANSWER], "tools": TOOLS},
    PromptData: {"prompt": [ASK], "tools": TOOLS},
}


def opened(kind, tmp_path, tokenizer=None, **settings):
    file = write_jsonl(tmp_path / "rows.jsonl", [ROWS[kind], {k: v for k, v in ROWS[kind].items() if k != "tools"}])
    data = kind(**{"train": [str(file)], "cache": str(tmp_path / "cache"), "template": "plain", **settings})
    assert list(data.problems()) == []
    return data.open(tokenizer or byte_tokenizer("<|im_end|>"), 512, 0)


@pytest.mark.parametrize("kind", ROWS)
def test_calls_and_tools_that_a_template_knows_nothing_of_are_an_error(kind, tmp_path):
    with pytest.raises(
        DataError, match=r"rows.jsonl, line 1: the template does not write tool 'add'.*; use another data.template"
    ):
        opened(kind, tmp_path)


def test_what_is_lost_is_counted_and_an_empty_answer_is_not_learnt(tmp_path):
    corpus = opened(ChatData, tmp_path, on_lost_text=OnLostText.warn)
    assert "rows: a text is lost that the template does not write (2 rows)" in "\n".join(corpus.summary)
    assert "left out" not in "\n".join(corpus.summary)
    template = open_template("plain", byte_tokenizer())
    calling, answering = template.samples(CALLS["messages"], TOOLS)
    assert not any(calling.trained)
    assert marked(template.tokenizer, answering.ids, answering.trained).endswith("Assistant:⟦ It is 2.</s>⟧\n\n")


def test_the_built_in_templates_write_tools_calls_and_reasoning():
    for name in ("chatml", "llama3"):
        template = open_template(name, byte_tokenizer("<|im_end|>"))
        [sample] = template.samples([ASK, CALL, RESULT, {**ANSWER, "reasoning": "one and one"}], TOOLS)
        assert sample.lost == []
        text = marked(template.tokenizer, sample.ids, sample.trained)
        assert '⟦<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call><|' in text
        assert "⟦<think>\none and one\n</think>\n\nIt is 2.<|" in text
        assert f"<tools>\n{json.dumps(TOOLS[0])}\n</tools>" in text


def test_settings_of_a_template_are_its_defaults_in_the_export_too(tmp_path):
    source = "{% for m in messages %}{{ m.content }}{% endfor %}{{ think | default('none') }}{{ eos_token }}"
    (tmp_path / "own.jinja").write_text(source)
    tokenizer = byte_tokenizer("<|im_end|>")
    settings = {"think": {"depth": [1, None, True]}}
    opened(PromptData, tmp_path, tokenizer, template=str(tmp_path / "own.jinja"), template_settings=settings,
           on_lost_text=OnLostText.warn)  # fmt: skip
    tokenizer.save(tmp_path)
    exported = open_template(None, open_tokenizer(tmp_path))
    assert exported.render([ASK]) == "1+1?{'depth': [1, None, True]}<|im_end|>"
    assert Template(tokenizer.chat_template, tokenizer, settings=settings).source == tokenizer.chat_template
    assert Template(tokenizer.chat_template, tokenizer, settings={"think": 7}).render([ASK]) == "1+1?7<|im_end|>"


def test_every_exported_template_is_the_one_that_was_trained_with(tmp_path):
    source = "{{ level | default(1) }}{% for m in messages %}{{ m.content }}{% endfor %}{{ eos_token }}"
    tokenizer = byte_tokenizer("<|im_end|>", template=source)
    tokenizer.named_templates = {"tool_use": source + "!", "rag": source}
    settings = {"template_settings": {"level": 2}, "on_lost_text": OnLostText.warn}
    opened(PromptData, tmp_path, tokenizer, template=None, **settings)
    written = [tokenizer.chat_template, tokenizer.named_templates["tool_use"]]
    assert [Template(text, tokenizer).render([ASK]) for text in written] == ["21+1?<|im_end|>", "21+1?<|im_end|>!"]
    opened(PromptData, tmp_path, tokenizer, template="chatml")
    assert tokenizer.named_templates == {"rag": source}


def test_a_template_that_is_no_file_or_variable_is_refused(tmp_path):
    data = ChatData(train=["x.jsonl"], template="none.jinja", template_settings={"messages": 1}, template_date="May")
    problems = "; ".join(data.problems())
    for part in ("data.template=none.jinja does not exist", "template_settings.messages is no variable",
                 "data.template_date=May is no date"):  # fmt: skip
        assert part in problems


def test_the_day_that_a_template_writes_is_fixed_and_part_of_the_preparation():
    tokenizer = byte_tokenizer()
    days = [ChatData(train=["x"], template="raw", template_date=day).open_template(tokenizer) for day in
            ("2024-07-26", "2025-01-01")]  # fmt: skip
    assert days[0].fingerprint != days[1].fingerprint
    source = "{{ strftime_now('%d %b %Y') }}{% for m in messages %}{{ m.content }}{% endfor %}"
    assert Template(source, tokenizer, now=days[0]._now).render([ASK]) == "26 Jul 20241+1?"


def test_all_named_templates_are_read_used_and_exported(tmp_path):
    tool_use = "{{ tools | tojson }}{% for m in messages %}{{ m.content }}{% endfor %}"
    byte_tokenizer().save(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    named = [
        {"name": "default", "template": "plain {{ messages[0].content }}"},
        {"name": "tool_use", "template": tool_use},
    ]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": named}))
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "rag.jinja").write_text("rag")
    tokenizer = open_tokenizer(tmp_path)
    template = open_template(None, tokenizer)
    assert (template.render([ASK]), template.render([ASK], ["t"])) == ("plain 1+1?", '["t"]1+1?')
    (tmp_path / "export").mkdir()
    tokenizer.save(tmp_path / "export")
    exported = open_tokenizer(tmp_path / "export")
    assert (exported.chat_template, exported.named_templates) == (
        tokenizer.chat_template,
        {"rag": "rag", "tool_use": tool_use},
    )


def test_a_folder_whose_templates_have_no_default_names_them():
    tokenizer = byte_tokenizer()
    tokenizer.named_templates = {"rag": "x"}
    with pytest.raises(ConfigError, match="no chat template named default"):
        ChatData(train=["x"]).open_template(tokenizer)
