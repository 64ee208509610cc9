"""The decoder against Hugging Face's own, import and export both ways."""

import json
from functools import partial

import pytest
import torch

from trainer.batch import Documents
from trainer.functional import logits, logprobs
from trainer.generation.generate import generate
from trainer.generation.sampling import Sampling
from trainer.models.hf_format import read_architecture, write_model
from trainer.models.load import Model, ModelLoader
from trainer.parallel.ddp import DDP

transformers = pytest.importorskip("transformers")

SMALL = {
    "vocab_size": 101,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
BIASED = {"attention_bias": True, "attention_output_bias": True, "mlp_bias": True}
SHAPES = {
    "llama": {"head_dim": 8, "tie_word_embeddings": False},
    "llama3": {"head_dim": 8, "rope_scaling": LLAMA3, "rope_theta": 5e5},
    "llama-biases": {"head_dim": 8, **BIASED},
    "llama-head": {"head_dim": 16},
    "linear": {"head_dim": 8, "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    "yarn": {"head_dim": 8, "rope_scaling": YARN, "tie_word_embeddings": False},
    "mistral": {"head_dim": 8, "family": "mistral", "sliding_window": 11, "tie_word_embeddings": False},
    "qwen2": {"head_dim": 8, "family": "qwen2"},
    "qwen2-sliding": {"head_dim": 8, "family": "qwen2", "sliding_window": 9, "full_attention_every": 2},
    "qwen3": {"head_dim": 16, "family": "qwen3", "tie_word_embeddings": False},
}


class NoTokenizer:
    bos, eos, pad, stops = 1, 2, 0, (2,)

    def save(self, folder) -> None:
        (folder / "tokenizer_config.json").write_text("{}")


def built(name: str) -> torch.nn.Module:
    return ModelLoader(Model(**SMALL, **SHAPES[name]), DDP(), 0, 101).load()


def write(architecture, model, folder, shard_bytes=10**9) -> None:
    weights = iter(dict(model.named_parameters()).items())
    write_model(
        folder, architecture, weights, dtype=torch.float32, shard_bytes=shard_bytes, tokenizer=NoTokenizer(), facts={}
    )


def perturbed(model: torch.nn.Module) -> torch.nn.Module:
    """Norms away from 1 and biases away from 0, so that a forgotten one shows."""
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim < 2:
                parameter.add_(torch.randn(parameter.shape, generator=draw) * 0.2)
    return model


def theirs_of(folder):
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, dtype=torch.float32
    )
    assert not report["missing_keys"], report
    assert not report["unexpected_keys"], report
    assert not report["mismatched_keys"], report
    return model.eval()


def ours_on(model, tokens: torch.Tensor) -> torch.Tensor:
    documents = Documents.from_lengths([tokens.shape[1]] * tokens.shape[0], tokens.shape[0])
    return model(tokens, documents, logits).detach()


@pytest.mark.parametrize("name", SHAPES)
def test_an_exported_model_gives_the_same_logits_in_transformers(name, tmp_path):

    ours = perturbed(built(name))
    write(ours.architecture, ours, tmp_path / "export")
    theirs = theirs_of(tmp_path / "export")
    tokens = torch.randint(0, 101, (2, 64), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        # The limit is 1e-4; on models this small fp32 agrees far better.
        torch.testing.assert_close(ours_on(ours, tokens), theirs(tokens).logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", SHAPES)
def test_what_transformers_saved_is_read_back_to_the_same_logits_and_shape(name, tmp_path):
    first = perturbed(built(name))
    write(first.architecture, first, tmp_path / "export")
    theirs = theirs_of(tmp_path / "export")
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="40KB")
    assert (tmp_path / "theirs" / "model.safetensors.index.json").exists()
    assert read_architecture(tmp_path / "theirs") == first.architecture == read_architecture(tmp_path / "export")
    again = ModelLoader(Model(path=str(tmp_path / "theirs")), DDP(), 0, 101).load()
    tokens = torch.randint(0, 101, (2, 64), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(ours_on(again, tokens), ours_on(first, tokens), atol=0, rtol=0)


def test_a_sharded_export_has_an_index_and_opens(tmp_path):
    ours = built("llama")
    write(ours.architecture, ours, tmp_path / "export", shard_bytes=30_000)
    index = json.loads((tmp_path / "export" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    theirs = theirs_of(tmp_path / "export")
    for name, tensor in theirs.named_parameters():
        assert torch.equal(tensor, dict(ours.named_parameters())[name]), name


@pytest.mark.parametrize("name", ["llama3", "mistral", "qwen3"])
def test_packed_documents_have_the_log_probabilities_they_have_alone(name, tmp_path):
    model = built(name)
    draw = torch.Generator().manual_seed(1)
    lengths = [3, 40, 1, 20, 17, 47]
    tokens = torch.randint(0, 101, (2, 64), generator=draw)
    targets = torch.randint(0, 101, (2, 64), generator=draw)
    read = partial(logprobs, targets=targets)
    packed = model(tokens, Documents.from_lengths(lengths, 2), read)[0].flatten()
    at = 0
    for length in lengths:
        part = slice(at, at + length)
        alone = partial(logprobs, targets=targets.view(1, -1)[:, part])
        found = model(tokens.view(1, -1)[:, part], Documents.from_lengths([length], 1), alone)[0][0]
        torch.testing.assert_close(packed[part], found, atol=1e-5, rtol=0)  # S1
        at += length


def smol_tokens(tokenizer, text: str) -> torch.Tensor:
    return torch.tensor([tokenizer(text).input_ids])


TEXT = "The capital of France is Paris. In 1999, 37 cats sat on the mat;\n\nthen it rained for days, and nobody minded."


def test_smollm2_gives_the_logits_of_transformers(smollm2):
    theirs = theirs_of(smollm2)
    ours = ModelLoader(Model(path=str(smollm2)), DDP(), 0, 1).load()
    tokens = smol_tokens(transformers.AutoTokenizer.from_pretrained(smollm2), TEXT)
    with torch.no_grad():
        torch.testing.assert_close(ours_on(ours, tokens), theirs(tokens).logits, atol=1e-4, rtol=0)


@pytest.mark.slow
def test_smollm2_packed_equals_alone_and_greedy_text_equals_that_of_transformers(smollm2):
    tokenizer = transformers.AutoTokenizer.from_pretrained(smollm2)
    theirs = theirs_of(smollm2)
    ours = ModelLoader(Model(path=str(smollm2)), DDP(), 0, 1).load().eval()
    prompts = [smol_tokens(tokenizer, t)[0].tolist() for t in ("The capital of France is", TEXT, "1, 2, 3,")]
    found = generate(ours, prompts, Sampling(12, temperature=0), stops=[tokenizer.eos_token_id])
    for prompt, completion in zip(prompts, found, strict=True):
        with torch.no_grad():
            expected = theirs.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False)[
                0, len(prompt) :
            ].tolist()
        assert completion.ids == expected
    lengths = [len(p) for p in prompts]
    row = torch.tensor([[t for p in prompts for t in p]])
    with torch.no_grad():
        packed = ours(row, Documents.from_lengths(lengths, 1), logits).log_softmax(-1)
        alone = ours_on(ours, torch.tensor([prompts[1]])).log_softmax(-1)
    torch.testing.assert_close(packed[:, lengths[0] : lengths[0] + lengths[1]], alone, atol=1e-4, rtol=0)  # S1
