"""A module whose parameters are divided by rows among the ranks, as PyTorch's `fully_shard` divides them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from trainer.parallel import distributed


def shard(
    module: nn.Module, blocks: Iterable[nn.Module], *, dtype: torch.dtype | None, reshard: bool, offload: bool
) -> None:
    """Divide a newly built module's parameters; those on the meta device get memory, and no values yet. Collective.

    Args:
        module: What is called; what belongs to none of the blocks is gathered for all of its forward and backward.
        blocks: Parts of it that are gathered one at a time.
        dtype: The format that weights are gathered in; None = their own. Gradients add up in float32.
        reshard: Free a block's weights behind its forward.
        offload: Keep this rank's rows in CPU memory.

    Raises:
        RuntimeError: if the ranks have registered the parameters in different orders.
    """
    _refuse_other_orders(module)
    distributed.ensure_group()
    device = distributed.world().device
    assert dist.group.WORLD is not None
    mesh = DeviceMesh.from_group(dist.group.WORLD, device.type)
    # The model takes care of formats itself: angles, for one, are not to be narrowed on the way into a block.
    policy = MixedPrecisionPolicy(dtype, None if dtype is None else torch.float32, cast_forward_inputs=False)
    where = CPUOffloadPolicy(pin_memory=True) if offload else OffloadPolicy()
    for part in (*blocks, module):
        unit = fully_shard(
            part,
            mesh=mesh,
            reshard_after_forward=reshard and part is not module,
            mp_policy=policy,
            offload_policy=where,
        )
        # Neither is recursive. Sums, because the objective is one; and by a reduction that gloo has.
        unit.set_gradient_divide_factor(1.0)
        unit.set_force_sum_reduction_for_comms(True)
    memory = torch.device("cpu") if offload else device
    module._apply(lambda t: torch.empty_like(t, device=memory) if t.is_meta else t)  # type: ignore[no-untyped-call]


def units(module: nn.Module) -> list[FSDPModule]:
    """The parts of a module that are gathered one at a time, itself the first."""
    return [part for part in module.modules() if isinstance(part, FSDPModule)]


def always_reshard(module: nn.Module) -> None:
    """Free all weights behind every forward: of a module without a backward nothing else would."""
    for unit in units(module):
        unit.set_reshard_after_forward(True, recurse=False)


def rows(shape: Sequence[int], rank: int | None = None) -> tuple[int, int]:
    """(first, last) row that a rank, else this one, has of a parameter: equal parts, the last of which may lack some."""
    data = distributed.world().data
    each = -(-shape[0] // data.size)
    first = each * (data.rank if rank is None else rank)
    return min(first, shape[0]), min(first + each, shape[0])


def local(parameter: Tensor) -> Tensor:
    """This rank's rows of a parameter, in the memory that it is gathered from."""
    assert isinstance(parameter, DTensor)
    with torch.no_grad():
        rows: Tensor = parameter.to_local()
    return rows.detach()


def joined(own: Tensor, shape: Sequence[int]) -> Tensor:
    """All rows of a tensor of which every rank has its `rows`; collective."""
    data = distributed.world().data
    padded = own.new_zeros(-(-shape[0] // data.size), *shape[1:])
    padded[: len(own)].copy_(own)
    # As bytes: what carries tensors between CPUs does not know bfloat16.
    every = distributed.stack_over_data(padded.view(torch.uint8))
    return every.view(own.dtype).flatten(0, 1)[: shape[0]]


def cast(parameter: nn.Parameter, dtype: torch.dtype) -> None:
    """Hold a parameter in another format, before its first use."""
    values = nn.Parameter(parameter.detach().to(dtype), requires_grad=parameter.requires_grad)
    # The object stays: PyTorch knows the parameter by it.
    torch.utils.swap_tensors(parameter, values)  # type: ignore[no-untyped-call]


@contextmanager
def without_hooks(parts: Sequence[FSDPModule]) -> Iterator[None]:
    """Let forwards neither gather nor free: they run on what is there, any number of them, also in a CUDA graph."""
    removed: list[tuple[Any, int, Any, bool]] = []
    for part in parts:
        state: Any = part._get_fsdp_state()
        module: Any = part
        for hooks, handle, first in (
            (module._forward_pre_hooks, state._pre_forward_hook_handle, True),
            (module._forward_hooks, state._post_forward_hook_handle, False),
        ):
            removed.append((hooks, handle.id, hooks.pop(handle.id), first))
    try:
        yield
    finally:
        for hooks, number, hook, first in removed:
            hooks[number] = hook
            hooks.move_to_end(number, last=not first)


def _refuse_other_orders(module: nn.Module) -> None:
    """PyTorch lays parameters end to end in the order of their registration and compares nothing between ranks."""
    own = [[name, list(p.shape)] for name, p in module.named_parameters()]
    digests = distributed.gather(hashlib.sha256(repr(own).encode()).hexdigest())
    if len(set(digests)) == 1:
        return
    every: list[Any] = distributed.gather(own)
    other = next(rank for rank, names in enumerate(every) if names != every[0])
    pairs = zip(every[0], every[other], strict=False)
    here, there = next(((a, b) for a, b in pairs if a != b), (every[0][-1], every[other][-1]))
    raise RuntimeError(
        f"rank {other} has registered {there[0]} {tuple(there[1])} where rank 0 has {here[0]} {tuple(here[1])}: build the "
        "model in the same order everywhere, and iterate over no set of names"
    )
