"""What a mesh cannot divide is refused in a sentence with the remedy, before any rank exists."""

import pytest

from tests.mixtures import small
from trainer.models.architecture import Architecture
from trainer.models.division import validate_mesh
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


def test_experts_that_are_packed_as_one_are_not_divided():
    packed = QLoRA().packed(small())
    assert list(validate_mesh(MeshShape(expert=2), small(), 16, packed, (PLAIN,))) == [
        "strategy.expert=2 divides a layer's experts, which adapter=qlora packs as one; use adapter=lora or strategy.expert=1"
    ]


def test_blocks_whose_experts_are_elsewhere_are_not_compiled():
    assert list(FSDP().validate_compiled()) == []
    [sentence] = FSDP(expert=2).validate_compiled()
    assert sentence.endswith("use model.compile=false")


def test_tokens_are_divided_among_ranks_that_divide_the_query_heads():
    twelve = small(experts=0, layers=(), num_attention_heads=12, num_key_value_heads=3)
    assert list(validate_mesh(MeshShape(sequence=4), twelve, 16)) == []
    assert list(validate_mesh(MeshShape(sequence=8), twelve, 16, auxiliary=(PLAIN,))) == [
        "strategy.sequence=8 does not divide the model's 12 query heads; use 1 or 2 or 3 or 4 or 6 or 12",
        "strategy.sequence=8 does not divide another model's 4 query heads; use 1 or 2 or 4",
    ]
