"""Preferences from files: forms, the common prompt, cutting, and what is dropped."""

import pytest

from tests.chats import byte_tokenizer, marked, write_jsonl
from trainer.data.chats import Truncation
from trainer.data.preferences import PreferenceData
from trainer.data.sources import DataError

TOKENIZER = byte_tokenizer("<|im_end|>")
ASKED = {"role": "user", "content": "1+1?"}


def answer(text: str) -> dict:
    return {"role": "assistant", "content": text}


FORMS = {
    "texts": {"prompt": "1+1?", "chosen": "2", "rejected": "3"},
    "messages": {"prompt": [ASKED], "chosen": [answer("2")], "rejected": [answer("3")]},
    "shared beginning": {"chosen": [ASKED, answer("2")], "rejected": [ASKED, answer("3")]},
}
LONG = {"prompt": "p" * 20, "chosen": "c" * 9, "rejected": "r" * 4}
# The prompt is 1 + 5 + 20 + 1 + 1 + 1 + 10 = 39 ids, the answers 10 and 5 with their end.


def opened(tmp_path, rows, length=200, **settings):
    file = write_jsonl(tmp_path / "pairs.jsonl", rows)
    data = PreferenceData(train=[str(file)], template="chatml", cache=str(tmp_path / "cache"), **settings)
    corpus = data.open(TOKENIZER, length, 0)
    return corpus.train.parts[0], corpus.summary


def shown(side) -> str:
    return marked(TOKENIZER, side.ids, side.trained)


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_pair_with_its_prompt_found(form, tmp_path):
    pairs, _ = opened(tmp_path, [FORMS[form]])
    pair = pairs.unit(0)
    assert shown(pair.chosen) == "<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n⟦2<|im_end|>⟧"
    assert shown(pair.rejected).endswith("assistant\n⟦3<|im_end|>⟧")
    assert TOKENIZER.decode(pair.chosen.ids[: pair.shared], specials=True).endswith("<|im_start|>assistant\n")


def test_answers_that_begin_alike_share_the_prompt_alone(tmp_path):
    pairs, _ = opened(tmp_path, [{"prompt": "a", "chosen": "same x", "rejected": "same y"}])
    pair = pairs.unit(0)
    assert pair.shared == list(pair.chosen.trained).index(True)


def test_margins_are_read_or_taken_from_scores(tmp_path):
    rows = [
        {**FORMS["texts"], "margin": 1.5},
        {**FORMS["texts"], "prompt": "b", "score_chosen": 7, "score_rejected": 4.5},
    ]
    pairs, _ = opened(tmp_path, rows)
    assert [pairs.unit(n).margin for n in (0, 1)] == [1.5, 2.5]


def test_cutting_takes_the_prompts_beginning_and_keeps_answers_whole(tmp_path):
    pairs, said = opened(tmp_path, [LONG], length=30)
    pair = pairs.unit(0)
    assert shown(pair.chosen).endswith("assistant\n⟦ccccccccc<|im_end|>⟧")
    assert shown(pair.rejected).endswith("assistant\n⟦rrrr<|im_end|>⟧")
    assert len(pair.chosen.ids) == 30
    assert pair.chosen.ids[: pair.shared] == pair.rejected.ids[: pair.shared]
    assert "1 pairs cut" in said[0]


@pytest.mark.parametrize("length", [2, 4, 9])
def test_no_cut_ever_empties_an_answer(length, tmp_path):
    pair = opened(tmp_path, [LONG], length=length)[0].unit(0)
    for side in (pair.chosen, pair.rejected):
        assert len(side.ids) <= length
        assert any(side.trained[1:])


def test_keep_start_cuts_the_answers_ends(tmp_path):
    pair = opened(tmp_path, [LONG], length=43, truncation=Truncation.keep_start)[0].unit(0)
    assert shown(pair.chosen).endswith("assistant\n⟦cccc⟧")
    assert shown(pair.rejected).endswith("assistant\n⟦rrrr⟧")


def test_equal_answers_and_repeated_pairs_are_dropped_and_counted(tmp_path):
    same = {"prompt": "x", "chosen": "y", "rejected": "y"}
    pairs, said = opened(tmp_path, [FORMS["texts"], same, FORMS["messages"], LONG])
    assert len(pairs) == 2
    assert "dropped 1 equal answers, 1 repeated" in said[0]


BAD = {
    "other columns": ({"a": 1}, "no preference is recognised in"),
    "empty answer": ({"prompt": "a", "chosen": "", "rejected": "b"}, "the content of message 1 of chosen is empty"),
    "nothing shared": (
        {"chosen": [ASKED, answer("2")], "rejected": [{"role": "user", "content": "?"}, answer("2")]},
        "begin differently, so they answer no common prompt",
    ),
    "ends with the user": (
        {"prompt": "a", "chosen": [ASKED], "rejected": "b"},
        "the last message of chosen is the user's",
    ),
    "only equal answers": ({"prompt": "a", "chosen": "b", "rejected": "b"}, "has no pair left to learn from"),
    "margin": ({**FORMS["texts"], "margin": "much"}, "margin is text, not a number"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_rows_are_one_sentence_with_file_and_line(case, tmp_path):
    row, said = BAD[case]
    with pytest.raises(DataError, match=said) as refused:
        opened(tmp_path, [row])
    assert str(tmp_path / "pairs.jsonl") in str(refused.value)
    assert [p.name for p in (tmp_path / "cache" / "rows").iterdir() if p.suffix != ".lock"] == []
