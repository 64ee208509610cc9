"""Prompts on disk: forms, what rewards are handed, what is too long, and what holds nothing to ask."""

import json

import pytest

from tests.chats import write_jsonl
from trainer.data.prompts import PromptData
from trainer.data.sources import DataError
from trainer.tinyworld.data import TinyWorldData

ROWS = [
    {"prompt": "Where is Ada?", "ideal": "Rome", "level": 3},
    {
        "messages": [{"role": "user", "content": "And Ben?"}, {"role": "assistant", "content": "Oslo"}],
        "ideal": ["Oslo"],
    },
    {"prompt": [{"role": "user", "content": "Who?"}], "system": "Be brief."},
]


@pytest.fixture(scope="module")
def tokenizer():
    return TinyWorldData().default_tokenizer()


def opened(folder, rows, tokenizer, length=64, **settings):
    write_jsonl(folder / "prompts.jsonl", rows)
    data = PromptData(
        train=[str(folder / "prompts.jsonl")], eval=[str(folder / "prompts.jsonl")], template="plain",
        cache=str(folder / "cache"), **settings,
    )  # fmt: skip
    assert list(data.problems()) == []
    return data.open(tokenizer, length, 0)


def test_prompts_come_with_their_rows_and_with_what_is_right(tmp_path, tokenizer):
    corpus = opened(tmp_path, ROWS, tokenizer)
    batch = corpus.train.collate([0, 1, 2])
    assert [p.text for p in batch.prompts] == ["Where is Ada?", "And Ben?", "Who?"]
    assert [p.row for p in batch.prompts] == ROWS
    assert [p.ideal for p in batch.prompts] == [["Rome"], ["Oslo"], []]
    assert tokenizer.decode(batch.prompts[0].ids).strip() == "User: Where is Ada?\n\nAssistant:"
    assert "Oslo" not in tokenizer.decode(batch.prompts[1].ids)
    assert "Be brief." in tokenizer.decode(batch.prompts[2].ids)
    assert [p.text for p in corpus.prompts(2)] == ["Where is Ada?", "And Ben?"]
    assert corpus.heldout == {}


def test_the_answer_in_an_ideal_text_is_what_the_pattern_finds(tmp_path, tokenizer):
    corpus = opened(tmp_path, [{"prompt": "2 + 2?", "ideal": "It is easy. #### 4"}], tokenizer, answer="#### (.+)")
    assert corpus.prompts(1)[0].right("so #### 4")
    assert not corpus.prompts(1)[0].right("4")


def test_prompts_that_leave_no_room_are_left_out_and_counted(tmp_path, tokenizer):
    rows = [{"prompt": "Who?"}, {"prompt": "Who? " * 50}]
    corpus = opened(tmp_path, rows, tokenizer)
    assert len(corpus.train) == 1
    assert any("1 left out as longer than 64 tokens" in line for line in corpus.summary)
    with pytest.raises(DataError, match="all 1 are longer than 64 tokens"):
        opened(tmp_path, rows[1:], tokenizer)


def test_a_row_that_asks_nothing_is_named(tmp_path, tokenizer):
    with pytest.raises(DataError, match=r'line 2: no prompt is recognised in \{"text": "x"\}; accepted are prompt'):
        opened(tmp_path, [{"prompt": "Who?"}, {"text": "x"}], tokenizer)
    with pytest.raises(DataError, match="line 1: no turn asks anything"):
        opened(tmp_path, [{"messages": [{"role": "assistant", "content": "x"}]}], tokenizer)
    corpus = opened(tmp_path, [{"prompt": "Who?"}, {"text": "x"}], tokenizer, on_bad_row="skip")
    assert len(corpus.train) == 1


def test_a_changed_row_is_other_data(tmp_path, tokenizer):
    one = opened(tmp_path, ROWS, tokenizer).fingerprint
    changed = json.loads(json.dumps(ROWS))
    changed[0]["level"] = 4
    assert opened(tmp_path, changed, tokenizer).fingerprint != one
