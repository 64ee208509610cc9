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
    built = ("expert",)
    yield from (
        f"strategy.{name}={size} is not built yet; use 1" for name, size in shape.axes.items() if name not in built
    )
    if shape.expert > 1:
        yield from _validate_experts(shape.expert, a, packed, auxiliary)


def _validate_experts(
    ranks: int, a: Architecture, packed: Collection[str], auxiliary: Collection[Architecture]
) -> Iterator[str]:
    given = f"strategy.expert={ranks}"
    if not a.experts:
        yield f"{given} divides the experts of a mixture, and the model has none; use 1"
    for experts in sorted({model.experts for model in (a, *auxiliary) if model.experts % ranks}):
        usable = " or ".join(str(n) for n in range(1, experts + 1) if experts % n == 0)
        of = "the model's" if experts == a.experts else "another model's"
        yield f"{given} does not divide {of} {experts} experts; use {usable}"
    if any(".experts." in name for name in packed):
        yield f"{given} divides a layer's experts, which adapter=qlora packs as one; use adapter=lora or strategy.expert=1"
