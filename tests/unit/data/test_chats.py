"""Chats from files: the forms that are recognised, what is learnt of them, and what is refused."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.chats import byte_tokenizer, marked, write_jsonl
from trainer.config import ConfigError
from trainer.data.chats import ChatData, TrainOn, Truncation
from trainer.data.sources import DataError, DataSource, OnBadRow

TOKENIZER = byte_tokenizer("<|im_end|>")
ASKED, ANSWERED = {"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}
GOOD = {"messages": [ASKED, ANSWERED]}
SAME = "<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n⟦2<|im_end|>⟧\n"
FORMS = {
    "messages": GOOD,
    "messages and ideal": {"messages": [ASKED], "ideal": ["2", "two"]},
    "content in parts": {"messages": [{"role": "user", "content": [{"type": "text", "text": "1+1?"}]}, ANSWERED]},
    "prompt and completion": {"prompt": "1+1?", "completion": "2"},
    "prompt and completion as messages": {"prompt": [ASKED], "completion": [ANSWERED]},
    "ShareGPT": {"conversations": [{"from": "human", "value": "1+1?"}, {"from": "gpt", "value": "2"}]},
    "Alpaca": {"instruction": "1+1?", "input": "", "output": "2"},
    "prompt and ideal": {"prompt": "1+1?", "ideal": "2"},
}


def data(tmp_path, rows, **settings) -> ChatData:
    file = write_jsonl(tmp_path / "chats.jsonl", rows)
    return ChatData(
        **{"train": [str(file)], "template": "chatml", "cache": str(tmp_path / "cache"), **settings}  # type: ignore[arg-type]
    )


def encoded(tmp_path, rows, length=512, **settings) -> list[str]:
    chats = data(tmp_path, rows, **settings)
    [source] = chats.sources(chats.train)
    found = chats.encoded(source, chats.open_template(TOKENIZER), length)
    return [marked(TOKENIZER, ids, trained) for ids, trained, *_ in found]


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_conversation(form, tmp_path):
    assert encoded(tmp_path, [FORMS[form]]) == [SAME]


def test_an_alpaca_input_follows_the_instruction(tmp_path):
    row = {"instruction": "Add.", "input": "1, 1", "output": "2"}
    assert "user\nAdd.\n\n1, 1<|im_end|>" in encoded(tmp_path, [row])[0]


def test_columns_of_any_name_are_read_by_a_mapping(tmp_path):
    row = {"question": "1+1?", "answer": "2"}
    assert encoded(tmp_path, [row], columns={"prompt": "question", "completion": "answer"}) == [SAME]


def test_parquet_and_json_arrays_are_read_like_json_lines(tmp_path):
    pq.write_table(pa.Table.from_pylist([GOOD]), tmp_path / "chats.parquet")
    (tmp_path / "chats.json").write_text(json.dumps([GOOD], indent=1))
    for name in ("chats.parquet", "chats.json"):
        assert encoded(tmp_path, [], train=[str(tmp_path / name)]) == [SAME]


def test_the_form_that_was_recognised_is_in_the_log(tmp_path):
    said = data(tmp_path, [FORMS["ShareGPT"]]).open(TOKENIZER, 64, 0).summary
    assert "1 conversations (ShareGPT), 25 tokens, 2 of them learnt in 1 rows of 64" in said[0]


MANY = {"messages": [ASKED, ANSWERED, {"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]}
TOOL = {
    "messages": [
        ASKED,
        {"role": "assistant", "content": "I look."},
        {"role": "tool", "content": "2"},
        {"role": "assistant", "content": "2"},
    ]
}


@pytest.mark.parametrize(
    ("row", "train_on", "learnt"),
    [
        (MANY, TrainOn.assistant, ["2<|im_end|>", "4<|im_end|>"]),
        (MANY, TrainOn.last_assistant, ["4<|im_end|>"]),
        (MANY, TrainOn.completion, ["4<|im_end|>"]),
        (TOOL, TrainOn.completion, ["I look.<|im_end|>", "2<|im_end|>"]),
        (TOOL, TrainOn.last_assistant, ["2<|im_end|>"]),
    ],
)
def test_train_on_says_which_turns_are_learnt(row, train_on, learnt, tmp_path):
    [text] = encoded(tmp_path, [row], train_on=train_on)
    assert [part.split("⟧")[0] for part in text.split("⟦")[1:]] == learnt


def test_train_on_all_learns_every_token(tmp_path):
    assert encoded(tmp_path, [GOOD], train_on=TrainOn.all) == ["⟦" + SAME.replace("⟦", "").replace("⟧", "") + "⟧"]


LONG = {"messages": [{"role": "user", "content": "x" * 30}, {"role": "assistant", "content": "y" * 30}]}
# 1 + 5 + 30 + 1 + 1 tokens of the user's turn, 1 + 10 before the answer: its 31 tokens begin at 49, a newline ends it all.


def test_keep_start_cuts_the_end_of_an_answer(tmp_path):
    [text] = encoded(tmp_path, [LONG], length=59)
    assert text.endswith("assistant\n⟦" + "y" * 11 + "⟧")


def test_keep_end_cuts_the_beginning_of_a_prompt(tmp_path):
    [text] = encoded(tmp_path, [LONG], length=49, truncation=Truncation.keep_end)
    assert text == "xxxxx<|im_end|>\n<|im_start|>assistant\n⟦" + "y" * 30 + "<|im_end|>⟧\n"


@pytest.mark.parametrize(("truncation", "length"), [(Truncation.drop, 59), (Truncation.keep_start, 40)])
def test_a_conversation_with_nothing_left_to_learn_is_left_out_and_counted(truncation, length, tmp_path):
    rows = data(tmp_path, [GOOD, LONG], truncation=truncation).open(TOKENIZER, length, 0)
    assert rows.train.parts[0].facts["documents"] == 1
    assert any("left out 1 of its rows, first:" in line and f"in a row of {length}" in line for line in rows.summary)


def test_a_cut_conversation_is_counted_as_cut(tmp_path):
    corpus = data(tmp_path, [GOOD, LONG]).open(TOKENIZER, 59, 0)
    assert corpus.train.parts[0].facts["cut_documents"] == 1


def test_the_mask_of_a_packed_row_is_on_the_targets_that_are_learnt(tmp_path):
    corpus = data(tmp_path, [GOOD, MANY]).open(TOKENIZER, 128, 0)
    batch = corpus.train.parts[0].collate([0])
    learnt = batch.targets[batch.mask > 0].tolist()
    assert sorted(TOKENIZER.decode(learnt, specials=True).split("<|im_end|>")) == sorted(["2", "2", "4", ""])
    assert float(batch.seen) == sum(corpus.train.parts[0].facts[k] for k in ("tokens",))


def test_pad_equal_to_eos_hides_no_real_end_of_turn(tmp_path):
    assert TOKENIZER.pad == TOKENIZER.eos
    batch = data(tmp_path, [GOOD]).open(TOKENIZER, 64, 0).train.parts[0].collate([0, -1])
    ends = (batch.targets == TOKENIZER.eos) & (batch.mask > 0)
    assert int(ends.sum()) == 1
    assert float(batch.mask.sum()) == 2


BAD = {
    "empty file": ([], r"holds no conversation to learn from; it is empty"),
    "missing role": ([{"messages": [{"content": "hi"}]}], r"line 1: message 1 of messages has no role"),
    "unknown role": ([GOOD, {"messages": [{"role": "bot", "content": "hi"}]}], r"line 2: .* the role 'bot'; use system"),
    "no assistant": ([GOOD, {"messages": [ASKED]}], r"line 2: no turn is the assistant's, so there is nothing to learn"),
    "empty content": ([{"messages": [ASKED, {"role": "assistant", "content": ""}]}], r"the content of message 2 .*empty"),
    "no messages": ([{"messages": []}], r"line 1: messages is an empty list, not a list of messages"),
    "number": ([{"messages": [{"role": "user", "content": 3}, ANSWERED]}], r"line 1: the content of message 1 .* type int"),
    "broken JSON": ([GOOD, GOOD, b'{"messages": [}'], r"line 3: not JSON"),
    "broken UTF-8": ([GOOD, b'{"messages": "\xff"}'], r"line 2: not UTF-8 \(byte 14 of the line\)"),
    "other columns": ([{"title": "x", "body": "y"}], r'line 1: no conversation .* \{"title": "x".*accepted are messages'),
    "mixed": ([GOOD, {"prompt": "a", "completion": "b"}], r"line 2: messages is missing, which earlier rows have"),
    "all too long": ([LONG, LONG], r"no conversation left .*2 were left out, the first: .*line 1: nothing to"),
    "1 MB": (
        [{"messages": [{"role": "user", "content": "z" * 2**20}, ANSWERED]}],
        r"no conversation left .*nothing to learn is left of its 1,048,\d\d\d tokens in a row of 32",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_sentence_with_file_and_row_and_leaves_nothing_half_prepared(case, tmp_path):
    rows, said = BAD[case]
    with pytest.raises(DataError, match=said) as refused:
        data(tmp_path, rows).open(TOKENIZER, 32, 0)
    sentence = str(refused.value)
    assert "\n" not in sentence
    assert len(sentence) < 700
    assert str(tmp_path / "chats.jsonl") in sentence
    assert [p.name for p in (tmp_path / "cache" / "rows").iterdir() if p.suffix != ".lock"] == []


def test_bad_rows_are_skipped_on_request_and_counted(tmp_path):
    corpus = data(tmp_path, [{"messages": [ASKED]}, GOOD], on_bad_row=OnBadRow.skip).open(TOKENIZER, 64, 0)
    assert corpus.train.parts[0].facts["documents"] == 1
    assert any("line 1: no turn is the assistant's" in line for line in corpus.summary)


def test_prompts_come_with_the_answers_that_are_right(tmp_path):
    held = write_jsonl(tmp_path / "held.jsonl", [{"prompt": "6+12?", "completion": "6 + 12 is 18. #### 18"}])
    corpus = data(tmp_path, [GOOD], eval=[str(held)], answer="#### (.+)").open(TOKENIZER, 64, 0)
    [prompt] = corpus.prompts(5)
    assert TOKENIZER.decode(prompt.ids, specials=True).endswith("6+12?<|im_end|>\n<|im_start|>assistant\n")
    assert prompt.ideal == ["18"]
    assert prompt.right("so #### 18")
    assert not prompt.right("#### 18, no, #### 19")
    assert not prompt.right("18")


def test_a_changed_template_or_mask_is_another_preparation(tmp_path):
    seen = {
        data(tmp_path, [GOOD], **changed).open(byte_tokenizer("<|im_end|>"), 64, 0).train.fingerprint
        for changed in ({}, {"train_on": TrainOn.all}, {"template": "plain"}, {"truncation": Truncation.drop})
    }
    assert len(seen) == 4


def test_settings_that_cannot_be_are_refused_together(tmp_path):
    problems = list(data(tmp_path, [GOOD], template="gpt", answer="(a)(b)", columns={"asked": "q"}).problems())
    assert any("data.template=gpt is not known; use chatml" in p for p in problems)
    assert any("data.answer=(a)(b) must have exactly one group" in p for p in problems)
    assert any("data.columns.asked is not used" in p for p in problems)


def test_a_template_that_the_tokenizer_lacks_is_a_configuration_error(tmp_path):
    with pytest.raises(ConfigError, match="the tokenizer has no chat template"):
        data(tmp_path, [GOOD], template=None).open(byte_tokenizer(), 64, 0)


def test_a_source_of_ids_from_the_hub_needs_no_file():
    assert DataSource("owner/name").problem() is None
