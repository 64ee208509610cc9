"""Number formats: float32 masters always; the compute format by choice, with loss scaling where it needs it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from enum import StrEnum, auto
from typing import Any

import torch
from torch import Tensor

from trainer.config import Node, schema, setting


class Compute(StrEnum):
    """Format of activations and matrix products."""

    fp32 = auto()
    bf16 = auto()
    fp16 = auto()


@schema("precision")
@dataclass
class Precision(Node):
    """Float32 parameters and optimizer state; matrix products in ``compute`` under autocast."""

    compute: Compute = setting(Compute.fp32, "format of activations and matrix products")
    initial_scale: float = setting(65536.0, "fp16: the first loss scale", above=0)
    growth_every: int = setting(2000, "fp16: steps without an overflow after which the scale doubles", least=1)

    @property
    def dtype(self) -> torch.dtype:
        return {Compute.fp32: torch.float32, Compute.bf16: torch.bfloat16, Compute.fp16: torch.float16}[self.compute]

    def autocast(self, device: torch.device, *, cache: bool = True) -> AbstractContextManager[Any]:
        """The context in which losses are computed; ``cache``: a weight is cast once in it, and the cast is kept."""
        if self.compute is Compute.fp32:
            return nullcontext()
        return torch.autocast(device.type, dtype=self.dtype, cache_enabled=cache)

    def loss_scale(self, device: torch.device) -> LossScale:
        """A dynamic scale for fp16; a constant 1 otherwise."""
        if self.compute is Compute.fp16:
            return LossScale(self.initial_scale, self.growth_every, device)
        return LossScale(1.0, 0, device)


class LossScale:
    """Dynamic loss scaling (Micikevicius et al. 2018, arXiv:1710.03740), decided on the device without waiting for it.

    An overflow halves the scale; ``growth_every`` steps in a row without one double it. 0 keeps it constant.
    """

    def __init__(self, scale: float, growth_every: int, device: torch.device) -> None:
        self.growth_every = growth_every
        self.scale = torch.tensor(scale, dtype=torch.float32, device=device)
        self._streak = torch.zeros((), dtype=torch.int32, device=device)

    def update(self, overflow: Tensor) -> None:
        """Learn whether the last gradient overflowed (a bool scalar on the device)."""
        if not self.growth_every:
            return
        self._streak = torch.where(overflow, 0, self._streak + 1)
        grown = self._streak >= self.growth_every
        self.scale = torch.where(overflow, self.scale / 2, torch.where(grown, self.scale * 2, self.scale))
        self._streak = torch.where(grown, 0, self._streak)

    def state(self) -> dict[str, float]:
        return {"scale": float(self.scale), "streak": int(self._streak)}

    def load(self, state: dict[str, float]) -> None:
        """Continue from a saved scale, unless this run's scale is constant (its precision may have changed)."""
        if self.growth_every and state:
            self.scale.fill_(state["scale"])
            self._streak.fill_(int(state["streak"]))
