"""Tokenizers: no text is lost, no id differs between us, SentencePiece and transformers."""

import json
import shutil

import pytest
import sentencepiece
import tokenizers
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.chats import byte_tokenizer
from tests.command import ROOT
from trainer.config import ConfigError
from trainer.data.tokenizer import Tokenizer, TokenizerChoice, open_tokenizer
from trainer.data.tokenizer_training import ModelType, train

CORPUS = [
    "The cat sat on the mat, and the dog barked at 1999 trees.\n\tIndented  twice.\n" * 3,
    "Fünf größere Züge; <p>tags</p> like <s> or </s> and e-mail@example.org stay text.\n",
    "emoji 😀 and 漢字 once",
    *(f"line {n} of {n * n}: nothing new, the same the same\n" for n in range(300)),
]
AWKWARD = [
    "", " ", "      ", "\n\n\n", "\t\r\n \x00\x01\x7f", "é vs e\u0301", "😀👩‍👩‍👧", "漢字かな交じり文", "\u200b\ufeff\xa0",
    "<s>", "</s><s>", "<unk>", "<pad> x", " <s> y", "a <extra> b", "12 345", "   the", "the   ", "\U0010ffff",
]  # fmt: skip
TEXTS = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\u2581"), max_size=60),
    st.lists(st.sampled_from([*AWKWARD, "the", " ", "cat", "1", "<", "s>", "\n"]), max_size=12).map("".join),
)
FUZZ = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module", params=list(ModelType))
def folder(request, tmp_path_factory):
    out = tmp_path_factory.mktemp("tokenizer") / request.param
    train(CORPUS, out, vocab_size=330, model_type=request.param, specials=("<extra>",))
    return out


def has_special(text: str) -> bool:
    return any(name in text for name in ("<s>", "</s>", "<unk>", "<pad>", "<extra>"))


def test_ids_of_special_tokens_are_fixed_and_text_never_becomes_one(folder):
    tokenizer = open_tokenizer(folder)
    assert (tokenizer.bos, tokenizer.eos, tokenizer.pad) == (1, 2, 3)
    assert tokenizer.vocab_size == 330
    for text in ("<s>", "x</s>", "<unk> <pad>", "<extra>"):
        assert min(tokenizer.encode(text)) > 4, text
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode("<s>the</s><extra>", specials=True)[0::2] == [1, 2]
    assert tokenizer.encode("<extra>", specials=True) == [4]


def test_every_text_survives_and_its_bytes_are_counted(folder):
    tokenizer = open_tokenizer(folder)

    @FUZZ
    @given(TEXTS)
    def check(text):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert int(tokenizer.token_bytes()[torch.tensor(ids, dtype=torch.int64)].sum()) == len(text.encode())

    for text in AWKWARD:
        assert tokenizer.decode(tokenizer.encode(text)) == text, repr(text)
    check()


def test_ids_are_those_of_sentencepiece(folder):
    tokenizer = open_tokenizer(folder)
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))

    @FUZZ
    @given(TEXTS)
    def check(text):
        # SentencePiece stops at NUL when called from Python; ours does not.
        # A unigram vocabulary holds the names of control tokens; there we cut such text and SentencePiece does not.
        if "\0" not in text and not has_special(text):
            assert tokenizer.encode(text) == theirs.encode(text)

    check()


def test_transformers_opens_the_export_with_the_same_ids(folder, tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizer = open_tokenizer(folder)
    tokenizer.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (1, 2, 3)

    @FUZZ
    @given(TEXTS)
    def check(text):
        assert tokenizer.encode(text, specials=True) == theirs(text, add_special_tokens=False).input_ids
        if not has_special(text):
            assert [1, *tokenizer.encode(text)] == theirs(text).input_ids
            assert theirs.decode(tokenizer.encode(text)) == text

    check()


def test_a_saved_tokenizer_is_the_same_tokenizer(folder, tmp_path):
    tokenizer = open_tokenizer(folder)
    tokenizer.save(tmp_path)
    again = open_tokenizer(tmp_path)
    assert again.fingerprint == tokenizer.fingerprint
    assert again.encode_many(CORPUS) == [tokenizer.encode(t) for t in CORPUS]


def test_training_twice_gives_the_same_bytes(folder, tmp_path):
    train(CORPUS, tmp_path / "again", vocab_size=330, model_type=ModelType(folder.name), specials=("<extra>",))
    assert {f.name: f.read_bytes() for f in folder.iterdir()} == {
        f.name: f.read_bytes() for f in (tmp_path / "again").iterdir()
    }


def test_training_overwrites_nothing_and_leaves_nothing_half_done(folder, tmp_path):
    with pytest.raises(FileExistsError, match="choose another folder"):
        train(CORPUS, folder, vocab_size=330)
    with pytest.raises(ValueError, match="vocab_size=100000 does not fit this text"):
        train(CORPUS, tmp_path / "big", vocab_size=100000)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def mistral():
    file = ROOT.parent / "shared" / "data" / "tokenizer" / "mistral_v1.model"
    if not file.exists():
        pytest.skip("needs the SentencePiece model mistral_v1.model, which a plain clone does not have")
    return file


def test_a_foreign_sentencepiece_model_keeps_its_ids_in_transformers_too(mistral, tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizer = open_tokenizer(mistral)
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(mistral))
    tokenizer.save(tmp_path)
    exported = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.vocab_size == 32000

    @FUZZ
    @given(TEXTS)
    def check(text):
        if "\0" not in text and not has_special(text):
            assert tokenizer.encode(text) == theirs.encode(text)
            assert exported(text, add_special_tokens=False).input_ids == theirs.encode(text)
            assert tokenizer.decode(theirs.encode(text)) == text

    check()


def write_folder(folder, definition: str, **settings):
    folder.mkdir()
    (folder / "tokenizer.json").write_text(definition)
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>", "bos_token": "<s>", **settings}))
    return folder


def exported(folder, tmp_path):
    """The tokenizers that transformers makes of a folder and of what is exported from it."""
    transformers = pytest.importorskip("transformers")
    (tmp_path / "export").mkdir()
    open_tokenizer(folder).save(tmp_path / "export")
    return [transformers.AutoTokenizer.from_pretrained(where) for where in (folder, tmp_path / "export")]


@pytest.mark.parametrize("settings", [{}, {"add_bos_token": True}, {"add_bos_token": False}, {"add_eos_token": True}])
@pytest.mark.parametrize("processor", ["bos", None])
def test_an_export_adds_to_a_text_what_its_parent_adds(processor, settings, tmp_path):
    backend = tokenizers.Tokenizer.from_str(byte_tokenizer()._definition)
    if processor is not None:
        backend.post_processor = tokenizers.processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 256)])
    folder = write_folder(tmp_path / "parent", backend.to_str(), tokenizer_class="PreTrainedTokenizerFast", **settings)
    parent, export = exported(folder, tmp_path)
    assert export("ab").input_ids == parent("ab").input_ids
    assert open_tokenizer(folder).adds_bos == (parent("ab").input_ids[0] == 256)


def test_an_export_inherits_templates_padding_and_names(tmp_path):
    named = [{"name": "default", "template": "{{ 1 }}"}, {"name": "tool_use", "template": "{{ 2 }}"}]
    folder = write_folder(
        tmp_path / "parent", byte_tokenizer()._definition, chat_template=named, padding_side="left",
        additional_special_tokens=["<|im_start|>"], model_max_length=77,
    )  # fmt: skip
    parent, export = exported(folder, tmp_path)
    for name in ("chat_template", "padding_side", "model_max_length", "all_special_tokens"):
        assert getattr(export, name) == getattr(parent, name)
    assert open_tokenizer(tmp_path / "export").chat_template == "{{ 1 }}"


@pytest.mark.parametrize("eos", ["</s>", "<|im_end|>"])
@pytest.mark.parametrize("file", ["added_tokens.json", "tokenizer_config.json"])
def test_tokens_added_beside_a_sentencepiece_model_are_its_tokens(file, eos, folder, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes((folder / "tokenizer.model").read_bytes())
    names = {"<|im_end|>": 330, "<|im_start|>": 331}
    decoder = {str(n): {"content": name, "special": True} for name, n in names.items()}
    settings = {"eos_token": eos, **({} if file == "added_tokens.json" else {"added_tokens_decoder": decoder})}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    if file == "added_tokens.json":
        (tmp_path / file).write_text(json.dumps(names))
    tokenizer = open_tokenizer(tmp_path)
    assert tokenizer.encode("<|im_start|>a<|im_end|>", specials=True)[::2] == [331, 330]
    assert tokenizer.eos == (330 if eos == "<|im_end|>" else 2)
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<|far|>": 400}))
    with pytest.raises(ConfigError, match=r"has id \d+ beside it and \d+ in it"):
        open_tokenizer(tmp_path)


def test_an_export_of_a_sentencepiece_model_adds_bos_and_is_the_same_tokenizer(folder, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes((folder / "tokenizer.model").read_bytes())
    for declared, first in (({}, [1]), ({"add_bos_token": False}, [])):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer", **declared}))
        out = tmp_path / f"export-{len(first)}"
        out.mkdir()
        parent = open_tokenizer(tmp_path)
        parent.save(out)
        export = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(out)
        assert export("ab").input_ids == first + parent.encode("ab")
        assert open_tokenizer(out).fingerprint == parent.fingerprint
        assert open_tokenizer(out).ids_as(parent)
        assert open_tokenizer(out).adds_bos == parent.adds_bos == bool(first)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        *((f"{file}.json", '{"eos_token": "</') for file in ("tokenizer_config", "special_tokens_map", "added_tokens")),
        ("tokenizer_config.json", '{"chat_template": [{"name": "default", "template": 5}]}'),
        ("added_tokens.json", '["</tool>"]'),
    ],
)
def test_a_file_that_is_cut_off_or_of_another_form_is_named(name, text, folder, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes((folder / "tokenizer.model").read_bytes())
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=rf"{name} is damaged .*; was its download cut off"):
        open_tokenizer(tmp_path)


def test_a_byte_level_tokenizer_counts_bytes_too(smollm2):
    tokenizer = open_tokenizer(smollm2)
    assert tokenizer.pad == tokenizer.eos == 2
    for text in [*AWKWARD, *CORPUS]:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert int(tokenizer.token_bytes()[torch.tensor(ids, dtype=torch.int64)].sum()) == len(text.encode())
    assert tokenizer.chat_template


def test_what_is_no_tokenizer_is_refused_by_name(tmp_path):
    assert list(TokenizerChoice(str(tmp_path)).problems()) == [
        f"tokenizer.path={tmp_path} holds no tokenizer; give a folder with tokenizer.json, tokenizer.model or tekken.json"
    ]
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0"')
    with pytest.raises(ConfigError, match="is no tokenizer that can be read"):
        open_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(ConfigError, match=r"tokenizer.json is a pointer of Git LFS, not the file; run git lfs pull"):
        open_tokenizer(tmp_path)


def test_a_tokenizer_without_an_end_is_refused(folder, tmp_path):
    shutil.copy(folder / "tokenizer.json", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>"}))
    with pytest.raises(ConfigError, match="names no eos_token"):
        open_tokenizer(tmp_path)
    assert isinstance(open_tokenizer(folder), Tokenizer)
