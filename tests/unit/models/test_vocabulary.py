"""Whether a tokenizer is a model's own."""

import json
from pathlib import Path

import pytest

from tests.chats import SPECIALS, byte_tokenizer
from trainer.config import ConfigError
from trainer.data.tokenizer import Tokenizer
from trainer.models.vocabulary import refuse_foreign_tokenizer
from trainer.tinyworld.data import TinyWorldData

OWN, OTHER = byte_tokenizer(), TinyWorldData().default_tokenizer()


def renamed(old: str, new: str) -> Tokenizer:
    return Tokenizer(OWN._definition.replace(json.dumps(old), json.dumps(new)), dict(OWN._settings))


def refusal(tokenizer: Tokenizer, folder: Path, rows: int) -> str:
    with pytest.raises(ConfigError) as refused:
        refuse_foreign_tokenizer(tokenizer, "theirs", str(folder), rows)
    [problem] = refused.value.problems
    assert problem.endswith(
        f"; leave tokenizer.path out, or train a new model (model=...) instead of model.path={folder}"
    )
    return problem


def test_another_models_tokenizer_is_refused(tmp_path):
    OWN.save(tmp_path)
    assert "tokenizer.path=theirs is another model's: it gives " in refusal(OTHER, tmp_path, OWN.vocab_size)


def test_a_models_own_tokenizer_with_more_or_other_special_tokens_is_not_foreign(tmp_path):
    OWN.save(tmp_path)
    for tokenizer in (OWN, OWN.extended(["<|new|>"]), renamed(SPECIALS[-1], "<|turn|>")):
        refuse_foreign_tokenizer(tokenizer, "theirs", str(tmp_path), OWN.vocab_size)


def test_a_vocabulary_much_larger_than_the_tokenizer_is_refused(tmp_path):
    # 256 bytes and 9 special tokens: 318 rows are 1.2 for each of them.
    refuse_foreign_tokenizer(OWN, "theirs", str(tmp_path), 318)
    assert f"theirs has 265 tokens and model.path={tmp_path} 49,152" in refusal(OWN, tmp_path, 49152)
