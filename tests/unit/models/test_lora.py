"""Adapters: the same model at first, PEFT's layout, merging, and what is trained."""

import json

import pytest
import torch

from trainer.batch import Documents
from trainer.config import ConfigError
from trainer.export.peft import export_adapter, merged_policy, merged_weights
from trainer.functional import logits
from trainer.models.dropout import draw_for, dropout
from trainer.models.hf_format import write_model
from trainer.models.load import Model, ModelLoader
from trainer.models.lora import PROJECTIONS, LoRA, LoRALinear, is_adapter
from trainer.models.peft_format import AdapterFolder, Settings, write_adapter
from trainer.optim import AdamW
from trainer.parallel.ddp import DDP
from trainer.parallel.precision import Compute, Precision

VOCABULARY = 50
SHAPE = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 8, "initializer_range": 0.3,
}  # fmt: skip
TOKENS = torch.arange(24).view(2, 12) * 7 % VOCABULARY
PACKED = Documents.from_lengths([5, 7, 12], 2)


class NoTokenizer:
    bos, eos, pad, stops = 1, 2, 0, (2,)

    def save(self, folder) -> None:
        (folder / "tokenizer_config.json").write_text("{}")


def loader(adapter=None, **changes) -> ModelLoader:
    settings = {"adapter": adapter} if adapter else {}
    grow = changes.pop("grow", False)
    return ModelLoader(
        Model(**(changes or SHAPE)),
        DDP(),
        3,
        VOCABULARY + 2 * grow,
        **settings,
        new_tokens=2 * grow,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small model as a Hugging Face folder."""
    where = tmp_path_factory.mktemp("base") / "model"
    load = loader()
    model = load.load()
    write_model(
        where, load.architecture, model.named_parameters(), dtype=torch.float32, shard_bytes=10**9,
        tokenizer=NoTokenizer(), facts={},
    )  # fmt: skip
    return where


def scores(model) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS, PACKED, logits)


def disturbed(model):
    """Adapters that do something: B away from 0."""
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("lora_B.weight"):
                p.normal_(0, 0.05, generator=draw)
    return model


def adapted(load: ModelLoader):
    engine = DDP().wrap(disturbed(load.load()), AdamW(lr=0.1), Precision(Compute.fp32))
    return engine, engine.model


@pytest.mark.parametrize("rslora", [False, True])
def test_a_new_adapter_changes_nothing(folder, rslora):
    plain = loader(path=str(folder)).load()
    assert torch.equal(scores(loader(LoRA(rslora=rslora), path=str(folder)).load()), scores(plain))


def test_an_adapter_adds_its_scaled_product():
    base = torch.nn.Linear(3, 2, bias=False)
    layer = LoRALinear(base, 1, 0.5)
    with torch.no_grad():
        base.weight.copy_(torch.tensor([[1.0, 0, 0], [0, 1, 0]]))
        layer.lora_A.weight.copy_(torch.tensor([[1.0, 1, 1]]))
        layer.lora_B.weight.copy_(torch.tensor([[2.0], [4.0]]))
    # W x = (1, 2); A x = 6; B A x / 2 = (6, 12).
    assert layer(torch.tensor([1.0, 2, 3])).tolist() == [7.0, 14.0]
    layer.active = False
    assert layer(torch.tensor([1.0, 2, 3])).tolist() == [1.0, 2.0]


def test_the_scale_is_alpha_over_the_rank_or_over_its_root():
    assert LoRA(rank=16, alpha=32).scale == 2
    assert LoRA(rank=16, alpha=32, rslora=True).scale == 8


def test_what_is_trained_is_the_formulas_count(folder):
    model = loader(LoRA(rank=4), path=str(folder)).load()
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    # rank * (in + out): q 32+32, k and v 32+16 each, o 32+32, gate and up 32+48 each, down 48+32; two layers.
    assert trained == 4 * (64 + 48 + 48 + 64 + 80 + 80 + 80) * 2


def test_targets_are_chosen_by_name_and_by_pattern(folder):
    def adapted_layers(*targets):
        model = loader(LoRA(targets=list(targets)), path=str(folder)).load()
        return sorted(n.removesuffix(".lora_A.weight") for n, _ in model.named_parameters() if n.endswith("A.weight"))

    assert adapted_layers("q_proj") == [f"model.layers.{n}.self_attn.q_proj" for n in (0, 1)]
    assert adapted_layers("model.layers.1.mlp.*") == [f"model.layers.1.mlp.{n}_proj" for n in ("down", "gate", "up")]


def test_targets_that_match_nothing_are_refused(folder):
    with pytest.raises(ConfigError, match=r"adapter.targets: q_porj matches no linear layer; there are q_proj, k_proj"):
        LoRA(targets=["q_porj"]).validate_architecture(loader(path=str(folder)).architecture)
    with pytest.raises(ConfigError, match=r"adapter.full and adapter.targets both name model.layers.0.mlp.up_proj"):
        LoRA(full=["up_proj"]).validate_architecture(loader(path=str(folder)).architecture)


def test_first_values_depend_on_the_seed_and_the_name_alone(folder):
    first, again = (
        dict(loader(LoRA(targets=t), path=str(folder)).load().named_parameters()) for t in (PROJECTIONS, ["o_proj"])
    )
    name = "model.layers.1.self_attn.o_proj.lora_A.weight"
    assert torch.equal(first[name], again[name])
    # Kaiming-uniform: within 1/sqrt(in) of 0, standard deviation 1/sqrt(3 in).
    assert first[name].abs().max() <= 32**-0.5
    assert first[name].std().item() == pytest.approx((3 * 32) ** -0.5, rel=0.1)  # 512 draws


@pytest.mark.parametrize(
    "adapter",
    [LoRA(rank=4), LoRA(rank=3, alpha=5, rslora=True, targets=["model.layers.1.*", "q_proj"]), LoRA(full=["embed_tokens"])],
    ids=["plain", "rslora-patterns", "full-embedding"],
)  # fmt: skip
def test_peft_opens_the_adapter_and_gives_the_same_logits(folder, tmp_path, adapter):
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    load = loader(adapter, path=str(folder))
    engine, model = adapted(load)
    if adapter.full:
        with torch.no_grad():
            model.model.embed_tokens.weight[3] += 1
    export_adapter(tmp_path / "adapter", engine, load, NoTokenizer(), {"step": 1})
    LoRA(path=str(tmp_path / "adapter")).validate_architecture(load.architecture)
    base = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    with torch.no_grad():
        for row in TOKENS:
            ours = model(row[None], Documents.from_lengths([12], 1), logits)
            torch.testing.assert_close(ours, theirs(row[None]).logits, rtol=0, atol=1e-5)


def test_merged_weights_give_the_same_logits(folder, tmp_path):
    adapter = LoRA(rank=4)
    load = loader(adapter, path=str(folder))
    engine, model = adapted(load)
    merged = merged_weights(engine, load)
    write_model(
        tmp_path / "merged", load.architecture, merged, dtype=torch.float32, shard_bytes=10**9, tokenizer=NoTokenizer(),
        facts={},
    )  # fmt: skip
    again = loader(path=str(tmp_path / "merged")).load()
    torch.testing.assert_close(scores(again), scores(model), rtol=0, atol=1e-5)
    assert not torch.allclose(scores(again), scores(loader(path=str(folder)).load()), atol=1e-2)


@pytest.mark.parametrize("full", [[], ["embed_tokens"]], ids=["adapters", "embedding-too"])
def test_a_sampler_gets_the_policy_with_its_adapters_merged(folder, full):
    adapter = LoRA(rank=4, full=full)
    load = loader(adapter, path=str(folder))
    engine, model = adapted(load)
    with torch.no_grad():
        for parameter in model.model.embed_tokens.parameters():
            parameter += 0.1 * bool(full)
    plain = loader(path=str(folder)).load()
    before = scores(plain)
    with torch.no_grad():
        own = dict(plain.named_parameters())
        policy = dict(merged_policy(engine, adapter))
        assert policy.keys() == own.keys()
        for name, tensor in policy.items():
            own[name].copy_(tensor)
    torch.testing.assert_close(scores(plain), scores(model), rtol=0, atol=1e-5)
    assert not torch.allclose(scores(plain), before, atol=1e-2)


def test_a_run_starts_from_an_adapter_that_peft_wrote(folder, tmp_path):
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    base = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    theirs = peft.get_peft_model(
        base, peft.LoraConfig(r=3, lora_alpha=7, target_modules=["fc1", "q_proj", "up_proj"], init_lora_weights=False)
    ).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    adapter = LoRA(path=str(tmp_path / "theirs"))
    assert list(adapter.problems()) == []
    adapter.validate_architecture(loader(path=str(folder)).architecture)
    assert (adapter.rank, adapter.alpha, adapter.targets) == (3, 7.0, ["fc1", "q_proj", "up_proj"])
    ours = loader(adapter, path=str(folder)).load()
    with torch.no_grad():
        expected = theirs(TOKENS[:1]).logits
        found = ours(TOKENS[:1], Documents.from_lengths([12], 1), logits)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_an_adapter_that_does_not_fit_is_refused_by_name(folder, tmp_path):
    other = loader(LoRA(rank=2, targets=["q_proj"]), **{**SHAPE, "hidden_size": 24})
    engine, _ = adapted(other)
    export_adapter(tmp_path / "other", engine, other, NoTokenizer(), {"step": 1})
    with pytest.raises(ConfigError, match=r"q_proj.lora_A.weight is \(2, 24\) and should be \(2, 32\)"):
        LoRA(path=str(tmp_path / "other")).validate_architecture(loader(path=str(folder)).architecture)
    [absent] = LoRA(path=str(tmp_path / "nothing")).problems()
    assert "holds no adapter_config.json; give a folder that PEFT or Onecurve wrote" in absent


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"use_dora": True}, "use_dora=True, which is not read"),
        ({"peft_type": "IA3"}, "is of type IA3; only LORA is read"),
        ({"target_modules": ".*proj"}, "names target_modules by an expression"),
    ],
)
def test_adapters_of_another_kind_are_refused(tmp_path, change, said):
    write_adapter(tmp_path / "a", Settings(2, 4.0, False, ("q_proj",)), {}, None, NoTokenizer(), {})
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps({**config, **change}))
    [problem] = LoRA(path=str(tmp_path / "a")).problems()
    assert said in problem


def test_the_adapter_is_the_last_step_s_and_that_of_an_earlier_one_is_kept_aside(folder, tmp_path):
    load = loader(LoRA(rank=2), path=str(folder))
    engine, model = adapted(load)
    name = "model.layers.0.self_attn.q_proj.lora_B.weight"
    for step, value in ((2, 1.0), (2, 5.0), (4, 3.0)):
        with torch.no_grad():
            model.model.layers[0].self_attn.q_proj.lora_B.weight.fill_(value)
        export_adapter(tmp_path / "adapter", engine, load, NoTokenizer(), {"step": step})
    values = {f.name: AdapterFolder(f).tensor(name).unique().tolist() for f in tmp_path.iterdir()}
    assert values == {"adapter": [3.0], "adapter-step-00000002": [1.0]}


def test_modules_that_an_adapter_trained_whole_stay_part_of_what_comes_of_it(folder, tmp_path):
    first = loader(LoRA(rank=2, full=["model.norm"]), path=str(folder))
    engine, model = adapted(first)
    with torch.no_grad():
        model.model.norm.weight.fill_(2.0)
    export_adapter(tmp_path / "adapter", engine, first, NoTokenizer(), {"step": 1})
    load = loader(LoRA(path=str(tmp_path / "adapter")), path=str(folder))
    engine = DDP().wrap(load.load(), AdamW(lr=0.1), Precision(Compute.fp32))
    assert torch.equal(dict(merged_weights(engine, load))["model.norm.weight"], torch.full((32,), 2.0))


def test_frozen_matrices_are_held_in_the_compute_format_and_merged_from_the_folder(folder):
    load = loader(LoRA(), path=str(folder))
    load.precision = Precision(Compute.bf16)
    engine, model = adapted(load)
    kinds = {n: p.dtype for n, p in model.named_parameters()}
    narrow = {n for n, kind in kinds.items() if kind is torch.bfloat16}
    assert narrow == {n for n in kinds if n.endswith("_proj.weight")}
    merged = dict(merged_weights(engine, load))
    delta = model.model.layers[0].mlp.up_proj
    expected = load.start("model.layers.0.mlp.up_proj.weight") + 2 * delta.lora_B.weight @ delta.lora_A.weight
    assert torch.equal(merged["model.layers.0.mlp.up_proj.weight"], expected)


def test_new_tokens_of_a_padded_vocabulary_begin_as_the_mean_of_the_known_ones(folder):
    # The folder has rows for 50 tokens, of which the tokenizer knew 40; 3 are added.
    load = ModelLoader(Model(path=str(folder)), DDP(), 3, 43, LoRA(), new_tokens=3)
    model, before = load.load(), loader(path=str(folder)).start("model.embed_tokens.weight")
    table = model.model.embed_tokens.weight
    assert table.requires_grad
    torch.testing.assert_close(table[40:43].detach(), before[:40].mean(0).expand(3, -1))
    assert torch.equal(table[:40], before[:40])
    assert torch.equal(table[43:], before[43:])


def test_new_tokens_get_rows_that_are_the_mean_and_are_trained(folder):
    load = loader(LoRA(), path=str(folder), grow=True)
    model = load.load()
    table = model.model.embed_tokens.weight
    assert table.shape == (VOCABULARY + 2, 32)
    torch.testing.assert_close(table[VOCABULARY:].detach(), table[:VOCABULARY].mean(0).expand(2, -1).detach())
    assert {n for n, p in model.named_parameters() if p.requires_grad and not is_adapter(n)} == {
        "model.embed_tokens.weight"
    }


def test_dropout_acts_in_training_only_and_differs_from_step_to_step(folder):
    model = disturbed(loader(LoRA(dropout=0.5), path=str(folder)).load())
    found = []
    for step in (1, 2):
        draw_for((0, step), [4, 5])
        found.append(scores(model.train()))
    assert not torch.equal(*found)
    assert torch.equal(scores(model.eval()), scores(disturbed(loader(LoRA(), path=str(folder)).load())))


def test_what_is_dropped_depends_on_the_row_and_not_on_its_neighbours():
    x = torch.ones(2, 50, 20)
    draw_for((0, 1), [4, 5])
    both = dropout(x, 0.25, "q")
    assert torch.equal(dropout(x.view(1, 100, 20), 0.25, "q"), both.view(1, 100, 20))  # rows end to end
    draw_for((0, 1), [5])
    assert torch.equal(dropout(x[:1], 0.25, "q")[0], both[1])
    assert not torch.equal(both[0], both[1])
    assert not torch.equal(dropout(x[:1], 0.25, "k"), both[1:])
    # Of 2,000 draws a quarter is 0, within four standard deviations (sqrt(2000 * 3 / 16) = 19); the rest is 4/3.
    assert (both == 0).sum().item() == pytest.approx(500, abs=78)
    assert both.max().item() == pytest.approx(4 / 3)
