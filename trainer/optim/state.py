"""What optimizers hold of their parameters, by name: created, read and restored without knowing which optimizer it is."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from trainer.optim.eight_bit import EightBitAdamW, Moment


def moments(optimizer: torch.optim.Optimizer) -> tuple[str, ...]:
    """Names of the state that has its parameter's shape."""
    return ("momentum_buffer",) if isinstance(optimizer, torch.optim.Muon) else ("exp_avg", "exp_avg_sq")


def create_state(
    optimizer: torch.optim.Optimizer, places: Iterable[tuple[dict[str, Any], Tensor]] | None = None
) -> None:
    """Give every parameter the state that the optimizer's first step would create, as zeros; existing state stays.

    ``places``: parameters, each with its group, where the optimizer does not hold all of them between its steps.
    """
    own = ((group, parameter) for group in optimizer.param_groups for parameter in group["params"])
    for group, parameter in own if places is None else places:
        if state := optimizer.state[parameter]:
            continue
        if isinstance(optimizer, EightBitAdamW) and group["eight_bit"]:
            state.update(optimizer.created(parameter))
            continue
        for name in moments(optimizer):
            state[name] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        if isinstance(optimizer, torch.optim.AdamW):
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)


def elements(values: Tensor | Moment, first: int, last: int, *, restoring: bool) -> Tensor:
    """Elements ``first`` .. ``last`` of a tensor or a moment, flat.

    A tensor's are a view. Those of a moment in 8 bits are a float32 copy, or if ``restoring`` room for what `settle` is to
    hold.
    """
    if isinstance(values, Tensor):
        return values.detach().view(-1)[first:last]
    return values.incoming(first, last) if restoring else values.values(first, last)


def settle(optimizers: Iterable[torch.optim.Optimizer]) -> float:
    """Hold in 8 bits what was restored; gives the most that this moved an element, as a part of its block's maximum."""
    states = (value for optimizer in optimizers for state in optimizer.state.values() for value in state.values())
    return max((value.settle() for value in states if isinstance(value, Moment)), default=0.0)
