"""Where DeepSpeed (0.19.8) lets the host wait for the device although only the device has to: it is told otherwise here.

What still waits is one gather of the small parameters after a step under ZeRO-3; offloaded states, which the host steps; and
the prefetching of ZeRO-3, which lets the host run ahead by a few layers only. Held by tests/cuda/test_steps.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from trainer.parallel import distributed


def leave_norm_on_device(zero: Any, stage: int) -> None:
    """Let DeepSpeed take the gradient's norm as it is, infinite after an overflow: `ZeroEngine` decides about the step.

    It would put -1 in its place and ask the device whether it is there: two copies and a question for a parameter group.
    """
    from deepspeed.runtime.zero import stage3, stage_1_and_2

    zero.get_grad_norm_direct = partial(norm_over_ranks, torch.float64 if stage == 3 else torch.float32)
    for module in (stage_1_and_2, stage3):
        module.is_invalid_grad_norm = lambda norm: False


def norm_over_ranks(exchanged: torch.dtype, gradients: Iterable[Tensor], parameters: Iterable[Tensor]) -> Tensor:
    """The norm of a parameter group's gradient, of which ranks hold parts: added up and ``exchanged`` as by DeepSpeed."""
    # What pads the last partition belongs to no parameter.
    pieces = zip((g for g in gradients if not getattr(g, "_zero_padding", False)), parameters, strict=False)
    norms = [torch.linalg.vector_norm(gradient.detach().double()) for gradient, _ in pieces]
    device = distributed.world().device
    total = (
        torch.stack(norms).square().sum().to(exchanged) if norms else torch.zeros((), dtype=exchanged, device=device)
    )
    distributed.sum_in_place(total)
    return total.sqrt()


@contextmanager
def exchange_awaited_on_device(zero: Any) -> Iterator[None]:
    """Inside, the stream that computes waits for gradients that are exchanged on another one.

    DeepSpeed stops the host at the end of every backward until the device has done everything, so the next forward begins
    late. The streams' own order is as strict: what reads a gradient, or uses its memory again, runs after the exchange.
    """
    from deepspeed.accelerator import get_accelerator

    exchanging = getattr(zero, "reduce_and_partition_stream", None)
    stream, waits = (zero.reduction_stream, get_accelerator()) if exchanging is None else (exchanging, exchanging)
    waits.synchronize = lambda *_: torch.cuda.current_stream().wait_stream(stream)
    try:
        yield
    finally:
        del waits.synchronize
