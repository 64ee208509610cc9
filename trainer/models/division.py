"""What of a model can be divided along the axes of a mesh."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from trainer.models.architecture import Architecture
from trainer.parallel.mesh import MeshShape


def validate_mesh(
    shape: MeshShape,
    a: Architecture,
    length: int,
    packed: Collection[str] = (),
    auxiliary: Collection[Architecture] = (),
) -> Iterator[str]:
    """One sentence for everything of a model, in rows of ``length`` tokens, that a mesh cannot divide.

    ``packed``: names of weights that are held in four bits. ``auxiliary``: models that are divided on the same mesh.
    """
    built = ("sequence", "expert")
    yield from (
        f"strategy.{name}={size} is not built yet; use 1" for name, size in shape.axes.items() if name not in built
    )
    if shape.sequence > 1:
        yield from _validate_heads(shape, a, auxiliary)
    if shape.expert > 1:
        yield from _validate_experts(shape.expert, a, packed, auxiliary)


def _validate_experts(
    ranks: int, a: Architecture, packed: Collection[str], auxiliary: Collection[Architecture]
) -> Iterator[str]:
    given = f"strategy.expert={ranks}"
    if not a.experts:
        yield f"{given} divides the experts of a mixture, and the model has none; use 1"
    for experts in sorted({model.experts for model in (a, *auxiliary) if model.experts % ranks}):
        of = "the model's" if experts == a.experts else "another model's"
        yield f"{given} does not divide {of} {experts} experts; use {_divisors(experts)}"
    if any(".experts." in name for name in packed):
        yield f"{given} divides a layer's experts, which adapter=qlora packs as one; use adapter=lora or strategy.expert=1"


def _validate_heads(shape: MeshShape, a: Architecture, auxiliary: Collection[Architecture]) -> Iterator[str]:
    """Of those that a rank of the tensor axis has, ranks of the sequence axis compute some for all tokens."""
    for total in dict.fromkeys(model.num_attention_heads for model in (a, *auxiliary)):
        heads = total // shape.tensor
        if heads % shape.sequence:
            of = "the model's" if total == a.num_attention_heads else "another model's"
            each = "" if shape.tensor == 1 else f" on each of {shape.tensor} tensor ranks"
            yield f"strategy.sequence={shape.sequence} does not divide {of} {heads} query heads{each}; use {_divisors(heads)}"


def _divisors(number: int) -> str:
    return " or ".join(str(n) for n in range(1, number + 1) if number % n == 0)
