"""What a block's backward computes again instead of keeping it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum, auto
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from trainer.models import dropout


class Recompute(StrEnum):
    """What the backward computes again instead of keeping it."""

    none = auto()
    selective = auto()
    full = auto()


def _keep_products(_: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Save expensive ops (matrix products, attention); norms, activations and rotations are computed again."""
    expensive = (
        "mm", "addmm", "bmm", "_grouped_mm", "grouped_", "linear", "_scaled_dot_product", "_flash_attention", "_varlen_attn",
        "causal_attention",
    )  # fmt: skip
    # Of torch_attn::_varlen_attn and ours, too, which are not aten's.
    name = operation.overloadpacket.__name__ if isinstance(operation, OpOverload) else str(operation)
    return CheckpointPolicy.MUST_SAVE if name.startswith(expensive) else CheckpointPolicy.PREFER_RECOMPUTE


class Computes(Protocol):
    """A block, or what stands for it."""

    @property
    def compute(self) -> Callable[..., Tensor]: ...


@dataclass(frozen=True)
class _Compiled:
    compute: Callable[..., Tensor]


def keep_all(block: Computes, *inputs: Any) -> Tensor:
    """Recompute nothing."""
    return block.compute(*inputs)


def _recompute_all(block: Computes, x: Tensor, turned: tuple[Tensor, ...], *rest: Any, **how: Any) -> Tensor:
    # Other micro-batches may pass before this one's backward. What is compiled draws nothing.
    draws = None if torch.compiler.is_compiling() else dropout.current()

    # What is not a tensor comes by closure: torch 2.11 would compile anew for every number of documents.
    def compute(x: Tensor, *turned: Tensor) -> Tensor:
        if draws is None:
            return block.compute(x, turned, *rest)
        with dropout.again(draws):
            return block.compute(x, turned, *rest)

    return checkpoint(compute, x, *turned, use_reentrant=False, **how)  # type: ignore[no-any-return]


def _recompute_cheap(block: Computes, *inputs: Any) -> Tensor:
    return _recompute_all(block, *inputs, context_fn=partial(create_selective_checkpoint_contexts, _keep_products))


def around(run: Callable[..., Tensor], compiled: Callable[..., Tensor], block: Computes, *inputs: Any) -> Tensor:
    """Run a block that is ``compiled`` by one of `RECOMPUTING`."""
    return run(_Compiled(partial(compiled, block)), *inputs)


RECOMPUTING: dict[Recompute, Callable[..., Tensor]] = {
    Recompute.none: keep_all,
    Recompute.selective: _recompute_cheap,
    Recompute.full: _recompute_all,
}
"""What runs a block in training."""
