"""Where documents begin: with BOS if the tokenizer itself puts it before a text, as it then does in ``transformers``."""

import json

from trainer.data.rows import prepare_rows, tokenize
from trainer.data.templates import open_template
from trainer.data.tokenizer import Tokenizer, open_tokenizer
from trainer.tinyworld.data import TinyWorldData

TOKENIZER = TinyWorldData().default_tokenizer()
TEXTS = ["Ada.", "Ben paints.", "Who?"]


def test_documents_begin_with_bos_where_the_tokenizer_puts_it_there(tmp_path):
    adds, adds_none = (
        Tokenizer(TOKENIZER._definition, {**TOKENIZER._settings, "add_bos_token": adds}) for adds in (True, False)
    )
    [with_bos], [without] = (list(tokenize(["Ada."], t)) for t in (adds, adds_none))
    assert with_bos.ids == [TOKENIZER.bos, *TOKENIZER.encode("Ada."), TOKENIZER.eos]
    assert without.ids == with_bos.ids[1:]
    both = {
        prepare_rows(tmp_path, ["key"], lambda t=t: tokenize(TEXTS, t), t, 16).fingerprint for t in (adds, adds_none)
    }
    assert len(both) == 2
    raw, bare = (open_template("raw", t).prompt([{"role": "user", "content": "Ada."}]) for t in (adds, adds_none))
    assert (raw, bare) == (with_bos.ids[:-1], without.ids[:-1])


def test_a_tokenizer_of_release_0_1_goes_on_putting_bos_before_documents(tmp_path):
    TOKENIZER.save(tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    plain = Tokenizer(TOKENIZER._definition, {**TOKENIZER._settings, "add_bos_token": False})
    (tmp_path / "tokenizer.json").write_text(plain._definition)
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({**settings, "add_bos_token": False, "add_eos_token": False})
    )
    again = open_tokenizer(tmp_path)
    assert [e.ids for e in tokenize(TEXTS, again)] == [e.ids for e in tokenize(TEXTS, TOKENIZER)]
    assert again.fingerprint == TOKENIZER.fingerprint
