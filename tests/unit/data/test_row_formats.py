"""What a row may hold beside its words, and what is refused: weights, roles, columns, calls, margins, labels."""

import json

import pytest

from tests.chats import TOOL_TOKENIZER, message, rendered, write_jsonl
from trainer.data.chats import ChatData
from trainer.data.labelled import LabelledData
from trainer.data.preferences import PreferenceData
from trainer.data.prompts import PromptData
from trainer.data.row_formats import REPEATED
from trainer.data.sources import DataError

CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"city": {"type": "string"}}}}]


def user(text: str, **keys) -> dict:
    return message("user", text, **keys)


def assistant(text: str | None, **keys) -> dict:
    return message("assistant", text, **keys)


ASKING = [user("Is it cold?"), assistant(None, tool_calls=[CALL]), message("tool", "4"), assistant("Yes.")]


def opened(tmp_path, kind, rows, **changed) -> list[str]:
    return rendered(kind, str(write_jsonl(tmp_path / "rows.jsonl", rows)), **changed)


def test_a_turn_of_weight_0_is_not_learnt(tmp_path):
    turns = [user("1+1?"), assistant("3"), user("Really?"), assistant("2")]
    for key, wrong, right in (("weight", 0, 1), ("loss", False, True), ("train", False, True), ("loss_mask", 0, 1)):
        masked = [turns[0], {**turns[1], key: wrong}, turns[2], {**turns[3], key: right}]
        [text] = opened(tmp_path, ChatData, [{"messages": masked}])
        assert "3<|im_end|>" in text
        assert text.count("⟦") == 1
        assert text.endswith("⟦2<|im_end|>⟧")
    pair = {"prompt": turns[:1], "chosen": [{**turns[1], "weight": 0}, *turns[2:]], "rejected": turns[1:2]}
    assert opened(tmp_path, PreferenceData, [pair])[0].count("⟦") == 1


def test_an_answer_of_several_messages_is_learnt_in_all_its_turns(tmp_path):
    pair = {"prompt": ASKING[:1], "chosen": ASKING[1:], "rejected": "No."}
    [text] = opened(tmp_path, PreferenceData, [{**pair, "tools": json.dumps(TOOLS)}])
    assert text.startswith("T" + json.dumps(TOOLS))
    assert [part.split("⟧")[0] for part in text.split("⟦")[1:]] == [
        '<tool_call>weather{"city": "Oslo"}</tool_call><|im_end|>',
        "Yes.<|im_end|>",
    ]


def test_roles_of_any_name_are_read_by_a_setting(tmp_path):
    turns = [{"from": "customer", "value": "1+1?"}, {"from": "clerk", "value": "2"}]
    [text] = opened(tmp_path, ChatData, [{"conversations": turns}], roles={"customer": "user", "clerk": "assistant"})
    assert text == "<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n⟦2<|im_end|>⟧"
    assert "data.roles.clerk=seller is not a role" in "".join(
        ChatData(train=["a"], roles={"clerk": "seller"}).problems()
    )


def test_columns_of_one_source_are_its_own(tmp_path):
    files = [
        str(write_jsonl(tmp_path / f"{name}.jsonl", [{q: "1+1?", "completion": "2"}]))
        for name, q in (("a", "q"), ("b", "prompt"))
    ]
    data = ChatData(train=files, source_columns={"a": {"prompt": "q"}})
    assert list(data.problems()) == []
    template = data.open_template(TOOL_TOKENIZER)
    first, second = ([e.ids for e in data.encoded(source, template, 99)] for source in data.sources(files))
    assert first == second
    assert "data.source_columns.c names no source; there are a, b" in "".join(
        ChatData(train=files, source_columns={"c": {}}).problems()
    )


def test_shards_whose_names_differ_behind_a_dot_are_two_sources(tmp_path):
    files = [str(write_jsonl(tmp_path / f"part.0000{n}.jsonl", [{"prompt": "a", "completion": "b"}])) for n in (1, 2)]
    data = ChatData(train=files)
    assert [source.name for source in data.sources(files)] == ["part.00001", "part.00002"]
    assert list(data.problems()) == []


def test_files_of_one_name_are_told_apart_by_their_folders(tmp_path):
    rows = [{"prompt": "a", "completion": "b"}]
    for folder in ("old", "new"):
        (tmp_path / folder).mkdir()
    files = [str(write_jsonl(tmp_path / folder / "train.jsonl", rows)) for folder in ("old", "new")]
    data = ChatData(train=[*files, str(write_jsonl(tmp_path / "more.jsonl", rows))], weights={"old.train": 2.0})
    assert [source.name for source in data.sources(data.train)] == ["old.train", "new.train", "more"]
    assert list(data.problems()) == []
    assert "data.train has two sources called train" in "".join(ChatData(train=[files[0]] * 2).problems())


def test_openais_preferences_are_read(tmp_path):
    row = {
        "input": {"messages": ASKING[:1], "tools": TOOLS, "parallel_tool_calls": True},
        "preferred_output": [assistant("Yes.")],
        "non_preferred_output": [assistant("No.")],
    }
    [text] = opened(tmp_path, PreferenceData, [row])
    assert (
        text
        == "T"
        + json.dumps(TOOLS)
        + "\n<|im_start|>user\nIs it cold?<|im_end|>\n<|im_start|>assistant\n⟦Yes.<|im_end|>⟧"
    )


def test_what_reading_changed_is_in_the_log(tmp_path):
    row = {
        "prompt": "1+1?",
        "chosen": [user("1+1?"), assistant("2", mood="glad")],
        "rejected": "3",
    }
    file = str(write_jsonl(tmp_path / "rows.jsonl", [row, {**row, "rejected": "4"}]))
    corpus = PreferenceData(train=[file], cache=str(tmp_path / "cache")).open(TOOL_TOKENIZER, 99, 0)
    assert f"rows: {REPEATED} (2 rows)" in corpus.summary
    assert "rows: the key 'mood' of messages is read only by a template that names it (2 rows)" in corpus.summary


def chat(*turns: dict) -> tuple:
    return ChatData, {"messages": list(turns)}


def asked(kind, **columns) -> tuple:
    return kind, {"prompt": "1+1?", **columns}


def pair(**columns) -> tuple:
    return asked(PreferenceData, **{"chosen": "2", "rejected": "3", **columns})


BAD = {
    "an empty answer of Alpaca": (ChatData, {"instruction": "1+1?", "output": ""}, "message 1 of output is empty"),
    "an answer of spaces": (*asked(ChatData, completion=" \n"), "the content of message 1 of completion is empty"),
    "no calls": (*asked(ChatData, completion=[assistant(None, tool_calls=[])]), "message 1 of completion is empty"),
    "tools that are no JSON": (*asked(ChatData, completion="2", tools="[{"), r"tools is not JSON \(.* at column 3\)"),
    "tools that are no list": (*asked(PromptData, tools={"name": "x"}), "tools is of type dict, not a list of tools"),
    "a tool that is a number": (*pair(tools=[3]), "tool 1 of tools is of type int, not an object"),
    "a call without a name": (*chat(user("a"), assistant("", tool_calls=[{"function": {}}])), "a call in .* has no name"),
    "a call that is no JSON": (*chat(user("a"), message("function_call", "{")), "a call in message 2 .* not JSON"),
    "half a weight": (*chat(user("a"), assistant("b", weight=0.5)), r"message 2 of messages is 0\.5; use 0 or 1"),
    "a question to be learnt": (*chat(user("a", train=True), assistant("b")), "message 1 of messages is the user's"),
    "weights that contradict": (*chat(user("a"), assistant("b", weight=1, loss=False)), "weight and loss of message 2"),
    "nothing but weight 0": (*chat(user("a"), assistant("b", weight=0)), "have the weight 0"),
    "an answer of weight 0": (
        *asked(LabelledData, completion=[assistant("b", weight=0)], label=1), "all turns of an answer have the weight 0",
    ),
    "another question": (
        *pair(chosen=[user("2+2?"), assistant("4")]), "chosen begins with the user's message, which is not in the prompt",
    ),
    "two system messages": (
        ChatData, {"system": "Be brief.", "messages": [message("system", "Be long."), user("a"), assistant("b")]},
        "the column system and the first message of messages are two system messages",
    ),
    "a history of texts": (ChatData, {"instruction": "a", "output": "b", "history": ["x"]}, "history is not a list of pairs"),
    "an infinite margin": (*pair(margin=1e999), "margin is inf, not a finite number"),
    "a margin that is no number": (*pair(margin=float("nan")), "margin is nan, not a finite number"),
    "one score of two": (*pair(score_chosen=1), "score_rejected is nothing, not a number"),
    "a label of text": (*asked(LabelledData, completion="a", label="good"), "label is 'good'; use true or false"),
    "an answer in the question": (
        PreferenceData, {"messages": [user("a"), assistant("b")], "chosen": "c", "rejected": "d"},
        "ends with the assistant's turn, not with a question",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_row_that_cannot_be_used_is_one_sentence_for_every_stage(name, tmp_path):
    kind, row, said = BAD[name]
    with pytest.raises(DataError, match=rf"rows\.jsonl, line 1: .*{said}") as refused:
        opened(tmp_path, kind, [row])
    assert "\n" not in str(refused.value)
