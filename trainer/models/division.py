"""What of a model can be divided along the axes of a mesh."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from types import MappingProxyType

from trainer.models.architecture import Architecture
from trainer.models.linear import FakeQuantizer
from trainer.models.nf4 import BLOCK, BlockSpan
from trainer.models.sizes import linear_widths
from trainer.parallel.mesh import MeshShape

INPUTS = ("o_proj.weight", "down_proj.weight")
"""Matrices whose inputs ranks divide; of the others it is the outputs, of stacks the matrices."""
NOTHING: Mapping[str, Sequence[int]] = MappingProxyType({})


def validate_mesh(
    shape: MeshShape,
    a: Architecture,
    length: int,
    packed: Mapping[str, Sequence[int]] = NOTHING,
    auxiliary: Collection[Architecture] = (),
    quantizer: FakeQuantizer | None = None,
) -> Iterator[str]:
    """One sentence for everything of a model, in rows of ``length`` tokens, that a mesh cannot divide.

    ``packed``: shapes of weights that are held in four bits, by name. ``auxiliary``: models that are divided on the same
    mesh. ``quantizer``: what rounds weights in the forward; None = nothing.
    """
    if shape.tensor > 1:
        yield from dict.fromkeys(rule for model in (a, *auxiliary) for rule in _validate_tensor(shape.tensor, model))
        yield from _validate_layers(shape.tensor, a, quantizer)
        yield from _validate_packed(shape.tensor, a, packed)
    if shape.sequence > 1:
        yield from _validate_heads(shape, a, auxiliary)
    if shape.expert > 1:
        yield from _validate_experts(shape.expert, a, auxiliary)
    if shape.pipeline > 1:
        yield from _validate_stages(shape.pipeline, a)


def _validate_tensor(ranks: int, a: Architecture) -> Iterator[str]:
    rules = list(_undivided(ranks, a))
    usable = [str(size) for size in range(1, ranks) if not list(_undivided(size, a))]
    remedy = " or ".join(filter(None, [", ".join(usable[:-1]), *usable[-1:]]))
    yield from (f"strategy.tensor={ranks} {rule}; use {remedy}" for rule in rules)


def _undivided(ranks: int, a: Architecture) -> Iterator[str]:
    """What of a model so many ranks cannot divide, each the end of a sentence."""
    if ranks == 1:
        return
    counts = {"query heads": a.num_attention_heads}
    if not all(layer.sparse for layer in a.layers):
        counts["columns of the MLP"] = a.intermediate_size
    if any(layer.sparse for layer in a.layers):
        counts |= {"experts": a.experts, "columns of the shared expert": a.shared_size}
    yield from (f"does not divide the {count} {what} of a layer" for what, count in counts.items() if count % ranks)
    groups = a.num_key_value_heads
    if groups % ranks and ranks % groups:
        yield f"neither divides the {groups} key heads of a layer nor is a multiple of them"
    if any(layer.delta for layer in a.layers):
        yield "cannot divide the heads of a gated delta rule"
    if a.layer_norm and a.qk_norm == "width":
        yield "cannot divide a LayerNorm over all heads at once"


def _validate_packed(ranks: int, a: Architecture, packed: Mapping[str, Sequence[int]]) -> Iterator[str]:
    """Of a matrix whose blocks would be divided; what divides no matrix is no matter of blocks."""
    lacking = [name for name, shape in packed.items() if not _divides_between_blocks(ranks, a, name, shape)]
    if not lacking:
        return
    usable = [
        str(n)
        for n in range(1, ranks)
        if not list(_undivided(n, a)) and all(_divides_between_blocks(n, a, *weight) for weight in packed.items())
    ]
    sizes = " x ".join(map(str, packed[lacking[0]]))
    yield (
        f"strategy.tensor={ranks} would divide blocks of {BLOCK} weights, which share a scale in NF4, of {lacking[0]} "
        f"({sizes}); use strategy.tensor={' or '.join(usable)}, or adapter=lora"
    )


def _divides_between_blocks(ranks: int, a: Architecture, name: str, shape: Sequence[int]) -> bool:
    if name.endswith(("k_proj.weight", "v_proj.weight")) and a.num_key_value_heads % ranks:
        return True  # each rank has them all
    dim = int(name.endswith(INPUTS) and len(shape) == 2)
    return bool(shape[dim] % ranks) or BlockSpan(dim, 0, shape[dim] // ranks).fits(shape)


def _validate_layers(ranks: int, a: Architecture, quantizer: FakeQuantizer | None) -> Iterator[str]:
    if quantizer is None:
        return
    divided = {n: width for n, width in linear_widths(a).items() if n.endswith(INPUTS)}
    lacking = [name for name, width in divided.items() if not quantizer.group or width // ranks % quantizer.group]
    if lacking:
        group = f"groups of {quantizer.group} inputs" if quantizer.group else "whole rows"
        rule = f"rounds {group} by one scale, and strategy.tensor={ranks} divides those of {lacking[0]}"
        yield f"qat.bits={quantizer.bits} {rule}; use strategy.tensor=1"


def _validate_experts(ranks: int, a: Architecture, auxiliary: Collection[Architecture]) -> Iterator[str]:
    given = f"strategy.expert={ranks}"
    if not a.experts:
        yield f"{given} divides the experts of a mixture, and the model has none; use 1"
    for experts in sorted({model.experts for model in (a, *auxiliary) if model.experts % ranks}):
        of = "the model's" if experts == a.experts else "another model's"
        yield f"{given} does not divide {of} {experts} experts; use {_divisors(experts)}"


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


def mesh_remarks(shape: MeshShape, a: Architecture) -> Iterator[str]:
    """What is to be said at the start of a run of how a mesh divides a model."""
    layers, stages = len(a.layers), shape.pipeline
    if layers % stages:
        each = f"{layers // stages} or {layers // stages + 1}"
        yield f"strategy.pipeline={stages} divides {layers} layers unevenly, {each} a stage; all wait for the longest"


def _validate_stages(stages: int, a: Architecture) -> Iterator[str]:
    if stages > (layers := len(a.layers)):
        yield f"strategy.pipeline={stages} gives some ranks none of the {layers} layers; use at most {layers}"
