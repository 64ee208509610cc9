"""Quantisation-aware training: what an integer export will round is rounded in every forward, and learns to be."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

from torch import nn

from trainer.config import ConfigError, Node, schema, setting
from trainer.models.adapter import Adapter
from trainer.models.architecture import Architecture
from trainer.models.int_grid import GROUPS, group_size
from trainer.models.linear import BlockLinear, FakeQuantizer
from trainer.models.lora import LoRALinear
from trainer.models.sizes import linear_widths

EXPORTS = {4: "int4-rtn", 8: "int8"}
"""The export format whose weights are those that were trained, by bits."""


@schema("qat")
@dataclass
class QAT(Node):
    """Forwards round the matrices of the blocks to the grid of an integer export (docs/quantization.md)."""

    bits: int | None = setting(None, "4: as the export int4-rtn, 8: as the weights of int8; null = nothing is rounded")
    start: int = setting(0, "the step from which it rounds; 0 = evaluations before the first one, too", least=0)

    def problems(self) -> Iterator[str]:
        if self.bits not in (None, *EXPORTS):
            yield f"qat.bits={self.bits} is the grid of no export; use {', '.join(map(str, EXPORTS))} or null"
        if self.bits is None and self.start:
            yield f"qat.start={self.start} has no effect without qat.bits; leave it out, or set qat.bits=4"

    def validate_run(self, adapter: Adapter, steps: int | None, dtype: str, formats: Collection[str]) -> Iterator[str]:
        """One sentence for everything about a run that does not work with it.

        ``steps``: of the run, as far as they are set. ``dtype``: the number format of the export. ``formats``: further ones.
        """
        if self.bits is None:
            return
        yield from adapter.validate_rounded()
        if steps is not None and self.start > steps:
            yield f"qat.start={self.start} is behind the last step (steps={steps}), so nothing is rounded; use a lower one"
        for name in formats:
            if name.startswith(f"int{self.bits}") and name != EXPORTS[self.bits]:
                yield (
                    f"export.formats: {name} moves weights away from where qat.bits={self.bits} trained them to be rounded; "
                    f"use {EXPORTS[self.bits]}"
                )
        if dtype == "fp16":
            yield (
                f"export.dtype=fp16 rounds the weights before {EXPORTS[self.bits]} does, so that it is not what qat.bits="
                f"{self.bits} trained; use export.dtype=fp32 or bf16"
            )

    def fake_quantizer(self, architecture: Architecture) -> FakeQuantizer | None:
        """What rounds the models of a run; None where nothing does.

        Raises:
            ConfigError: if there is no grid for the model.
        """
        if self.bits is None:
            return None
        if architecture.experts:
            raise ConfigError([f"qat.bits={self.bits}: {EXPORTS[self.bits]} cannot hold experts; leave qat out"])
        widths = linear_widths(architecture)
        group = group_size(widths.values(), self.bits)
        if group is None:
            name, width = next((n, w) for n, w in widths.items() if w % GROUPS[-1])
            rule = f"qat.bits=4 rounds groups of {GROUPS[-1]} inputs, and {name} has {width}"
            raise ConfigError([f"{rule}; use widths that are multiples of {GROUPS[-1]}, or qat.bits=8"])
        return FakeQuantizer(self.bits, group, self.start)

    def remarks(self) -> Iterator[str]:
        """A sentence on what it means for the run's exports."""
        if self.bits is not None:
            since = f"from step {self.start} on" if self.start else "in every forward"
            yield (
                f"qat.bits={self.bits}: the blocks' matrices are rounded {since}, in evaluation and sampling too; export/ "
                f"has them unrounded, its {EXPORTS[self.bits]} as they were evaluated"
            )


def install(model: nn.Module, quantizer: FakeQuantizer) -> None:
    """Let all linear layers of a model's blocks round their weights by it."""
    for _, module in _rounded_layers(model):
        module.fake_quantizer = quantizer


def _rounded_layers(model: nn.Module) -> Iterator[tuple[str, BlockLinear | LoRALinear]]:
    for name, module in model.named_modules():
        if isinstance(module, BlockLinear | LoRALinear):
            yield name, module
