"""One reader for all stages: a conversation gives the same ids, however its row is written, in any file, for any stage."""

import codecs
import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.chats import TOOL_TEMPLATE, byte_tokenizer, encoded, message, rendered
from trainer.data.chats import ChatData, TrainOn
from trainer.data.labelled import LabelledData
from trainer.data.preferences import PreferenceData
from trainer.data.preferences import encode as scored
from trainer.data.prompts import PromptData
from trainer.data.row_formats import CHAT_FORMATS, read_rows
from trainer.data.sources import DataSource
from trainer.data.templates import open_template

CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
OTHER = {"type": "function", "function": {"name": "alarm", "arguments": {"time": 7, "repeat": True}}}
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"city": {"type": "string"}}}}]


def sharegpt(messages: list[dict]) -> list[dict]:
    """LLaMA-Factory's form: a call is a turn whose text is JSON."""
    names = {"user": "human", "assistant": "gpt", "tool": "observation"}
    turns = []
    for m in messages:
        if "tool_calls" in m:
            turns.append({"from": "function_call", "value": json.dumps([call["function"] for call in m["tool_calls"]])})
        else:
            turns.append({"from": names.get(m["role"], m["role"]), "value": m["content"]})
    return turns


def alpaca(prompt: list[dict]) -> dict:
    texts = [m["content"] for m in prompt if m["role"] != "system"]
    system = {"system": prompt[0]["content"]} if prompt[0]["role"] == "system" else {}
    return {
        **system,
        "instruction": texts[-1],
        "input": "",
        "history": [texts[n : n + 2] for n in range(0, len(texts) - 1, 2)],
    }


def nulls(messages: list[dict]) -> list[dict]:
    return [{"name": None, "tool_calls": None, "weight": None, **m} for m in messages]


ASKED = {
    "prompt": lambda prompt: {"prompt": prompt},
    "messages": lambda prompt: {"messages": prompt},
    "messages with nulls": lambda prompt: {"messages": nulls(prompt), "tools": []},
    "ShareGPT": lambda prompt: {"conversations": sharegpt(prompt)},
    "Alpaca": alpaca,
}
"""Rows of what is asked, by form."""
ANSWERED = {
    "text": lambda prompt, text: text,
    "message": lambda prompt, text: message("assistant", text),
    "messages": lambda prompt, text: [message("assistant", [{"type": "text", "text": text}])],
    "ShareGPT's message": lambda prompt, text: {"from": "gpt", "value": text},
    "prompt repeated": lambda prompt, text: [*prompt, message("assistant", text)],
    "prompt repeated without its system message": lambda prompt, text: [
        *[m for m in prompt if m["role"] != "system"],
        message("assistant", text),
    ],
}
"""What a column of an answer holds, by form."""


def lines(rows: list[dict]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


FILES = {
    "rows.jsonl": lines,
    "rows-bom.jsonl": lambda rows: codecs.BOM_UTF8 + lines(rows),
    "rows-crlf.jsonl": lambda rows: lines(rows).replace(b"\n", b"\r\n"),
    "rows.json": lambda rows: json.dumps(rows, indent=2, ensure_ascii=False).encode(),
    "rows.jsonl.gz": lambda rows: gzip.compress(lines(rows)),
    "rows.jsonl.zst": lambda rows: zstandard.ZstdCompressor().compress(lines(rows)),
    "rows.parquet": None,
    "rows.arrow": None,
}


def written(folder: Path, name: str, rows: list[dict]) -> str:
    file = folder / name
    if name.endswith(".parquet"):
        pq.write_table(pa.Table.from_pylist(rows), file)
    elif name.endswith(".arrow"):
        table = pa.Table.from_pylist(rows)
        with pa.ipc.new_stream(str(file), table.schema) as writer:
            writer.write_table(table)
    else:
        file.write_bytes(FILES[name](rows))
    return str(file)


NONCHARACTERS = "".join(map(chr, range(0xFDD0, 0xFDF0)))
LETTERS = st.text(st.characters(codec="utf-8", exclude_characters="\r" + NONCHARACTERS), min_size=1, max_size=12)
NAMES = st.sampled_from(["<|im_end|>", "</s>", "\n\nIt is cold", "It is cold", " assistant\n"])
TEXT = st.lists(LETTERS | NAMES, min_size=1, max_size=3).map(lambda parts: "".join(parts) + "x")
CONVERSATIONS = st.builds(
    lambda system, texts: [
        *([message("system", system)] if system else []),
        *(message(("user", "assistant")[n % 2], text) for n, text in enumerate(texts)),
    ],
    st.none() | TEXT,
    st.sampled_from([2, 4]).flatmap(lambda n: st.lists(TEXT, min_size=n, max_size=n)),
)


MERGING = byte_tokenizer(
    "<|im_end|>",
    template=TOOL_TEMPLATE,
    merged=["assistant\nIt is cold", "assistant\n\nIt is cold", "user\nIs it?"] * 9,
)
"""Its tokens cross every boundary that no special token holds: between words, and from a role into what is said."""


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(CONVERSATIONS, st.sampled_from(sorted(ASKED)), st.sampled_from(sorted(ANSWERED)), st.sampled_from(sorted(FILES)))
def test_every_form_in_every_file_gives_every_stage_the_same_ids(tmp_path, conversation, asked, answered, name):
    *prompt, last = conversation
    plain = written(tmp_path, "rows.jsonl", [{"messages": conversation}])
    [(ids, trained)] = encoded(ChatData, plain, MERGING, train_on=TrainOn.last_assistant)
    start, end = trained.index(True), len(trained) - trained[::-1].index(True)
    row, answer = ASKED[asked](prompt), ANSWERED[answered](prompt, last["content"])
    other = ANSWERED[answered](prompt, last["content"] + "!")
    column = "output" if asked == "Alpaca" else "completion"

    def stage(kind, columns: dict, **changed) -> list[tuple[list[int], list[bool]]]:
        return encoded(kind, written(tmp_path, name, [{**row, **columns}]), MERGING, **changed)

    # What the template writes behind the answer is in SFT's rows alone, and not learnt there.
    assert MERGING.decode(ids[end:], specials=True) == "\n"
    assert stage(PreferenceData, {"chosen": answer, "rejected": other}) == [(ids[:end], trained[:end])]
    assert stage(PromptData, {}) == [(ids[:start], trained[:start])]
    if asked in ("prompt", "Alpaca"):
        assert stage(ChatData, {column: answer}, train_on=TrainOn.completion) == [(ids, trained)]
        assert stage(LabelledData, {column: answer, "label": True}) == [(ids[:end], trained[:end])]
        # As a reward model scores it.
        [(_, chat, _)] = read_rows(DataSource(written(tmp_path, name, [{**row, column: answer}])), CHAT_FORMATS)
        assert list(scored(chat, open_template(None, MERGING)).ids) == ids[:end]


def called(question: str, call: dict, result: str, answer: str) -> list[dict]:
    turn = message("assistant", None, tool_calls=[call])
    return [message("user", question), turn, message("tool", result), message("assistant", answer)]


ASKING, CALLED = called("Is it cold?", CALL, "4", "Yes."), called("Wake me.", OTHER, "ok", "Done.")


def as_text(call: dict) -> dict:
    return {**call, "function": {**call["function"], "arguments": json.dumps(call["function"]["arguments"])}}


CALLS = {
    "messages": lambda call: {"tool_calls": [call]},
    "arguments as text": lambda call: {"tool_calls": [as_text(call)]},
    "calls as text": lambda call: {"tool_calls": json.dumps([call])},
    "OpenAI's older files": lambda call: {"function_call": as_text(call)["function"]},
}
"""Keys of a message that calls a tool, by form."""


def calling(form: str, messages: list[dict]) -> dict:
    """A row with calls and tools."""
    if form == "ShareGPT":
        return {"conversations": sharegpt(messages), "tools": json.dumps([TOOLS[0]["function"]])}
    turns = [
        {"role": m["role"], "content": m["content"], **(CALLS[form](m["tool_calls"][0]) if "tool_calls" in m else {})}
        for m in messages
    ]
    return {"messages": turns, **({"functions": [TOOLS[0]["function"]]} if "older" in form else {"tools": TOOLS})}


@pytest.mark.parametrize("name", sorted(FILES))
@pytest.mark.parametrize("form", [*CALLS, "ShareGPT"])
def test_calls_and_tools_of_every_form_are_the_same(form, name, tmp_path):
    file = written(tmp_path, name, [calling(form, ASKING), calling(form, CALLED)])
    first, second = rendered(ChatData, file)
    assert first == (
        "T" + json.dumps(TOOLS) + '\n<|im_start|>user\nIs it cold?<|im_end|>\n<|im_start|>assistant\n'
        '⟦<tool_call>weather{"city": "Oslo"}</tool_call><|im_end|>⟧\n<|im_start|>tool\n4<|im_end|>\n'
        "<|im_start|>assistant\n⟦Yes.<|im_end|>⟧"
    )  # fmt: skip
    assert '⟦<tool_call>alarm{"time": 7, "repeat": true}</tool_call><|im_end|>⟧' in second
    assert rendered(PromptData, file)[0] == first.replace("⟦", "").replace("⟧", "").removesuffix("Yes.<|im_end|>")
