"""How far a run is: the tokens that it has seen, and what the host knows of a step before its metrics arrive."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trainer.tracking.throughput import Timing


class TokenCounter:
    """Tokens learnt from since the beginning of the run, counted on the device."""

    def __init__(self, device: torch.device) -> None:
        self.tokens = torch.zeros((), dtype=torch.float64, device=device)

    def add(self, tokens: Tensor) -> Tensor:
        """The count with the tokens of another step."""
        self.tokens = self.tokens + tokens
        return self.tokens

    def state_dict(self) -> dict[str, Any]:
        return {"tokens": int(self.tokens)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.tokens.fill_(state["tokens"])


@dataclass(frozen=True)
class PendingStep:
    """What the host knows of a step whose metrics are still on the device.

    Attributes:
        number: the step.
        lr: its learning rate.
        rows: positions in the data of this rank's rows.
        timing: the clock since the step before.
        compared: what a comparison of the ranks after it showed, by metric; mostly nothing.
    """

    number: int
    lr: float
    rows: list[int]
    timing: Timing
    compared: Mapping[str, float]
