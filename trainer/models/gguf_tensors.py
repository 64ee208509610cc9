"""The decoder's parameters as tensors of a GGUF file, and back: names, fused and split ones, orders of rows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.models.architecture import Architecture
from trainer.models.family import split_layer
from trainer.models.gguf_architectures import GATE_UP, HALVES, MODULES, OUTER, GgufArchitecture

BARE = {"self_attn.sinks": "weight", "mlp.router.balance": "bias"}
"""Parameters of ours that are no module's, and what the file calls them the module's."""
TURNED = ("self_attn.q_proj.", "self_attn.k_proj.")
NEVER_ROUNDED = ("norm", "_gate_inp", "attn_sinks", "exp_probs_b")
"""In names of what stays in float32, whatever the format."""


@dataclass(frozen=True)
class GgufTensor:
    """What one tensor of a file is: ``ours``, one below the other; or a ``half`` of the outputs of one of ours."""

    ours: tuple[str, ...]
    half: int | None = None


def tensors_of(row: GgufArchitecture, parameters: Iterable[str]) -> dict[str, GgufTensor]:
    """The tensors that a file has for ``parameters`` of ours, by their names there, in our order."""
    fused = {module: (theirs, modules) for theirs, modules in row.fused.items() for module in modules}
    tensors: dict[str, GgufTensor] = {}
    for name in parameters:
        start, rest = split_layer(name)
        module, _, kind = rest.rpartition(".")
        if not start:
            tensors[f"{OUTER[module]}.{kind}"] = GgufTensor((name,))
            continue
        if rest in BARE:
            module, kind = rest, BARE[rest]
        begin = f"blk.{start.split('.')[2]}."
        if module == GATE_UP:
            tensors |= {f"{begin}{theirs}.{kind}": GgufTensor((name,), n) for n, theirs in enumerate(HALVES)}
        elif module in fused:
            theirs, modules = fused[module]
            tensors[f"{begin}{theirs}.{kind}"] = GgufTensor(tuple(f"{start}{each}.{kind}" for each in modules))
        else:
            tensors[f"{begin}{row.modules.get(module, MODULES[module])}.{kind}"] = GgufTensor((name,))
    return tensors


def stored_tensor(row: GgufArchitecture, a: Architecture, tensor: GgufTensor, ours: Sequence[Tensor]) -> Tensor:
    """A tensor of a file, of our parameters that it is made of."""
    made = [_as_stored(row, a, name, values) for name, values in zip(tensor.ours, ours, strict=True)]
    if tensor.half is not None:
        return made[0].chunk(2, 1)[tensor.half]
    return made[0] if len(made) == 1 else torch.cat(made)


def stored_shapes(
    row: GgufArchitecture, a: Architecture, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor of a file, by the ``shapes`` of our parameters."""
    empty = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    tensors = tensors_of(row, shapes)
    return {
        name: tuple(stored_tensor(row, a, tensor, [empty[each] for each in tensor.ours]).shape)
        for name, tensor in tensors.items()
    }


def parameter_of(
    row: GgufArchitecture,
    a: Architecture,
    name: str,
    parts: Sequence[tuple[GgufTensor, Tensor]],
    shapes: Mapping[str, tuple[int, ...]],
) -> Tensor:
    """Our parameter ``name``, of the tensors of a file that hold it; ``shapes``: of all parameters of ours."""
    tensor, values = parts[0]
    if tensor.half is not None:
        values = torch.cat([part for _, part in sorted(parts, key=lambda each: each[0].half or 0)], 1)
    elif len(tensor.ours) > 1:
        values = torch.split(values, [shapes[each][0] for each in tensor.ours])[tensor.ours.index(name)]
    return _as_ours(row, a, name, values).reshape(shapes[name])


def holders(tensors: Mapping[str, GgufTensor]) -> dict[str, list[str]]:
    """The names of the tensors that hold each parameter of ours."""
    names: dict[str, list[str]] = {}
    for theirs, tensor in tensors.items():
        for ours in tensor.ours:
            names.setdefault(ours, []).append(theirs)
    return names


def is_matrix(name: str, shape: Sequence[int]) -> bool:
    """Whether a tensor of a file is one of those that a format rounds."""
    return name.endswith(".weight") and len(shape) > 1 and not any(part in name for part in NEVER_ROUNDED)


def _as_stored(row: GgufArchitecture, a: Architecture, name: str, values: Tensor) -> Tensor:
    if _is_offset(a, name):
        return values.float() + a.norm_offset
    if name.endswith("mlp.shared_gate.weight"):
        return values[0]
    if _is_reordered(row, a, name):
        # Rows that turn together are half a head apart here, neighbours there; or the other way round.
        return _reordered(values, a.head_dim, (2, a.head_dim // 2) if row.interleaved else (a.head_dim // 2, 2))
    return values


def _as_ours(row: GgufArchitecture, a: Architecture, name: str, values: Tensor) -> Tensor:
    if _is_offset(a, name):
        return values.float() - a.norm_offset
    if _is_reordered(row, a, name):
        return _reordered(values, a.head_dim, (a.head_dim // 2, 2) if row.interleaved else (2, a.head_dim // 2))
    return values


def _is_offset(a: Architecture, name: str) -> bool:
    """llama.cpp's norms multiply by their weight alone."""
    return a.norm_offset != 0.0 and name.endswith("norm.weight")


def _is_reordered(row: GgufArchitecture, a: Architecture, name: str) -> bool:
    return row.interleaved != a.interleaved_rope and any(part in name for part in TURNED)


def _reordered(values: Tensor, size: int, split: tuple[int, int]) -> Tensor:
    heads = values.shape[0] // size
    return values.reshape(heads, *split, *values.shape[1:]).transpose(1, 2).reshape(values.shape)
