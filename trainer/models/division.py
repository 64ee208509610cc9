"""What of a model can be divided along the axes of a mesh."""

from __future__ import annotations

from collections.abc import Iterator

from trainer.models.architecture import Architecture
from trainer.parallel.mesh import MeshShape


def validate_mesh(shape: MeshShape, a: Architecture, length: int) -> Iterator[str]:
    """One sentence for everything of a model, in rows of ``length`` tokens, that a mesh cannot divide."""
    yield from (f"strategy.{name}={size} is not built yet; use 1" for name, size in shape.axes.items())
