"""Labelled answers from files: labels, the mismatched answer beside each, cutting, and what is refused."""

import pytest

from tests.chats import byte_tokenizer, marked, write_jsonl
from trainer.data.labelled import LabelledData
from trainer.data.sources import DataError

TOKENIZER = byte_tokenizer("<|im_end|>")
ROWS = [
    {"prompt": "a?", "completion": "one", "label": True},
    {"prompt": "b?", "completion": "three", "label": False},
    {"prompt": [{"role": "user", "content": "c?"}], "completion": [{"role": "assistant", "content": "5"}], "label": 1},
]


def opened(tmp_path, rows, length=200, **settings):
    file = write_jsonl(tmp_path / "rows.jsonl", rows)
    data = LabelledData(train=[str(file)], template="chatml", cache=str(tmp_path / "cache"), **settings)
    corpus = data.open(TOKENIZER, length, 0)
    return corpus.train.parts[0], corpus.summary


def written(question: str, answer: str) -> str:
    return f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n⟦{answer}<|im_end|>⟧"


def test_every_answer_lies_beside_the_next_rows_and_the_last_beside_the_firsts(tmp_path):
    answers, said = opened(tmp_path, ROWS)
    units = [answers.unit(n) for n in range(3)]
    shown = [[marked(TOKENIZER, side.ids, side.trained) for side in (u.chosen, u.rejected)] for u in units]
    assert shown == [
        [written("a?", "one"), written("a?", "three")],
        [written("b?", "three"), written("b?", "5")],
        [written("c?", "5"), written("c?", "one")],
    ]
    assert [u.margin for u in units] == [1, -1, 1]
    assert "3 labelled completions (prompt, completion and label), 2 of them desirable" in said[0]


def test_a_batch_holds_own_answers_and_apart_from_them_the_mismatched(tmp_path):
    answers, _ = opened(tmp_path, ROWS)
    batch = answers.collate([1, -1])
    unit = answers.unit(1)
    assert batch.tokens[0, : len(unit.chosen.ids)].tolist() == list(unit.chosen.ids)
    assert batch.mismatched.tokens[0, : len(unit.rejected.ids)].tolist() == list(unit.rejected.ids)
    assert batch.labels[0] == -1
    assert float(batch.weight) == float(batch.mismatched.weight) == 1
    assert len(batch.final_index) == 2
    assert batch.parts == (batch, batch.mismatched)


def test_a_mismatched_answer_takes_the_room_of_its_prompts_beginning(tmp_path):
    rows = [
        {"prompt": "p" * 20, "completion": "s", "label": True},
        {"prompt": "b", "completion": "l" * 29, "label": False},
    ]
    answers, _ = opened(tmp_path, rows, length=45)
    own, other = answers.unit(0).chosen, answers.unit(0).rejected
    # The prompt is 39 ids, the answers 2 and 30 with their ends.
    assert len(own.ids) == 41
    assert len(other.ids) == 45
    assert sum(other.trained) == 30
    assert list(other.ids[:15]) == list(own.ids[24:39])


def test_repeated_answers_are_counted_and_dropped_but_not_another_verdict(tmp_path):
    answers, said = opened(tmp_path, [ROWS[0], ROWS[0], {**ROWS[0], "label": False}])
    assert len(answers) == 2
    assert "dropped 1 repeated" in said[0]


@pytest.mark.parametrize(
    ("change", "said"),
    [({"label": "yes"}, "label is 'yes'; use true or false"), ({"label": 0.5}, "label is 0.5; use true or false")],
)
def test_what_is_no_label_is_refused(change, said, tmp_path):
    with pytest.raises(DataError, match=said):
        opened(tmp_path, [{**ROWS[0], **change}])
