"""What a user's own module adds in one file: a format of rows, a kind of data. docs/extending.md shows the same."""

import pytest

from tests.chats import byte_tokenizer, marked, write_jsonl
from tests.command import TINY, metrics
from trainer.compose import compose
from trainer.data.chats import ChatData
from trainer.run import run

TOKENIZER = byte_tokenizer("<|im_end|>")

ROW_FORMAT = '''
"""Rows of a forum: a question with its best answer."""

from trainer.data.messages import Chat, Row, text_of
from trainer.data.row_formats import CHAT_FORMATS, RowFormat


def read(row: Row) -> Chat:
    question = {"role": "user", "content": text_of(row, "question")}
    return Chat([question, {"role": "assistant", "content": text_of(row, "best")}], completion=1)


CHAT_FORMATS.append(RowFormat("forum", ("question", "best"), read))
'''

KIND = '''
"""Documents that are counted up: data without files."""

from dataclasses import dataclass

from trainer.config import schema, setting
from trainer.data.corpus import Corpus, Data, summaries
from trainer.data.loader import Mixture
from trainer.data.rows import prepare_rows, tokenize
from trainer.data.tokenizer import Tokenizer


@schema("data/counting")
@dataclass
class Counting(Data):
    """Sequences of numbers."""

    documents: int = setting(100, "documents to learn from", least=1)

    def open(self, tokenizer: Tokenizer, length: int, seed: int) -> Corpus:
        texts = [" ".join(map(str, range(n, n + 20))) for n in range(self.documents)]
        key = ["counting", str(self.documents)]
        rows = prepare_rows(self.cache_folder / "rows", key, lambda: tokenize(texts, tokenizer), tokenizer, length)
        return Corpus(Mixture([rows], [1.0], seed), {}, summaries({"counting": rows}))
'''


@pytest.fixture
def module(clean_registries, tmp_path, monkeypatch):
    """Writes a module where Python finds it."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def write(name: str, text: str) -> str:
        (tmp_path / f"{name}.py").write_text(text)
        return name

    return write


def test_a_format_of_rows_is_a_function_of_ones_own(module, tmp_path):
    __import__(module("forum", ROW_FORMAT))
    file = write_jsonl(tmp_path / "rows.jsonl", [{"question": "1+1?", "reply": "2"}])
    data = ChatData(train=[str(file)], template="chatml", cache=str(tmp_path / "cache"), columns={"best": "reply"})
    assert list(data.problems()) == []
    [source] = data.sources(data.train)
    [encoded] = data.encoded(source, data.open_template(TOKENIZER), 512)
    text = "<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n⟦2<|im_end|>⟧\n"
    assert marked(TOKENIZER, encoded.ids, encoded.trained) == text
    assert source.form == "forum"


def test_a_kind_of_data_is_a_class_of_ones_own(module, tmp_path):
    tiny = [override for override in TINY if not override.startswith("data.")]
    TOKENIZER.save(tmp_path)
    cfg = compose(
        [
            *tiny,
            f"imports=[{module('counting', KIND)}]",
            "data=counting",
            "data.documents=40",
            f"data.cache={tmp_path / 'cache'}",
            f"tokenizer.path={tmp_path}",
            f"run_dir={tmp_path / 'run'}",
            "steps=2",
            "precision=fp32",
        ]
    )
    run(cfg)
    assert [row["step"] for row in metrics(tmp_path / "run") if "loss" in row] == [1, 2]
