"""Every family against transformers: a tiny random model with what is its own switched on, in float32.

Another family is one row of `trainer.models.families` and one line of `OWN`.
"""

import dataclasses
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.unit.export.gguf_cases import CASES
from trainer.batch import Documents
from trainer.functional import logits
from trainer.generation import cache, decoding
from trainer.generation.sampling import Sampling
from trainer.models.families import FAMILIES
from trainer.models.hf_format import read_architecture, write_model
from trainer.models.load import Model, ModelLoader
from trainer.models.lora import LoRA, is_adapter
from trainer.models.peft_format import write_adapter
from trainer.models.peft_layout import in_peft_layout
from trainer.parallel.ddp import DDP
from trainer.parallel.engine import saved_buffers

transformers = pytest.importorskip("transformers", minversion="5.0")

TINY: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 6,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "sliding_window": 5,
    "pad_token_id": None, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
HALF = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}}
SCALES = {"embedding_multiplier": 12.0, "residual_multiplier": 0.22, "attention_multiplier": 0.1, "logits_scaling": 8.0}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
MINISTRAL = YARN | {
    "rope_theta": 1e6, "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.1,
}  # fmt: skip
MIXED = ["sliding_attention", "full_attention"] * 2
OWN: dict[str, dict[str, Any]] = {
    "llama": {"rope_parameters": LLAMA3, "attention_bias": True, "mlp_bias": True},
    "mistral": {},
    "ministral": {"layer_types": MIXED},
    "ministral3": {"sliding_window": None, "rope_parameters": MINISTRAL},
    "qwen2": {"use_sliding_window": True, "max_window_layers": 2},
    "qwen3": {"rope_parameters": YARN, "tie_word_embeddings": True},
    "qwen3_5_text": {
        "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 12,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.25},
    },
    "seed_oss": {"attention_out_bias": True, "residual_dropout": 0.0, "attention_dropout": 0.0},
    "internlm3": {"attention_bias": True, "mlp_bias": True},
    "smollm3": {"use_sliding_window": True},
    "ernie4_5": {"use_bias": True},
    "hunyuan_v1_dense": {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 1.0, "alpha": 50.0}},
    "helium": {"num_key_value_heads": 6},
    "granite": SCALES,
    "granitemoehybrid": SCALES | {
        "num_local_experts": 0, "position_embedding_type": "rope", "layer_types": ["full_attention"] * 4,
        "shared_intermediate_size": 40, "mamba_n_heads": 2,
    },
    "olmo2": {},
    "olmo3": {"rope_parameters": {"full_attention": YARN, "sliding_attention": {"rope_type": "default", "rope_theta": 5e5}}},
    "exaone4": {},
    "gemma": {},
    "gemma2": {"query_pre_attn_scalar": 24},
    "gemma3_text": {"query_pre_attn_scalar": 24, "layer_types": MIXED},
    "phi3": {"original_max_position_embeddings": 32, "rope_parameters": {
        "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0, 1.1, 1.3], "long_factor": [2.0, 3.0, 4.0],
        "partial_rotary_factor": 0.75, "original_max_position_embeddings": 32,
    }},
    "glm4": HALF,
    "cohere": {"use_qk_norm": True},
    "cohere2": {},
    "nemotron": HALF | {"attention_bias": True},
    "mixtral": {"num_local_experts": 4},
    "qwen2_moe": {
        "num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 40,
        "decoder_sparse_step": 2,
    },
    "qwen3_moe": {"num_experts": 16, "moe_intermediate_size": 32, "norm_topk_prob": True, "mlp_only_layers": [1]},
    "olmoe": {"num_experts": 16},
    "granitemoe": SCALES | {"num_local_experts": 4},
    "glm4_moe": {
        "n_routed_experts": 8, "n_shared_experts": 2, "moe_intermediate_size": 32, "num_experts_per_tok": 2,
        "routed_scaling_factor": 1.5, "use_qk_norm": True, "attention_bias": True,
    },
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "stablelm": HALF | {"use_qkv_bias": True},
}  # fmt: skip
SKIPPED = {
    # Its absent keys mean a recurrence.
    "test_absent_keys_have_the_values_that_transformers_gives_them": {"granitemoehybrid"},
}
"""Families that a test leaves out."""
LENGTHS = [2, 19, 1, 8]
TOKENS = torch.randint(96, (2, 30), generator=torch.Generator().manual_seed(0))


class NoTokenizer:
    bos = eos = pad = None
    stops = ()

    def save(self, folder) -> None:
        (folder / "tokenizer_config.json").write_text("{}")


@dataclasses.dataclass
class Case:
    """A family's model of ``transformers``, the folder that it saved, and that folder opened here."""

    kind: str
    theirs: Any
    folder: Path
    ours: Any


@pytest.fixture(scope="module", params=sorted(OWN))
def case(request, tmp_path_factory) -> Case:
    return built(request.param, tmp_path_factory.mktemp(request.param) / "theirs")


def built(kind: str, folder: Path) -> Case:
    """A family's model with random weights."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **TINY | OWN[kind])
    theirs = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            # Norms away from 1 and biases away from 0, so that a forgotten one shows.
            parameter.copy_(0.2 * torch.randn_like(parameter) + (parameter.dim() == 1) * parameter)
        for name, buffer in theirs.named_buffers():
            if name.endswith("correction_bias"):
                buffer.copy_(0.2 * torch.randn_like(buffer))
    theirs.save_pretrained(folder)
    # Longrope chooses by the longest document: 30 tokens here.
    ours = ModelLoader(Model(path=str(folder)), DDP(), 0, 96, longest=30).load()
    return Case(kind, theirs, folder, ours)


def compared(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference, as a part of the spread of what is expected."""
    return float((found - expected).abs().max() / expected.std())


def ours_on(model, tokens: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    return model(tokens, Documents.from_lengths(lengths * tokens.shape[0], tokens.shape[0]), logits)


def test_every_family_is_in_the_list():
    assert sorted(OWN) == sorted(FAMILIES)


def test_logits_and_gradients_are_those_of_transformers(case):
    expected = case.theirs(TOKENS).logits
    found = ours_on(case.ours.train(), TOKENS, [30])
    assert compared(found, expected) < 1e-4
    upstream = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    case.theirs.zero_grad()
    case.ours.zero_grad()
    (expected * upstream).sum().backward()
    (found * upstream).sum().backward()
    theirs = {name: p.grad for name, p in case.theirs.named_parameters()}
    family, a = FAMILIES[case.kind], case.ours.architecture
    for name, parameter in case.ours.named_parameters():
        source = family.source(name, a, theirs)
        gradient = source.load([theirs[n] for n in source.names], a)[source.place]
        scale = gradient.abs().max().clamp(min=1e-3)
        assert (parameter.grad - gradient).abs().max() < 2e-4 * scale, name


@torch.no_grad()
def test_packed_documents_are_as_each_alone(case):
    alone = torch.cat([case.theirs(part).logits for part in TOKENS.split(LENGTHS, 1)], 1)
    assert compared(ours_on(case.ours.eval(), TOKENS, LENGTHS), alone) < 1e-4


@torch.no_grad()
def test_an_export_opens_in_transformers_and_computes_the_same(case, tmp_path):
    a = case.ours.architecture
    write_model(
        tmp_path / "export", a, iter([*case.ours.named_parameters(), *saved_buffers(case.ours)]), dtype=torch.float32,
        shard_bytes=10**9, tokenizer=NoTokenizer(), facts={},
    )  # fmt: skip
    assert (
        load_file(tmp_path / "export" / "model.safetensors").keys()
        == load_file(case.folder / "model.safetensors").keys()
    )
    again, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "export", attn_implementation="eager", dtype=torch.float32, output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert type(again) is type(case.theirs)
    assert torch.equal(again(TOKENS).logits, case.theirs(TOKENS).logits)
    assert dataclasses.replace(read_architecture(tmp_path / "export"), longest=30) == a


@pytest.mark.parametrize("fixed", [False, True], ids=["blocks", "fixed"])
def test_greedy_text_through_the_cache_is_that_of_full_forwards(case, fixed, monkeypatch):
    # Several blocks of keys, and a prompt that passes through in pieces.
    monkeypatch.setattr(cache, "BLOCK", 8)
    monkeypatch.setattr(decoding, "CHUNK", 10)
    prompts, done = [TOKENS[0, :n].tolist() for n in (1, 7, 18)], 0
    for sequence in decoding.Decoding(case.ours.eval(), prompts, Sampling(8, temperature=0), stops=(), fixed=fixed):
        if sequence.done:
            ids = torch.tensor([[*sequence.prompt, *sequence.ids]])
            with torch.no_grad():
                scores = ours_on(case.ours, ids, [ids.shape[1]])[0, len(sequence.prompt) - 1 : -1]
            assert sequence.ids == scores.argmax(-1).tolist()
            expected = scores.log_softmax(-1).amax(-1)
            torch.testing.assert_close(torch.tensor(sequence.logprobs), expected, rtol=0, atol=1e-4)
            done += 1
    assert done == 3


@torch.no_grad()
def adapted_at_random(load: ModelLoader) -> tuple[Any, dict[str, torch.nn.Parameter]]:
    """A loaded model whose adapters add something, and their tensors."""
    adapted = load.load().eval()
    draw = torch.Generator().manual_seed(2)
    for name, parameter in adapted.named_parameters():
        if name.endswith("lora_B.weight"):
            parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.1)
    return adapted, {name: p for name, p in adapted.named_parameters() if is_adapter(name)}


@torch.no_grad()
def test_a_merged_adapter_computes_what_the_adapted_model_does(case, tmp_path):
    load = ModelLoader(Model(path=str(case.folder)), DDP(), 0, 96, LoRA(rank=2), longest=30)
    adapted, trained = adapted_at_random(load)
    merged = ((name, load.adapter.merged(name, trained, load.start)) for name in load.shapes)
    write_model(
        tmp_path / "merged", load.architecture, merged, dtype=torch.float32, shard_bytes=10**9, tokenizer=NoTokenizer(),
        facts={},
    )  # fmt: skip
    again = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "merged", attn_implementation="eager", dtype=torch.float32
    )
    expected = again(TOKENS).logits
    assert compared(ours_on(adapted, TOKENS, [30]), expected) < 1e-4
    assert compared(expected, case.theirs(TOKENS).logits) > 0.01


@torch.no_grad()
@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("kind", ["phi3", "glm4", "granitemoehybrid"])
def test_peft_opens_adapters_of_what_is_one_tensor_there_and_several_here(kind, rslora, tmp_path):
    peft = pytest.importorskip("peft")
    case = built(kind, tmp_path / "theirs")
    # Of q, k and v only two are adapted.
    lora = LoRA(rank=2, alpha=3.0, rslora=rslora, targets=["q_proj", "v_proj", "gate_proj", "up_proj", "down_proj"])
    load = ModelLoader(Model(path=str(case.folder)), DDP(), 0, 96, lora, longest=30)
    adapted, trained = adapted_at_random(load)
    settings, tensors = in_peft_layout(lora.peft_settings(trained), trained, load.architecture, load.shapes)
    write_adapter(tmp_path / "adapter", settings, tensors, None, NoTokenizer(), {})
    theirs = peft.PeftModel.from_pretrained(case.theirs, tmp_path / "adapter").eval()
    assert compared(ours_on(adapted, TOKENS, [30]), theirs(TOKENS).logits) < 1e-4


NEEDED = (
    "vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "num_key_value_heads",
)  # fmt: skip


@pytest.mark.parametrize(
    "kind", sorted(OWN.keys() - SKIPPED["test_absent_keys_have_the_values_that_transformers_gives_them"])
)
def test_absent_keys_have_the_values_that_transformers_gives_them(kind):
    # A rotation of its own and ids of tokens aside, a class' defaults are what its published models leave out.
    full = json.loads(transformers.AutoConfig.for_model(kind).to_json_string(use_diff=False))
    minimal = {
        key: full[key] for key in (*NEEDED, "max_position_embeddings", "shared_intermediate_size") if key in full
    }
    minimal |= {key: full[key] for key in FAMILIES[kind].only if key in full}
    mine, theirs = (FAMILIES[kind].read({"model_type": kind, **config}) for config in (minimal, full))
    assert dataclasses.asdict(mine) == dataclasses.asdict(theirs)


def test_the_table_of_the_documentation_is_that_of_the_rows_and_of_these_tests():
    path = Path(__file__).parents[3]
    spec = importlib.util.spec_from_file_location("family_table", path / "scripts" / "family_table.py")
    table = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(table)
    assert (path / "docs" / "families.md").read_text() == table.page(OWN, SKIPPED, CASES)
    tests = "".join((path / "tests" / room / "test_families.py").read_text() for room in ("unit/models", "distributed"))
    tests += (path / "tests" / "unit" / "export" / "test_gguf.py").read_text()
    assert all(f"def {test}(" in tests for test in [*table.CHECKS.values(), table.WRITTEN])
