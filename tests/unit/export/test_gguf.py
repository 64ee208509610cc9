"""GGUF files: llama.cpp computes of them what the folder's model does, and reading them gives the folder back."""

import io
import json
import random
import re

import pytest
import sentencepiece
import tokenizers
import torch
from tokenizers import pre_tokenizers

from tests.unit.export.gguf_cases import CASES, TINY, byte_level, case_folder, random_weights
from trainer.batch import Documents
from trainer.config import InputError
from trainer.data.gguf_vocabulary import (
    ASCII_CASE,
    DIGIT,
    PRE_TOKENIZERS,
    tokenizer_of,
    vocabulary_of,
    vocabulary_problems,
    vocabulary_remarks,
)
from trainer.data.sentencepiece_format import definition_of
from trainer.data.tokenizer import Tokenizer, open_tokenizer
from trainer.export.formats import folder_problems, opened_folder
from trainer.export.ggml import GGUF_FORMATS, fitting, ggml_chunk, quantised
from trainer.export.gguf import GgufSource, gguf_problems, open_gguf, write_gguf
from trainer.functional import logits
from trainer.models.families import FAMILIES
from trainer.models.gguf_architectures import GGUF_FAMILIES
from trainer.models.gguf_format import Gguf, shapes_of
from trainer.models.header import read_shape
from trainer.models.hf_format import write_model

gguf = pytest.importorskip("gguf")
TOKENS = torch.randint(3, 303, (40,), generator=torch.Generator().manual_seed(0))
PLACES = [1, 2, 6, 11, 24, 40]
"""Numbers of tokens after which log-probabilities are compared: within windows of 8, and across several."""


@pytest.fixture(scope="module")
def llama_cpp():
    pytest.importorskip("xllamacpp")
    from tests.llama_cpp import LlamaCpp

    return LlamaCpp


@pytest.fixture(scope="module", params=sorted(CASES))
def case(request, tmp_path_factory):
    """A family's folder, and its file in float16."""
    place = tmp_path_factory.mktemp(request.param)
    folder = case_folder(request.param, place / "model")
    assert write_gguf("f16", folder, place / "out") == []
    return folder, place / "out" / "model-f16.gguf"


@torch.no_grad()
def log_probabilities(model, ids, places):
    found = model.eval()(torch.as_tensor(ids)[None], Documents.from_lengths([len(ids)], 1), logits)[0]
    return found.float().log_softmax(-1)[[place - 1 for place in places]]


def test_every_family_that_is_written_is_in_the_list():
    assert sorted(CASES) == sorted(GGUF_FAMILIES)


def test_llama_cpp_computes_of_the_file_what_the_model_does(case, llama_cpp):
    folder, file = case
    expected = log_probabilities(opened_folder(folder), TOKENS, PLACES)
    theirs = llama_cpp(file).log_probabilities(TOKENS.tolist(), PLACES, 320)
    # Its products round activations to float16. A wrong order of rows, factor or norm is off by more than 1.
    assert (theirs - expected).abs().max() < 0.05


def test_a_file_gives_back_the_shape_and_the_weights_of_its_folder(case):
    folder, file = case
    read, model = Gguf(file), opened_folder(folder)
    assert read.architecture == read_shape(folder)
    for name, values in model.state_dict().items():
        if name == "lm_head.weight" and model.architecture.tie_word_embeddings:
            continue
        # Half a step of float16; of norms that are written plus one, of float32.
        assert torch.allclose(read.tensor(name), values, rtol=2**-11, atol=2**-23), name


def without_config(file, other):
    """A copy of a file as others write them, without what ours say besides llama.cpp's metadata."""
    content = file.read_bytes()
    assert content.count(b"onecurve.config") == 1
    other.write_bytes(content.replace(b"onecurve.config", b"another1.config"))
    return other


def test_metadata_alone_is_read_as_what_llama_cpp_computes(case, tmp_path):
    folder, file = case
    other = without_config(file, tmp_path / "other.gguf")
    if any(rope.scaling.get("rope_type") == "llama3" for rope in read_shape(folder).ropes):
        with pytest.raises(InputError, match=r"rope_freqs\.weight stretches the rotation otherwise than Llama 3\.1"):
            Gguf(other)
        return
    read = Gguf(other)
    assert list(gguf_problems(read.architecture, read.tokenizer)) == []
    expected = log_probabilities(opened_folder(folder), TOKENS, PLACES)
    assert (log_probabilities(open_gguf(tmp_path), TOKENS, PLACES) - expected).abs().max() < 0.05


def test_a_rotation_stretched_as_llama_3_1s_is_known_from_its_factors(tmp_path):
    scaling = {
        "rope_type": "llama3", "rope_theta": 5e5, "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }  # fmt: skip
    folder = case_folder("llama", tmp_path / "model", rope_parameters=scaling, max_position_embeddings=131072)
    write_gguf("f16", folder, tmp_path / "out")
    read = Gguf(without_config(tmp_path / "out" / "model-f16.gguf", tmp_path / "other.gguf"))
    assert read.architecture == read_shape(folder)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "qwen3_moe"])
def test_eight_bits_are_within_a_tenth_of_a_nat_on_average(family, llama_cpp, tmp_path):
    folder = case_folder(family, tmp_path / "model")
    write_gguf("q8_0", folder, tmp_path / "out")
    expected = log_probabilities(opened_folder(folder), TOKENS, PLACES)
    theirs = llama_cpp(tmp_path / "out" / "model-q8_0.gguf").log_probabilities(TOKENS.tolist(), PLACES, 320)
    assert (theirs - expected).abs().mean() < 0.1


ALPHABET = [
    "a", "B", "z", " ", "  ", "\n", "\t", "\r\n", "1", "234", "56789", "'s", "'LL", "don't", "é", "ß", "ÉCOLE", "中文",
    "日本",
    "Ω", "😀", "👩\u200d👩\u200d👧", "\u200b", "\u00a0", "_", "--", "...", "<|im_start|>", "<s>", "</s>", "ſ", "İ", "कि",
    "ไทย",
    "\x01", "٣", "Ⅳ", "½", "http://x.y/z?q=1", "def f(x):\n    return x", "<0x0A>", "camelCase", "loss curve", "checkpoint",
    "<tool>", "\u2581",
]  # fmt: skip


def fuzzed(count, letters=ALPHABET):
    """Texts of every kind: scripts, marks, look-alikes of special tokens, spaces in places."""
    draw = random.Random(0)
    texts = ["".join(draw.choice(letters) for _ in range(draw.randint(1, 25))) for _ in range(count * 4 // 5)]
    ranges = [(32, 126), (160, 591), (880, 8191), (0x4E00, 0x4FFF), (0x1F300, 0x1F6FF)]
    return texts + ["".join(chr(draw.randint(*draw.choice(ranges))) for _ in range(30)) for _ in range(count // 5)]


def sentencepiece_tokenizer(prefix):
    model = io.BytesIO()
    corpus = [f"the cat {n} sat on the mat, déjà vu, one checkpoint and one loss curve" for n in range(200)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus), model_writer=model, vocab_size=390, model_type="bpe", byte_fallback=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False, add_dummy_prefix=prefix, num_threads=1,
        user_defined_symbols=["<tool>"], minloglevel=2,
    )  # fmt: skip
    return model.getvalue()


def cuts_of(name):
    return tuple(
        pre_tokenizers.Digits(individual_digits=True)
        if pattern == DIGIT
        else pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")
        for pattern in PRE_TOKENIZERS[name].patterns
    )


@pytest.fixture(scope="module", params=[*PRE_TOKENIZERS, "llama", "llama without prefix"])
def vocabulary(request, tmp_path_factory):
    """A tokenizer of each kind that is written, and a file with it."""
    place = tmp_path_factory.mktemp("vocabulary")
    if request.param in PRE_TOKENIZERS:
        tokenizer = byte_level(*cuts_of(request.param), direct=PRE_TOKENIZERS[request.param].direct)
    else:
        (place / "tokenizer.model").write_bytes(sentencepiece_tokenizer(request.param == "llama"))
        tokenizer = Tokenizer(*definition_of(place / "tokenizer.model"))
    a = FAMILIES["llama"].read({"model_type": "llama", **TINY, "vocab_size": 400})
    weights = random_weights(shapes_of(a), 0.0)
    write_model(place / "model", a, weights, dtype=torch.float32, shard_bytes=10**9, tokenizer=tokenizer, facts={})
    write_gguf("f16", place / "model", place / "out")
    return request.param, tokenizer, place / "out" / "model-f16.gguf"


def test_llama_cpp_makes_the_same_tokens_of_text(vocabulary, llama_cpp):
    name, tokenizer, file = vocabulary
    letters = [text for text in ALPHABET if text.isascii()] if name in ASCII_CASE else ALPHABET
    texts = [text for text in fuzzed(200, letters) if name not in ASCII_CASE or text.isascii()]
    judge = llama_cpp(file)
    assert len(texts) >= 160
    assert judge.tokens(texts) == [tokenizer.encode(text) for text in texts]
    marked = [f"<s>{text}</s>" for text in texts]
    assert judge.tokens(marked, specials=True) == [tokenizer.encode(text, specials=True) for text in marked]


def test_a_file_gives_back_the_tokenizer_of_its_folder(vocabulary):
    _, tokenizer, file = vocabulary
    read = Gguf(file).tokenizer
    texts = fuzzed(200)
    assert read.encode_many(texts) == tokenizer.encode_many(texts)
    ids = [tokenizer.encode(text, specials=True) for text in texts]
    assert [read.encode(text, specials=True) for text in texts] == ids
    assert [read.decode(each) for each in ids] == [tokenizer.decode(each) for each in ids]
    assert (read.pieces, read.role_names, read.specials) == (tokenizer.pieces, tokenizer.role_names, tokenizer.specials)
    assert (read.bos, read.eos, read.pad, read.adds_bos) == (
        tokenizer.bos,
        tokenizer.eos,
        tokenizer.pad,
        tokenizer.adds_bos,
    )


def changed(tokenizer, **parts):
    """A tokenizer with other parts of its definition."""
    definition = tokenizer.definition
    for name, part in parts.items():
        definition[name] = {**definition[name], **part} if name == "model" else part
    return Tokenizer(json.dumps(definition), {"bos_token": "<s>", "eos_token": "</s>"})


SPLIT = {"type": "Split", "pattern": {"Regex": "x"}, "behavior": "Isolated", "invert": False}
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}


@pytest.mark.parametrize(
    ("parts", "clause"),
    [
        ({"pre_tokenizer": {"type": "Sequence", "pretokenizers": [SPLIT, BYTES]}}, r"cuts text by \('x',\), for which"),
        ({"pre_tokenizer": {**BYTES, "add_prefix_space": True}}, "cuts text by .*add_prefix_space.*, for which"),
        ({"normalizer": {"type": "NFKC"}}, r"normalises text \(NFKC\), which llama.cpp does not"),
        ({"pre_tokenizer": None}, "has no token for every byte"),
    ],
    ids=["unknown cut", "space before", "normaliser", "no byte tokens"],
)
def test_a_tokenizer_that_llama_cpp_has_not_is_refused(parts, clause):
    [problem] = list(vocabulary_problems(changed(byte_level(), **parts), 400))[:1]
    assert re.search(clause, problem)


def test_a_unigram_tokenizer_and_one_that_drops_spaces_are_refused(tmp_path):
    for kind, rule, clause in (
        ("unigram", "identity", "a Unigram tokenizer is not written"),
        ("bpe", "nmt_nfkc", "changes text by"),
    ):
        model = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter([f"the cat {n} sat on the mat" for n in range(200)]), model_writer=model, vocab_size=310,
            model_type=kind, byte_fallback=True, normalization_rule_name=rule, num_threads=1, minloglevel=2,
        )  # fmt: skip
        (tmp_path / "tokenizer.model").write_bytes(model.getvalue())
        problems = list(vocabulary_problems(open_tokenizer(tmp_path), 400))
        assert any(clause in problem for problem in problems), problems


def test_more_tokens_than_the_model_has_are_refused():
    assert list(vocabulary_problems(byte_level(), 302)) == ["the tokenizer has 303 tokens, more than the model's 302"]


def test_what_llama_cpp_does_otherwise_with_text_is_said():
    composed = changed(byte_level(), normalizer={"type": "NFC"})
    assert list(vocabulary_problems(composed, 400)) == []
    [remark] = vocabulary_remarks(composed)
    assert remark.startswith("llama.cpp does not compose characters (NFC)")
    assert [remark.split(":")[0] for remark in vocabulary_remarks(byte_level(*cuts_of("tekken"), direct=True))] == [
        "llama.cpp tells upper from lower case in ASCII alone"
    ]
    assert list(vocabulary_remarks(byte_level())) == []


def test_ends_templates_and_unused_ids_come_back():
    settings = {
        "bos_token": "<s>", "eos_token": "</s>", "stops": [1, 2], "chat_template": "{{ messages }}",
        "named_templates": {"tool_use": "{{ tools }}"},
    }  # fmt: skip
    tokenizer = Tokenizer(json.dumps(byte_level().definition), settings)
    metadata = vocabulary_of(tokenizer, 310)
    assert metadata["tokenizer.ggml.tokens"][-1] == "[PAD309]"
    assert metadata["tokenizer.ggml.token_type"][302:] == [1, *[5] * 7]
    assert (metadata["tokenizer.ggml.eot_token_id"], metadata["tokenizer.ggml.add_bos_token"]) == (2, False)
    read = tokenizer_of(metadata, 64)
    assert (read.stops, read.chat_template, read.named_templates, read.vocab_size) == (
        (1, 2), "{{ messages }}", {"tool_use": "{{ tools }}"}, 303,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("family", "settings", "clause"),
    [
        ("qwen3_5_text", {}, "family qwen3_5_text is not written; only cohere, "),
        ("mistral", {"sliding_window": 16}, "no window for llama models, and this one looks back on 16 tokens; for"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}, "no window for qwen2 models"),
        ("gemma3_text", {"sliding_window": None}, "computes gemma3 models with windows alone, and this one has none"),
        ("gemma2", {"query_pre_attn_scalar": 24, "head_dim": 32, "sliding_window": 8}, "with this one's attention_scale;"),
        ("olmo2", {"head_dim": 32}, "computes no olmo2 model with this one's head_dim, attention_scale;"),
        ("stablelm", {"tie_word_embeddings": True}, "computes no stablelm model with this one's tie_word_embeddings;"),
        ("qwen3", {"attention_bias": True}, "computes no qwen3 model with this one's attention_bias"),
        ("llama", {"hidden_act": "gelu"}, "computes no llama model with this one's activation;"),
        ("qwen2", {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0,
          "high_freq_factor": 4.0, "original_max_position_embeddings": 16}}, "with this one's rope_parameters;"),
        ("qwen3_moe", {"num_experts": 8, "norm_topk_prob": True, "mlp_only_layers": [1]}, "with this one's kinds of layers;"),
    ],
)  # fmt: skip
def test_a_model_that_llama_cpp_does_not_compute_is_refused(family, settings, clause):
    a = FAMILIES[family].read({"model_type": family, **TINY, **settings})
    [problem] = gguf_problems(a, byte_level())
    assert clause in problem


def test_a_ramp_of_yarn_that_llama_cpp_rounds_is_said(tmp_path):
    # 16 dimensions: 16 ln(4096 / 2 pi 32) / 2 ln 150000 = 2.0 and 16 ln(4096 / 2 pi) / 2 ln 150000 = 4.3, which is 5 there.
    yarn = {"rope_type": "yarn", "rope_theta": 150000.0, "factor": 32.0, "original_max_position_embeddings": 4096}
    folder = case_folder("gpt_oss", tmp_path / "model", rope_parameters={**yarn, "truncate": False})
    [remark] = write_gguf("f16", folder, tmp_path / "out")
    assert remark.startswith("llama.cpp rounds the dimensions between which yarn stretches")
    assert Gguf(tmp_path / "out" / "model-f16.gguf").architecture == read_shape(folder)


def test_a_window_that_reaches_as_far_as_any_document_is_none():
    a = FAMILIES["mistral"].read({"model_type": "mistral", **TINY, "sliding_window": 64})
    assert list(gguf_problems(a, byte_level())) == []


def test_a_model_that_scores_is_refused(tmp_path):
    folder = case_folder("llama", tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": ["LlamaForSequenceClassification"]}))
    [problem] = folder_problems(["gguf-q8_0"], folder, "--format")
    assert problem == "--format: gguf-q8_0: it holds no head that scores; keep safetensors"


@pytest.mark.parametrize(
    ("kind", "width", "used"),
    [("Q4_K", 512, "Q4_K"), ("Q4_K", 576, "Q5_0"), ("Q6_K", 96, "Q8_0"), ("Q8_0", 48, "F16"), ("Q4_K", 40, "F16")],
)
def test_rows_that_blocks_do_not_divide_have_other_numbers(kind, width, used):
    assert fitting(kind, width) == used


def test_other_numbers_than_asked_for_are_counted_aloud(tmp_path):
    pytest.importorskip("xllamacpp")
    folder = case_folder("llama", tmp_path / "model")
    # Four layers of seven matrices with rows of 64 and 96, and two tables, of which one makes logits.
    assert write_gguf("q4_k", folder, tmp_path / "out") == [
        "29 of 30 matrices are Q5_0: blocks of Q4_K do not divide their rows",
        "1 of 30 matrices are Q8_0: blocks of Q4_K do not divide their rows",
    ]
    read = Gguf(tmp_path / "out" / "model-q4_k.gguf")
    assert compared(read, opened_folder(folder)) < 0.1


def compared(read, model):
    """The largest relative error of a matrix."""
    matrices = {name: values for name, values in model.state_dict().items() if values.ndim > 1}
    return max(float((read.tensor(n) - v).norm() / v.norm()) for n, v in matrices.items())


@pytest.mark.parametrize(
    ("kind", "error"), [("bf16", 2**-9), ("q8_0", 0.006), ("q5_1", 0.04), ("q4_0", 0.1)]
)  # of normal numbers in blocks of 32: half a step of 2 * 2.1 deviations / 256, / 32, / 16 and its root mean square
def test_each_kind_of_numbers_is_as_close_as_its_bits(kind, error, tmp_path):
    folder = case_folder("llama", tmp_path / "model", attention_bias=False)
    assert write_gguf(kind, folder, tmp_path / "out") == []
    read = Gguf(tmp_path / "out" / f"model-{kind}.gguf")
    assert error / 3 < compared(read, opened_folder(folder)) < error


def test_the_matrix_that_makes_logits_has_more_than_four_bits(tmp_path):
    for family, name in (("llama", "output.weight"), ("qwen2", "token_embd.weight")):
        source = GgufSource(case_folder(family, tmp_path / family), GGUF_FORMATS["q4_0"])
        assert {source.kinds[name], source.kinds["blk.0.ffn_up.weight"]} == {"Q8_0", "Q4_0"}


def test_a_number_that_float16_cannot_hold_is_refused():
    with pytest.raises(InputError, match=r"blk\.0\.ffn_up\.weight has numbers above 65504"):
        quantised("blk.0.ffn_up.weight", torch.tensor([1.0, -70000.0]), "F16")


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q5_0"])
def test_llama_cpps_own_code_makes_the_same_bytes_as_the_package(kind):
    if ggml_chunk() is None:
        pytest.skip("needs xllamacpp")
    values = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    own = quantised("x", values, kind)
    theirs = gguf.quants.quantize(values.numpy(), gguf.GGMLQuantizationType[kind])
    assert own.tobytes() == theirs.tobytes()


@pytest.mark.slow
def test_the_real_model_is_the_same_in_llama_cpp_and_ends_its_answer(smollm2, llama_cpp, tmp_path):
    assert write_gguf("f16", smollm2, tmp_path / "out") == []
    judge, tokenizer = llama_cpp(next((tmp_path / "out").glob("*.gguf"))), open_tokenizer(smollm2)
    texts = fuzzed(200)
    assert judge.tokens(texts) == [tokenizer.encode(text) for text in texts]
    assert judge.tokens(texts, specials=True) == [tokenizer.encode(text, specials=True) for text in texts]
    ids = tokenizer.encode("The capital of France is Paris, and one loss curve is the same on any number of ranks.")
    places = [1, 4, 9, len(ids)]
    expected = log_probabilities(opened_folder(smollm2), ids, places)
    theirs = judge.log_probabilities(ids, places, tokenizer.vocab_size)
    assert (theirs - expected).abs().max() < 0.05
    answer, end = judge.chat("What is the capital of France? Answer in one short sentence.", 60)
    assert ("Paris" in answer, end) == (True, "stop")
