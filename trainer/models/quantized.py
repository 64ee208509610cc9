"""Weights that a folder stores in few bits, each as several tensors: how they lie in its files, and what they stand for."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from trainer.models import bnb_format, compressed_format
from trainer.models.bnb_format import Triple

Settings = Mapping[str, Any]
"""The ``quantization_config`` of a ``config.json``."""


@dataclass(frozen=True)
class Packing:
    """How a linear layer's weight is stored in few bits.

    ``label``: as messages name it.
    ``mark``: the ending, behind the layer's name, of a tensor that no other layer has.
    ``parts``: the endings of what belongs to it, too.
    ``load``: makes float32 numbers of the tensors by ending.
    ``shaped``: the ending of the tensor that tells the shape, and how; None = the shape of ``weight`` itself.
    ``packed``: codes, maxima and numbers as `nf4.pack` gives them; None where they are others.
    """

    label: str
    mark: str
    parts: tuple[str, ...]
    load: Callable[[Mapping[str, Tensor], Settings], Tensor]
    shaped: tuple[str, Callable[[Tensor], tuple[int, ...]]] | None = None
    packed: Callable[[Mapping[str, Tensor]], Triple | None] = lambda tensors: None


def _four_bit(kind: str) -> Packing:
    state = bnb_format.STATE + kind
    return Packing(
        f"bitsandbytes {kind}", state, bnb_format.PARTS, lambda tensors, _: bnb_format.four_bit(tensors),
        (state, bnb_format.shape_of), bnb_format.as_packed,
    )  # fmt: skip


METHODS: dict[str, tuple[Packing, ...]] = {
    "bitsandbytes": (
        _four_bit("nf4"),
        _four_bit("fp4"),
        Packing("bitsandbytes int8", "SCB", ("weight", "weight_format"), lambda t, _: bnb_format.eight_bit(t)),
    ),
    "compressed-tensors": (
        Packing(
            "compressed-tensors' packed integers", "weight_packed", ("weight_scale", "weight_shape"),
            compressed_format.dequantised, ("weight_shape", lambda shape: tuple(shape.tolist())),
        ),
        Packing("compressed-tensors' integers", "weight_scale", ("weight",), compressed_format.dequantised),
    ),
}  # fmt: skip
"""The ways that are read, by ``quant_method``; of two that fit a layer the first holds."""


def method_of(settings: Any) -> str | None:
    """The ``quant_method``; early releases of ``transformers`` left it out for bitsandbytes."""
    if not isinstance(settings, Mapping):
        return None
    loads = any(settings.get(key) for key in ("load_in_4bit", "load_in_8bit"))
    method = settings.get("quant_method", "bitsandbytes" if loads else None)
    return method if isinstance(method, str) else None


def unread(settings: Any) -> str | None:
    """What of a method that is read cannot be, by its settings, in words; None where all can."""
    return compressed_format.unread(settings) if method_of(settings) == "compressed-tensors" else None


@dataclass(frozen=True)
class QuantizedWeight:
    """A weight that is stored as several tensors. ``names``: of each by its ending. ``settings``: the folder's."""

    packing: Packing
    names: Mapping[str, str]
    settings: Settings

    @property
    def main(self) -> str:
        """The tensor that tells such a weight from others."""
        return self.names[self.packing.mark]

    def shape(self, shape: Callable[[str], tuple[int, ...]], tensor: Callable[[str], Tensor]) -> tuple[int, ...]:
        """The weight's own shape; ``shape``, ``tensor``: of a stored tensor, by its name."""
        if self.packing.shaped is None:
            return shape(self.names["weight"])
        part, read = self.packing.shaped
        return read(tensor(self.names[part]))

    def tensor(self, tensor: Callable[[str], Tensor]) -> Tensor:
        """The numbers, float32.

        Raises:
            ValueError: if the parts do not fit each other.
        """
        return self.packing.load(self._parts(tensor), self.settings)

    def packed(self, tensor: Callable[[str], Tensor]) -> Triple | None:
        """Codes, maxima and numbers as `nf4.pack` gives them; None where it is stored in another way."""
        return self.packing.packed(self._parts(tensor))

    def _parts(self, tensor: Callable[[str], Tensor]) -> dict[str, Tensor]:
        return {part: tensor(name) for part, name in self.names.items()}


def quantized_weights(names: Collection[str], settings: Any) -> Iterator[tuple[str, QuantizedWeight]]:
    """Weights that are stored in few bits, by name, among the ``names`` of a folder's tensors."""
    taken = set[str]()
    for packing in METHODS.get(method_of(settings) or "", ()):
        for name in names:
            stem = name.removesuffix(packing.mark)
            if stem == name or (stem and not stem.endswith(".")) or name in taken:
                continue
            parts = {part: stem + part for part in (packing.mark, *packing.parts) if stem + part in names}
            taken |= {*parts.values()}
            yield f"{stem}weight", QuantizedWeight(packing, parts, settings)
