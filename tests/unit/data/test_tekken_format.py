"""Mistral's tekken.json: ids are those of byte pairs merged by rank, behind the control tokens."""

import base64
import json
import re
from itertools import pairwise

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trainer.config import ConfigError
from trainer.data.tokenizer import open_tokenizer

PATTERN = r" ?[a-zé]+|[A-Z]+|[0-9]| ?[^ a-zéA-Z0-9\n]+|\n+| +"
MERGED = [
    "th",
    "he",
    "the",
    " t",
    " the",
    "an",
    "and",
    " a",
    " and",
    "é",
    "aa",
    "aaa",
    "aaaa",
    "lo",
    "ol",
    "lol",
    "!!",
    "in",
    "ing",
]
CONTROL = ["<unk>", "<s>", "</s>", "[INST]"]
SPARE = 6
"""Ids of control tokens, of which two have no name."""
UNREACHED = ["etha"]
"""Pieces that merges do not lead to: `th` comes before all of theirs."""
PIECES = [bytes([byte]) for byte in range(256)] + [piece.encode() for piece in [*UNREACHED, *MERGED]]
TEXTS = st.lists(
    st.sampled_from([*"thenadlogi !1é\n", "aaaaaaa", "lolol", "etha", "<s>", "[INST]", "😀", " the"]), max_size=25
).map("".join)
FUZZ = settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def tekken(**changes) -> dict:
    vocab = [{"rank": n, "token_bytes": base64.b64encode(p).decode(), "token_str": None} for n, p in enumerate(PIECES)]
    config = {"pattern": PATTERN, "default_num_special_tokens": SPARE, "default_vocab_size": SPARE + len(PIECES) - 1}
    special = [{"rank": n, "token_str": name, "is_control": name != "[INST]"} for n, name in enumerate(CONTROL)]
    return {"config": {**config, "version": "v13"}, "vocab": vocab, "special_tokens": special, **changes}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "tekken.json").write_text(json.dumps(tekken()))
    return tmp_path


def merged(text: bytes) -> list[int]:
    """Byte pairs by rank, written out: as long as neighbours make a piece, the first of those with the lowest rank do.

    The last piece of the file is past the vocabulary's size.
    """
    ranks = {piece: n for n, piece in enumerate(PIECES[:-1])}
    parts = [text] if text in ranks else [text[n : n + 1] for n in range(len(text))]
    while text not in parts:
        pairs = [(ranks[a + b], n) for n, (a, b) in enumerate(pairwise(parts)) if a + b in ranks]
        if not pairs:
            break
        _, first = min(pairs)
        parts[first : first + 2] = [parts[first] + parts[first + 1]]
    return [SPARE + ranks[part] for part in parts]


def test_ids_are_those_of_byte_pairs_merged_by_rank(folder):
    tokenizer = open_tokenizer(folder)

    @FUZZ
    @given(TEXTS)
    def check(text):
        ids = [number for part in re.findall(PATTERN, text) for number in merged(part.encode())]
        assert tokenizer.encode(text) == ids
        assert tokenizer.decode(ids) == text

    check()


def test_control_tokens_come_first_and_text_never_becomes_one(folder):
    tokenizer = open_tokenizer(folder)
    assert (tokenizer.bos, tokenizer.eos, tokenizer.vocab_size, tokenizer.adds_bos) == (
        1,
        2,
        SPARE + len(PIECES) - 1,
        True,
    )
    assert tokenizer.encode("<s>[INST]</s><SPECIAL_5>", specials=True) == [1, 3, 2, 5]
    assert min(tokenizer.encode("<s></s><SPECIAL_5>")) >= SPARE
    assert tokenizer.specials == {*CONTROL, "<SPECIAL_4>", "<SPECIAL_5>"}


def test_text_that_the_pattern_leaves_in_one_is_no_control_token_either(folder):
    stored = tekken()
    stored["config"]["pattern"] = r"\S+|\s+"
    (folder / "tekken.json").write_text(json.dumps(stored))
    assert open_tokenizer(folder).encode("[INST]") == [SPARE + byte for byte in b"[INST]"]


def test_a_file_that_lists_no_control_tokens_has_the_first_ones(folder):
    stored = tekken()
    del stored["special_tokens"]
    stored["config"] |= {"default_num_special_tokens": 30, "default_vocab_size": 30 + len(PIECES)}
    (folder / "tekken.json").write_text(json.dumps(stored))
    tokenizer = open_tokenizer(folder)
    assert tokenizer.encode("<s>[INST]<pad>[TOOL_CONTENT]<SPECIAL_20>", specials=True) == [1, 3, 11, 19, 20]


def test_its_export_is_the_same_tokenizer_in_transformers(folder, tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizer, export = open_tokenizer(folder), tmp_path / "export"
    export.mkdir()
    tokenizer.save(export)
    theirs = transformers.AutoTokenizer.from_pretrained(export)
    text = "the lolol 12 and [INST] é\n"
    assert theirs(text).input_ids == [1, *tokenizer.encode(text, specials=True)]
    assert open_tokenizer(export).fingerprint == tokenizer.fingerprint


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"config": {"pattern": "a"}}, "missing keys default_vocab_size, default_num_special_tokens"),
        ({"special_tokens": [{"rank": 0, "token_str": "the"}]}, "the is a piece of text and a control token"),
    ],
)
def test_a_damaged_file_is_named(changes, sentence, folder):
    (folder / "tekken.json").write_text(json.dumps(tekken(**changes)))
    with pytest.raises(ConfigError, match=rf"tekken\.json: {sentence}"):
        open_tokenizer(folder)
