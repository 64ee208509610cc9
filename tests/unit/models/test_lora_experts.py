"""Adapters of experts: what is computed is what is merged, what PEFT computes, and what comes back from its folder."""

import json
from pathlib import Path

import pytest
import torch

from tests.mixtures import small
from trainer.batch import Documents
from trainer.config import ConfigError
from trainer.functional import logits
from trainer.models.hf_format import write_model
from trainer.models.load import Model, ModelLoader
from trainer.models.lora import LoRA, adapters_off, is_adapter
from trainer.models.peft_format import write_adapter
from trainer.models.peft_layout import in_peft_layout
from trainer.parallel.ddp import DDP

SHAPE = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 8, "initializer_range": 0.3, "experts": 4, "expert_size": 16, "tie_word_embeddings": False,
}  # fmt: skip
TOKENS = torch.arange(24).view(2, 12) * 7 % 50
PACKED = Documents.from_lengths([12, 12], 2)


class NoTokenizer:
    bos, eos, pad, stops = 1, 2, 0, (2,)

    def save(self, folder) -> None:
        (folder / "tokenizer_config.json").write_text("{}")


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "model"
    load = ModelLoader(Model(family="qwen3_moe", rms_norm_eps=1e-6, **SHAPE), DDP(), 3, 50)
    write_model(
        folder, load.architecture, load.load().named_parameters(), dtype=torch.float32, shard_bytes=10**9,
        tokenizer=NoTokenizer(), facts={},
    )  # fmt: skip
    return folder


def adapted(base: Path, adapter: LoRA):
    load = ModelLoader(Model(path=str(base)), DDP(), 3, 50, adapter)
    model, draw = load.load().eval(), torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B.weight") and adapter.path is None:
            parameter.data = torch.randn(parameter.shape, generator=draw) * 0.2
    return load, model


@torch.no_grad()
@pytest.mark.parametrize("targets", [None, ["gate_up_proj"], ["q_proj", "*.experts.down_proj"]])
def test_an_adapter_of_experts_is_merged_opened_by_peft_and_read_again(targets, base, tmp_path):
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    load, model = adapted(base, LoRA(rank=4) if targets is None else LoRA(rank=4, targets=targets))
    ours = model(TOKENS, PACKED, logits)
    with adapters_off(model):
        assert (model(TOKENS, PACKED, logits) - ours).abs().max() > 0.1
    trained = {name: p for name, p in model.named_parameters() if is_adapter(name)}
    settings, tensors = in_peft_layout(load.adapter.peft_settings(trained), trained, load.architecture, load.shapes)
    write_adapter(tmp_path / "adapter", settings, tensors, str(base), NoTokenizer(), {})
    theirs = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    opened = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter").eval()
    torch.testing.assert_close(opened(TOKENS).logits, ours, rtol=1e-4, atol=1e-4)
    _, again = adapted(base, LoRA(path=str(tmp_path / "adapter")))
    torch.testing.assert_close(again(TOKENS, PACKED, logits), ours)
    for name, parameter in model.named_parameters():
        if name.endswith("experts.down_proj.weight"):
            merged, plain = load.adapter.merged(name, trained, load.start), load.start(name)
            stem = name.removesuffix("weight")
            if f"{stem}lora_A.weight" in trained:
                e = 2
                change = trained[f"{stem}lora_B.weight"][e] @ trained[f"{stem}lora_A.weight"][e]
                torch.testing.assert_close(merged[e], plain[e] + 8.0 * change)  # alpha 32 over rank 4
            else:
                assert torch.equal(merged, plain)
            assert not parameter.requires_grad


def test_what_experts_cannot_have_is_refused():
    with pytest.raises(ConfigError, match=r"adapter.dropout=0.1 is drawn row by row, and experts see tokens"):
        LoRA(dropout=0.1).validate_architecture(small(family="qwen3_moe", qk_norm="head"))
    with pytest.raises(
        ConfigError, match=r"PEFT's layout does not fit the experts of family granitemoe; name other layers"
    ):
        LoRA().validate_architecture(small(family="granitemoe"))
    LoRA(targets=["q_proj"]).validate_architecture(small(family="granitemoe"))


def test_a_router_is_never_adapted(base):
    _, model = adapted(base, LoRA(targets=["*"]))
    assert not any("router" in name and p.requires_grad for name, p in model.named_parameters())
    assert json.loads((base / "config.json").read_text())["num_experts"] == 4
