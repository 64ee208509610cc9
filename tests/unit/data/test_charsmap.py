"""SentencePiece's normalisation rules: ids are SentencePiece's own, whatever marks follow a letter."""

import io
from itertools import product

import pytest
import sentencepiece
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trainer.data.tokenizer import open_tokenizer

MARKS = "\u0300\u0301\u0302\u0308\u0316\u0323\u0327"
OTHERS = [
    "\r\n", "\n", "\r", "\t", " ", "\u3000", "\u200d", "\ufeff", "ﬁ", "①", "Ａ", "㍿", "Å", "ｶ", "ﾞ",
    "か", "は", "\u3099", "\u309a",
    "\u1112", "\u1161", "\u11ab", "하", "\u0915", "\u093c", "\u09c7", "\u09be",
    "👩", "🏽", "🇩", "🇪", "\u0600", "ấ", "ǻ", "ſ", "\u0345",
]  # fmt: skip
TEXTS = st.lists(st.sampled_from([*"aAeouy", *MARKS, *MARKS, *OTHERS]), max_size=30).map("".join)
ANY = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\u2581"), max_size=20)
FUZZ = settings(max_examples=500, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module", params=["nmt_nfkc", "nfkc", "nmt_nfkc_cf"])
def folder(request, tmp_path_factory):
    model, out = io.BytesIO(), tmp_path_factory.mktemp(request.param)
    corpus = [f"the cat {n} sat on the mat, déjà vu ấn か が ガ 한국" for n in range(200)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus), model_writer=model, vocab_size=340, model_type="unigram", byte_fallback=True,
        normalization_rule_name=request.param, hard_vocab_limit=False, num_threads=1, minloglevel=2,
    )  # fmt: skip
    (out / "tokenizer.model").write_bytes(model.getvalue())
    return out


def test_ids_are_those_of_sentencepiece(folder):
    tokenizer = open_tokenizer(folder)
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))

    @FUZZ
    @given(st.one_of(TEXTS, ANY))
    def check(text):
        assert tokenizer.encode(text) == theirs.encode(text), ascii(text)

    for letter, *marks in product("aAouｶ", MARKS, MARKS):
        text = letter + "".join(marks)
        assert tokenizer.encode(text) == theirs.encode(text), ascii(text)
    check()


def test_an_export_gives_the_same_ids(folder, tmp_path):
    tokenizer = open_tokenizer(folder)
    tokenizer.save(tmp_path)
    text = "a\u0300\u0301 b\r\nか\u3099 e\u0316\u0301 ｶﾞ"
    assert open_tokenizer(tmp_path).encode(text) == tokenizer.encode(text)
    assert pytest.importorskip("transformers").AutoTokenizer.from_pretrained(tmp_path)(text).input_ids[
        1:
    ] == tokenizer.encode(text)
