"""What a rank has of a parameter that a strategy may have divided."""

import torch
from torch.distributed.tensor import DTensor


def held(parameter: torch.nn.Parameter) -> torch.Tensor:
    """What this rank has of a parameter."""
    return getattr(parameter, "ds_tensor", parameter.to_local() if isinstance(parameter, DTensor) else parameter)
