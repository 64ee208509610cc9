"""What adapters beside packed weights are merged onto, what either costs, and bases that are packed on disk already."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.chats import byte_tokenizer, write_jsonl
from tests.small_folder import write_folder
from trainer.batch import Documents
from trainer.compose import compose
from trainer.config import ConfigError
from trainer.export.nf4_folder import write_nf4
from trainer.export.peft import merged_weights
from trainer.functional import logits
from trainer.models import packed
from trainer.models.load import Model, ModelLoader
from trainer.models.lora import LoRA
from trainer.models.nf4 import Packed, unpack
from trainer.models.packed import on_original, packed_weights
from trainer.models.qlora import MergeBase, QLoRA
from trainer.optim import AdamW
from trainer.parallel.ddp import DDP
from trainer.parallel.precision import Precision
from trainer.run import run

pytest.importorskip("bitsandbytes", reason="needs bitsandbytes (extra: quant)")

SHAPE = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "initializer_range": 0.1,
}  # fmt: skip
MIXTURE = {**SHAPE, "family": "qwen3_moe", "experts": 4, "expert_size": 32, "tie_word_embeddings": False}
TOKENS, ROWS = torch.arange(24).view(2, 12) * 7 % 256, Documents.from_lengths([12, 12], 2)
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"
CHATS = [
    {"messages": [{"role": "user", "content": f"Count to {n}."}, {"role": "assistant", "content": "One, two."}]}
    for n in range(8)
]


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    where = tmp_path_factory.mktemp("source") / "model"
    return write_folder(where, shape=Model(**SHAPE), dtype=torch.bfloat16, template=TEMPLATE)


@pytest.fixture(scope="module")
def mixture(tmp_path_factory) -> Path:
    return write_folder(tmp_path_factory.mktemp("mixture") / "model", shape=Model(**MIXTURE), dtype=torch.bfloat16)


def loaded(folder: Path, adapter) -> tuple[ModelLoader, torch.nn.Module]:
    """A model whose adapters add something: as large a change as rounding made."""
    load = ModelLoader(Model(path=str(folder)), DDP(), 0, byte_tokenizer().vocab_size, adapter)
    model = load.load()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B" in name:
                parameter.normal_(0.0, 0.02, generator=torch.Generator().manual_seed(len(name)))
    return load, model


def logprobs(model) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS, ROWS, logits).log_softmax(-1)


def divergence(one: torch.Tensor, other: torch.Tensor) -> float:
    """KL(one || other), nats a token."""
    return float((one.exp() * (one - other)).sum(-1).mean())


def merged(folder: Path, **changes) -> torch.nn.Module:
    """A plain model of the weights that are exported."""
    load, model = loaded(folder, QLoRA(rank=4, **changes))
    weights = dict(merged_weights(DDP().wrap(model, AdamW(lr=0.1), Precision()), load))
    plain = ModelLoader(Model(path=str(folder)), DDP(), 0, byte_tokenizer().vocab_size).load()
    plain.load_state_dict(weights, strict=False)
    assert weights.keys() >= {name for name, _ in plain.named_parameters()}
    return plain


def test_merged_onto_what_was_trained_it_is_the_model_that_was_trained(source):
    trained = logprobs(loaded(source, QLoRA(rank=4))[1])
    of_trained, of_original = (divergence(trained, logprobs(merged(source, merge_onto=kind))) for kind in MergeBase)
    assert of_trained < 1e-6 < 1e-3 < of_original


@pytest.mark.parametrize("kind", ["source", "mixture"])
def test_on_the_original_weights_it_is_lora_without_packing(kind, request):
    folder = request.getfixturevalue(kind)
    load, model = loaded(folder, QLoRA(rank=4))
    before, plain = logprobs(model), logprobs(loaded(folder, LoRA(rank=4))[1])
    with on_original(model, load.start, torch.float32) as lack:
        assert lack is None
        torch.testing.assert_close(logprobs(model), plain, rtol=0, atol=1e-5)
    assert torch.equal(logprobs(model), before)
    assert divergence(before, plain) > 1e-3
    assert all(weight.wide is None for weight in packed_weights(model).values())


def test_without_memory_for_a_copy_it_says_so_and_computes_as_before(source, monkeypatch):
    load, model = loaded(source, QLoRA(rank=4))
    monkeypatch.setattr(packed, "USABLE", 0.0)
    with on_original(model, load.start, torch.float32) as lack:
        assert lack.startswith("a copy needs 0.0 GB of ")
        assert all(weight.wide is None for weight in packed_weights(model).values())


def test_a_base_that_is_packed_on_disk_is_taken_as_it_is(source, tmp_path):
    write_nf4(source, tmp_path / "nf4")
    stored = load_file(tmp_path / "nf4" / "model.safetensors")
    changed = "model.layers.1.mlp.up_proj.weight.absmax"
    stored[changed] = stored[changed] ^ 1  # as another machine may have rounded them: packed again they would be ours
    save_file(stored, tmp_path / "nf4" / "model.safetensors", metadata={"format": "pt"})
    load, model = loaded(tmp_path / "nf4", QLoRA(rank=4))
    weights = packed_weights(model)
    assert len(weights) == 14
    for name, weight in weights.items():
        assert torch.equal(weight.codes, stored[name].flatten())
        assert torch.equal(weight.maxima, stored[f"{name}.absmax"])
        assert torch.equal(load.dequantised(name), load.start(name))


def test_a_layer_that_is_stored_with_others_is_its_rows_of_their_bytes(tmp_path):
    # 128 x 128 weights: as many as have one scale of maxima; of k and v, half as many.
    sizes = {**SHAPE, "hidden_size": 128, "num_attention_heads": 8, "num_key_value_heads": 4}
    source = write_folder(tmp_path / "source", shape=Model(family="phi3", tie_word_embeddings=False, **sizes))
    write_nf4(source, tmp_path / "nf4")
    load = ModelLoader(Model(path=str(tmp_path / "nf4")), DDP(), 0, byte_tokenizer().vocab_size, QLoRA())
    names = {kind: f"model.layers.1.self_attn.{kind}_proj.weight" for kind in "qkv"}
    stored = {kind: load.files.packed(name) for kind, name in names.items()}
    assert stored["v"] is None  # it begins in the middle of those that have one scale
    for kind in "qk":
        shape, codes = load.shapes[names[kind]], Packed(*stored[kind])
        assert torch.equal(unpack(codes, shape, torch.float32), load.start(names[kind]))


def test_original_weights_that_are_not_there_are_no_base_of_a_merge(source, tmp_path):
    write_nf4(source, tmp_path / "nf4")
    model, onto_original = Model(path=str(tmp_path / "nf4")), QLoRA(merge_onto=MergeBase.original)
    [problem] = model.validate_adapter(onto_original)
    assert problem.startswith(
        f"adapter.merge_onto=original: model.path={tmp_path / 'nf4'} has bitsandbytes nf4 weights"
    )
    assert list(model.validate_adapter(QLoRA())) == list(Model(path=str(source)).validate_adapter(onto_original)) == []
    [problem] = QLoRA(merge_onto=MergeBase.original, merge=False).problems()
    assert "adapter.merge_onto=original has no effect beside adapter.merge=false" in problem


# ---- a whole run


@pytest.fixture
def go(source, tmp_path, monkeypatch):
    """Runs of one step on a few chats, from the small folder."""
    monkeypatch.chdir(tmp_path)
    chats = write_jsonl(tmp_path / "chats.jsonl", CHATS)
    usual = [
        "pipeline=sft", "data=chat", f"data.train=[{chats}]", f"data.eval=[{chats}]", "data.cache=cache", "batch.size=2",
        "batch.micro=2", "batch.length=64", "steps=1", "schedule.warmup=0", "tracking.wandb.mode=disabled",
        "tracking.tensorboard=false", "evaluation.samples=0", "adapter=qlora", "adapter.rank=4", "run_dir=r",
        f"model.path={source}",
    ]  # fmt: skip
    return lambda *overrides: run(compose([*usual, *overrides]))


def record(folder: str) -> dict:
    return json.loads(Path("r", folder, "onecurve.json").read_text())


def test_a_run_says_both_losses_and_is_exported_again_onto_the_other_base(go, capsys):
    latest = go()
    losses = {"trained": latest["eval/loss"], "original": latest["eval/loss_on_original"]}
    assert losses["trained"] != losses["original"]
    assert record("export")["merge"] == {"onto": "trained", "heldout_loss": losses}
    assert record("adapter")["adapter_base"] == {"folder": record("export")["adapter_base"]["folder"], "format": "nf4"}
    card = Path("r", "adapter", "README.md").read_text()
    assert 'bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True' in card
    first = load_file("r/export/model.safetensors")
    go("adapter.merge_onto=original")
    second = load_file("r/export/model.safetensors")
    assert record("export")["merge"]["onto"] == "original"
    assert Path("r/export-step-00000001").is_dir()
    name = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(first[name], second[name])
    assert "eval/loss_on_original" in Path("r/metrics.jsonl").read_text()
    assert "loss_on_original" in Path("r/report.html").read_text()
    with pytest.raises(ConfigError, match=r"adapter\.rank was 4"):
        go("adapter.rank=8")


def test_an_adapter_that_goes_on_beside_other_weights_says_so(go, source):
    go()
    shutil.copytree("r/adapter", "trained")
    tokens = byte_tokenizer().vocab_size
    for adapter, sentences in ((LoRA(path="trained"), 1), (QLoRA(path="trained"), 0)):
        load = ModelLoader(Model(path=str(source)), DDP(), 0, tokens, adapter)
        said = [line for line in load.remarks() if "was trained beside" in line]
        assert len(said) == sentences
    assert list(LoRA(path="trained").remarks(load.architecture)) == [
        "adapter.path=trained was trained beside nf4 weights and goes on beside plain ones, so that its loss begins "
        "elsewhere than it ended"
    ]
