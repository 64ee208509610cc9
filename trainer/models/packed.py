"""Layers whose frozen weight is held in NF4: how they replace others, and how a model of them is filled and read."""

from __future__ import annotations

import importlib.metadata
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.module import register_module_module_registration_hook

from trainer.config import RunError
from trainer.functional import working_dtype
from trainer.functional.bitsandbytes import PACKAGE
from trainer.models.grouped import GroupedLinear, grouped_product
from trainer.models.linear import BlockLinear, WeightProduct, summed
from trainer.models.nf4 import BlockSpan, FrozenGroupedProduct, FrozenProduct, Packed, packed_sizes, unpack
from trainer.parallel import distributed
from trainer.parallel.cuts import cut
from trainer.parallel.mesh import Axis

log = logging.getLogger(__name__)

USABLE = 0.8
"""Part of the free memory that wide copies may take: keys and values need some, too."""
DIVIDED = ("codes", "maxima")
"""Parameters of a packed weight that ranks divide with it."""
NAMED = 3
"""Matrices that a message names; the others are counted."""


class PackedWeight(nn.Module):
    """A frozen weight in NF4 in the place of the parameter that it stands for, whose name its own parameters' begin with.

    They are parameters, not buffers: those DDP would send at every step, and ZeRO-3 would leave whole on every rank.

    Attributes:
        shape: Of the weight.
        span: What of the weight is here; None = all. Of scales there are all in any case.
        wide: What is here unpacked, while there is such a copy.
        digest: Of the bytes that it was filled with.
    """

    codes: Tensor
    maxima: Tensor
    numbers: Tensor
    wide: Tensor | None
    span: BlockSpan | None = None

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.shape, self.digest = shape, ""
        for name, part in packed_sizes(math.prod(shape))._asdict().items():
            bytes_of_part = torch.empty(part.shape, dtype=torch.uint8)
            self.register_parameter(name, nn.Parameter(bytes_of_part, requires_grad=False))
        self.register_buffer("wide", None, persistent=False)

    @property
    def packed(self) -> Packed:
        """The bytes that are here."""
        return Packed(self.codes, self.maxima, self.numbers)

    @property
    def form(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The shape of what is here, and which blocks that is, as for `unpack`."""
        return (self.shape, ()) if self.span is None else (self.span.shape(self.shape), self.span.blocks(self.shape))

    def cut(self, dim: int, axis: Axis, shards: Axis | None = None) -> None:
        """Leave this rank's part along a dimension, as `cuts.cut` does.

        Raises:
            ValueError: if blocks would be divided.
        """
        self.span = BlockSpan(dim, *axis.span(self.shape[dim]))
        if not self.span.fits(self.shape):
            raise ValueError(f"{axis.size} ranks divide blocks of NF4 of a weight of {self.shape}")
        for name in DIVIDED:
            values = self.laid_out(name, self.get_parameter(name).detach())
            setattr(self, name, nn.Parameter(values, requires_grad=False))
            cut(self, name, values.ndim - 1, axis, shards)

    def laid_out(self, name: str, values: Tensor) -> Tensor:
        """A part of the weight's bytes in the shape in which its parameter is divided."""
        lines = 1 if self.span is None or name not in DIVIDED else self.span.blocks(self.shape)[0]
        return values if lines == 1 else values.view(lines, -1)

    def own(self, weight: Tensor) -> Tensor:
        """What is here of a weight."""
        return (
            weight if self.span is None else weight.narrow(self.span.dim, self.span.first, self.form[0][self.span.dim])
        )

    def unpacked(self, dtype: torch.dtype) -> Tensor:
        """What is here, unpacked."""
        shape, blocks = self.form
        return unpack(self.packed, shape, dtype, blocks)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """``x W^T + b`` in the working format."""
        x = x.to(working_dtype(x))
        if self.wide is not None and self.wide.dtype is x.dtype:
            return F.linear(x, self.wide, bias)
        return FrozenProduct.apply(x, bias, *self.form, *self.packed)  # type: ignore[no-any-return, no-untyped-call]


class PackedStack(PackedWeight):
    """A packed stack ``(E, o, i)`` of experts' matrices."""

    def forward(self, x: Tensor, ends: Tensor) -> Tensor:  # type: ignore[override]
        """Rows ``(S, i)``, sorted by expert and in the working format, times the matrix of their expert.

        ``ends`` ``(E,)``: the row behind the last one of every expert.
        """
        if self.wide is not None and self.wide.dtype is x.dtype:
            return grouped_product(x, self.wide.mT, ends)
        return FrozenGroupedProduct.apply(x, ends, *self.form, *self.packed)  # type: ignore[no-any-return, no-untyped-call]


class PackedLinear(WeightProduct):
    """A frozen linear layer whose weight is packed; its bias is not."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight, self.bias = PackedWeight((base.out_features, base.in_features)), base.bias

    def forward(self, x: Tensor) -> Tensor:
        return summed(partial(self.weight, x), self.bias, self.inputs)


@contextmanager
def packing() -> Iterator[None]:
    """Linear layers become packed ones as soon as a module takes them: the wide model never exists."""
    hook = register_module_module_registration_hook(lambda _, __, layer: _packed(layer))  # type: ignore[arg-type]
    try:
        yield
    finally:
        hook.remove()


def pack_layers(model: nn.Module, wide: Callable[[str], bool]) -> None:
    """Let a model without values have packed layers in the place of all linear ones but those whose name is ``wide``."""
    for name, layer in list(model.named_modules()):
        if (new := _unpacked(layer) if wide(name) else _packed(layer)) is not None and new is not layer:
            setattr(model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2], new)


def _packed(layer: nn.Module | None) -> nn.Module | None:
    """The packed form of a layer that has one; of a stack it is the layer itself, changed."""
    if isinstance(layer, nn.Linear):
        return PackedLinear(layer)
    if isinstance(layer, GroupedLinear) and isinstance(layer.weight, Tensor):
        del layer.weight  # no module takes the place of a parameter
        layer.weight = PackedStack((layer.experts, layer.outputs, layer.inputs))
    return layer


def _unpacked(layer: nn.Module) -> nn.Module:
    if isinstance(layer, PackedLinear):
        return BlockLinear(layer.in_features, layer.out_features, bias=layer.bias is not None)
    if isinstance(layer, GroupedLinear) and isinstance(layer.weight, PackedStack):
        layer.weight = nn.Parameter(torch.empty(layer.experts, layer.outputs, layer.inputs))
    return layer


def packed_weights(model: nn.Module) -> dict[str, PackedWeight]:
    """The packed weights of a model by the names of the parameters that they stand for."""
    return {name: module for name, module in model.named_modules() if isinstance(module, PackedWeight)}


def fill_packed(
    model: nn.Module, packed_of: Callable[[str], Packed], fill: Callable[[nn.Parameter, Tensor], None]
) -> frozenset[str]:
    """Give the packed weights of a new model their bytes, one after the other; gives the names of their parameters.

    ``packed_of``: a weight's bytes by its name. ``fill``: writes values into a parameter, as a strategy does.
    """
    filled = list[str]()
    for name, weight in packed_weights(model).items():
        packed = packed_of(name)
        weight.digest = packed.digest()
        for part, values in packed._asdict().items():
            fill(weight.get_parameter(part), weight.laid_out(part, values))
            filled.append(f"{name}.{part}")
    return frozenset(filled)


def unpacked(
    weights: Iterable[tuple[str, Tensor]], model: nn.Module, dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    """The logical tensors of a model, of its parameters by name: packed ones in ``dtype`` under their weight's name."""
    packed, parts = packed_weights(model), dict[str, Tensor]()
    for name, tensor in weights:
        stem, _, part = name.rpartition(".")
        if stem not in packed:
            yield name, tensor
            continue
        parts[part] = tensor
        if len(parts) == len(Packed._fields):
            yield stem, unpack(Packed(**parts), packed[stem].shape, dtype)
            parts = {}


@contextmanager
def widened(model: nn.Module) -> Iterator[None]:
    """Hold packed weights unpacked, too, where memory allows: token by token, they would be unpacked for each.

    What the model computes is the same.
    """
    weights = {name: weight for name, weight in packed_weights(model).items() if weight.wide is None}
    if not weights:
        yield
        return
    dtype = working_dtype(next(p for p in model.parameters() if p.is_floating_point()))
    if lack := _lack(weights.values(), dtype):
        warn_once(f"sampling unpacks the NF4 weights at every token: {lack}")
        yield
        return
    with _wide(weights, lambda name: weights[name].unpacked(dtype)):
        yield


@contextmanager
def on_original(model: nn.Module, start: Callable[[str], Tensor], dtype: torch.dtype) -> Iterator[str | None]:
    """Let a model compute with the weights that its packed ones were made of, where memory allows; collective.

    Gives why it does not; None where it does. ``start``: a weight's values by name. ``dtype``: what the model computes in.
    """
    weights = packed_weights(model)
    lacks = filter(None, distributed.gather(_lack(weights.values(), dtype)))
    if lack := next(lacks, None):
        yield lack
        return
    with _wide(weights, lambda name: weights[name].own(start(name)).to(weights[name].codes.device, dtype)):
        yield None


def _lack(weights: Iterable[PackedWeight], dtype: torch.dtype) -> str:
    """What is missing of the memory that copies of packed weights need; empty where there is enough."""
    return lack_of_memory([weight.form[0] for weight in weights], dtype, next(iter(weights)).codes.device)


def lack_of_memory(shapes: Iterable[Sequence[int]], dtype: torch.dtype, device: torch.device) -> str:
    """What is missing of the memory that copies of weights need on a device; empty where there is enough."""
    needed, free = dtype.itemsize * sum(math.prod(shape) for shape in shapes), _free_bytes(device)
    return f"a copy needs {needed / 1e9:.1f} GB of {free / 1e9:.1f}" if needed > USABLE * free else ""


@contextmanager
def _wide(weights: Mapping[str, PackedWeight], copied: Callable[[str], Tensor]) -> Iterator[None]:
    """Let packed weights have copies, made by name, for a while."""
    try:
        with torch.no_grad():
            for name, weight in weights.items():
                weight.wide = copied(name)
        yield
    finally:
        for weight in weights.values():
            weight.wide = None


def _free_bytes(device: torch.device) -> float:
    """Memory that can be had on a device, what its allocator caches included."""
    if device.type != "cuda":
        return float(psutil.virtual_memory().available)
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return float(torch.cuda.mem_get_info(device)[0] + cached)


@cache
def warn_once(sentence: str) -> None:
    """Log it, unless that was done before."""
    log.warning("%s", sentence)


@dataclass(frozen=True)
class PackedBase:
    """What a run's frozen weights were packed to, which its checkpoints do not hold: machines may differ in the last step.

    digests: of the bytes of every packed weight by name
    """

    digests: Mapping[str, str]

    @classmethod
    def of(cls, model: nn.Module) -> PackedBase:
        """That of a model, wrapped or not; collective if there is any.

        Raises:
            RunError: if another rank packed it otherwise.
        """
        digests = {name.removeprefix("module."): weight.digest for name, weight in packed_weights(model).items()}
        if digests:
            # Of a model whose stages are on different ranks each has some.
            first: dict[str, tuple[int, str]] = {}
            for rank, other in enumerate(distributed.gather(digests)):
                for name, digest in other.items():
                    before, expected = first.setdefault(name, (rank, digest))
                    if digest != expected:
                        raise RunError(
                            f"rank {rank} packs the model to other NF4 bytes than rank {before}; use machines of one kind, "
                            f"with one version of {PACKAGE}"
                        )
            digests = {name: digest for name, (_, digest) in first.items()}
        return cls(digests)

    def state_dict(self) -> dict[str, Any]:
        return {"digests": dict(self.digests), PACKAGE: importlib.metadata.version(PACKAGE)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Compare with what the run was begun with; a difference is logged."""
        before = state["digests"]
        differing = [name for name, digest in self.digests.items() if before.get(name) != digest]
        if differing and distributed.world().is_main:
            more = f" and {len(differing) - NAMED} more" if len(differing) > NAMED else ""
            log.warning(
                "%d of %d NF4 weights (%s%s) are packed to other bytes here, with %s %s, than where the run was saved, with "
                "%s: training goes on from a slightly different base; continue on a machine of that kind for the same curve",
                len(differing), len(self.digests), ", ".join(differing[:NAMED]), more, PACKAGE,
                importlib.metadata.version(PACKAGE), state[PACKAGE],
            )  # fmt: skip
