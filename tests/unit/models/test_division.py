"""What a mesh cannot divide is refused in a sentence with the remedy, before any rank exists."""

from typing import Any

import pytest

from tests.mixtures import SMALL, small
from trainer.models.architecture import Architecture, Layer, Rope
from trainer.models.division import validate_mesh
from trainer.models.linear import FakeQuantizer
from trainer.models.qlora import QLoRA
from trainer.parallel.fsdp import FSDP
from trainer.parallel.mesh import MeshShape

PLAIN = small(experts=0, layers=())


@pytest.mark.parametrize(
    ("a", "auxiliary", "sentence"),
    [
        (PLAIN, (), "strategy.expert=2 divides the experts of a mixture, and the model has none; use 1"),
        (small(experts=9), (), "strategy.expert=2 does not divide the model's 9 experts; use 1 or 3 or 9"),
        (small(), (small(experts=9),), "strategy.expert=2 does not divide another model's 9 experts; use 1 or 3 or 9"),
    ],
)
def test_experts_that_ranks_cannot_divide_are_refused(
    a: Architecture, auxiliary: tuple[Architecture, ...], sentence: str
):
    assert list(validate_mesh(MeshShape(expert=2), a, 16, auxiliary=auxiliary)) == [sentence]
    assert list(validate_mesh(MeshShape(), a, 16, auxiliary=auxiliary)) == []


def test_blocks_whose_experts_are_elsewhere_are_not_compiled():
    assert list(FSDP().validate_compiled()) == []
    for strategy in (FSDP(expert=2), FSDP(tensor=2)):
        [sentence] = strategy.validate_compiled()
        assert sentence.endswith("use model.compile=false")


def test_tokens_are_divided_among_ranks_that_divide_the_query_heads():
    twelve = small(experts=0, layers=(), num_attention_heads=12, num_key_value_heads=3)
    assert list(validate_mesh(MeshShape(sequence=4), twelve, 16)) == []
    assert list(validate_mesh(MeshShape(sequence=8), twelve, 16, auxiliary=(PLAIN,))) == [
        "strategy.sequence=8 does not divide the model's 12 query heads; use 1 or 2 or 3 or 4 or 6 or 12",
        "strategy.sequence=8 does not divide another model's 4 query heads; use 1 or 2 or 4",
    ]


def shape(**features: Any) -> Architecture:
    """Two dense layers of 12 heads of 8."""
    sizes = {"num_attention_heads": 12, "num_key_value_heads": 4, "intermediate_size": 192, "hidden_size": 64}
    layers = (Layer(rope=Rope(10000.0)),) * 2
    return Architecture(**{**SMALL, "experts": 0, "layers": layers, **sizes, **features})


def refusals(tensor: int, **features: Any) -> list[str]:
    return list(validate_mesh(MeshShape(tensor=tensor), shape(**features), 32))


@pytest.mark.parametrize("tensor", [1, 2, 4, 12])
def test_ranks_divide_key_heads_or_share_them(tensor):
    assert refusals(tensor) == []


def test_sizes_that_do_not_divide_are_named_with_those_that_do():
    assert refusals(5) == [
        f"strategy.tensor=5 {rule} of a layer{end}; use 1, 2 or 4"
        for rule, end in [
            ("does not divide the 12 query heads", ""),
            ("does not divide the 192 columns of the MLP", ""),
            ("neither divides the 4 key heads", " nor is a multiple of them"),
        ]
    ]


def test_key_heads_that_lie_across_ranks_are_refused():
    # 12 queries share 6 keys in twos: of 4 ranks the first would have queries 0, 1, 2 of keys 0, 0, 1.
    assert refusals(4, num_key_value_heads=6) == [
        "strategy.tensor=4 neither divides the 6 key heads of a layer nor is a multiple of them; use 1, 2 or 3"
    ]


@pytest.mark.parametrize(
    ("features", "rule"),
    [
        ({"layers": (Layer(delta=True), Layer())}, "cannot divide the heads of a gated delta rule"),
        ({"layers": (Layer(sparse=True),), "experts": 5}, "does not divide the 5 experts of a layer"),
        ({"layer_norm": True, "qk_norm": "width"}, "cannot divide a LayerNorm over all heads at once"),
    ],
)
def test_layers_that_cannot_be_divided_are_named(features, rule):
    assert refusals(2, **features) == [f"strategy.tensor=2 {rule}; use 1"]


def test_scales_across_ranks_are_refused():
    def lacks(tensor: int, *grid: int) -> list[str]:
        quantizer = FakeQuantizer(*grid)
        return list(validate_mesh(MeshShape(tensor=tensor), shape(head_dim=16), 32, quantizer=quantizer))

    assert lacks(1, 8, 0) == []
    # 192 inputs of o_proj and down_proj are 96 a rank: three groups of 32, one and a half of 64.
    assert lacks(2, 4, 32) == []
    of = "and strategy.tensor=2 divides those of model.layers.0.self_attn.o_proj.weight; use strategy.tensor=1"
    assert lacks(2, 4, 64) == [f"qat.bits=4 rounds groups of 64 inputs by one scale, {of}"]
    assert lacks(2, 8, 0) == [f"qat.bits=8 rounds whole rows by one scale, {of}"]


def test_packed_weights_whose_blocks_ranks_would_divide_are_refused():
    def lacks(tensor: int, **sizes: int) -> list[str]:
        a = shape(head_dim=16, **sizes)
        return list(validate_mesh(MeshShape(tensor=tensor), a, 32, QLoRA().packed(a)))

    # 192 inputs of o_proj and down_proj are three blocks of 64. Of 256 each of 4 ranks has one.
    assert lacks(2, num_attention_heads=16, intermediate_size=256) == []
    assert lacks(4, num_attention_heads=16, intermediate_size=256) == []
    assert lacks(4, num_attention_heads=16) == [
        "strategy.tensor=4 would divide blocks of 64 weights, which share a scale in NF4, of "
        "model.layers.0.mlp.down_proj.weight (64 x 192); use strategy.tensor=1, or adapter=lora"
    ]
    # Outputs are rows of 66, of which 32 end with a block: 16 of a key head do not, unless ranks share them.
    [sentence] = lacks(4, hidden_size=66, num_attention_heads=16, intermediate_size=256)
    assert "self_attn.k_proj.weight (64 x 66); use strategy.tensor=1 or 2, or adapter=lora" in sentence
    assert lacks(4, hidden_size=66, num_attention_heads=16, num_key_value_heads=2, intermediate_size=256) == []
