"""Low-rank adapters of stacked experts, and how PEFT lays them out."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

from torch import Tensor, nn

from trainer.models.grouped import Assignment, GroupedLinear, grouped_linear

PLACE = re.compile(r"(?P<experts>.*\.mlp\.experts)\.(?P<layer>gate_up_proj|down_proj)\.(?P<side>lora_[AB])\.weight")
"""Names of the adapters of experts."""
INNER = {"gate_up_proj": ".base_layer", "down_proj": ""}
"""PEFT wraps the parameters of a module one around the other, the first one innermost."""


class LoRAGroupedLinear(nn.Module):
    """A frozen stack of experts' layers, and beside each the product of two trained matrices of ``rank``."""

    casts_weights = True

    def __init__(self, base: GroupedLinear, rank: int, scale: float) -> None:
        super().__init__()
        self.weight, self.bias = base.weight, base.bias
        self.lora_A = GroupedLinear(base.experts, base.inputs, rank, bias=False)
        self.lora_B = GroupedLinear(base.experts, rank, base.outputs, bias=False)
        self.scale, self.active = scale, True

    def forward(self, rows: Tensor, assignment: Assignment) -> Tensor:
        out = grouped_linear(rows, self.weight, assignment)
        if self.bias is not None:
            out = out + self.bias[assignment.expert].to(out.dtype)
        if not self.active:
            return out
        return out + self.lora_B(self.lora_A(rows, assignment), assignment) * self.scale  # type: ignore[no-any-return]


def is_of_experts(name: str) -> bool:
    """Whether a trained matrix adapts experts."""
    return PLACE.fullmatch(name) is not None


def to_peft(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Trained matrices under PEFT's names: of experts those of ``target_parameters``, whose layout is another."""
    both = len({match["layer"] for name in tensors if (match := PLACE.fullmatch(name))}) == 2
    return dict(_to_peft(name, tensor, both) for name, tensor in tensors.items())


def _to_peft(name: str, tensor: Tensor, both: bool) -> tuple[str, Tensor]:
    match = PLACE.fullmatch(name)
    if match is None:
        return name, tensor
    inner = INNER[match["layer"]] if both else ""
    # (E, r, i) as (E r, i); (E, o, r) as (o, r E).
    flat = tensor.flatten(0, 1) if match["side"] == "lora_A" else tensor.permute(1, 2, 0).flatten(1)
    return f"{match['experts']}{inner}.{match['side']}.weight", flat


def peft_source(name: str, stored: Collection[str]) -> str:
    """PEFT's name of one of our matrices, in a folder that has the names ``stored``."""
    match = PLACE.fullmatch(name)
    if match is None:
        return name
    both = f"{match['experts']}.base_layer.{match['side']}.weight" in stored
    return f"{match['experts']}{INNER[match['layer']] if both else ''}.{match['side']}.weight"


def from_peft(name: str, tensor: Tensor, experts: int) -> Tensor:
    """One of our matrices, of PEFT's."""
    match = PLACE.fullmatch(name)
    if match is None:
        return tensor
    if match["side"] == "lora_A":
        return tensor.view(experts, -1, tensor.shape[1])
    return tensor.view(len(tensor), -1, experts).permute(2, 0, 1)


def parameters_in_peft(names: Collection[str]) -> list[str]:
    """``target_parameters`` of trained matrices."""
    layers = {match["layer"] for name in names if (match := PLACE.fullmatch(name))}
    return [f"mlp.experts.{layer}" for layer in sorted(layers)]
