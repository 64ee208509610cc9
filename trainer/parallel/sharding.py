"""A module whose parameters' blocks are divided by rows among ranks, as PyTorch's `fully_shard` divides them."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from trainer.parallel import distributed
from trainer.parallel.cuts import Cut, cuts_of
from trainer.parallel.mesh import Axis, Mesh


def shard(
    module: nn.Module,
    blocks: Iterable[nn.Module],
    mesh: Mesh,
    *,
    dtype: torch.dtype | None,
    reshard: bool,
    offload: bool,
) -> None:
    """Divide a newly built module's parameters; those on the meta device get memory, and no values yet. Collective.

    Args:
        module: What is called; what belongs to none of the blocks is gathered for all of its forward and backward.
        blocks: Parts of it that are gathered one at a time.
        mesh: The axes that the ranks are laid out on.
        dtype: The format that weights are gathered in; None = their own. Gradients add up in float32.
        reshard: Free a block's weights behind its forward.
        offload: Keep this rank's rows in CPU memory.

    Raises:
        RuntimeError: if the ranks have registered the parameters in different orders.
    """
    _refuse_other_orders(module, mesh)
    device = distributed.world().device
    # The model takes care of formats itself: angles, for one, are not to be narrowed on the way into a block.
    policy = MixedPrecisionPolicy(dtype, None if dtype is None else torch.float32, cast_forward_inputs=False)
    where = CPUOffloadPolicy(pin_memory=True) if offload else OffloadPolicy()
    own = cuts_of(module, mesh)
    shards = _device_mesh(mesh.shards, device)
    other_axes = {cut.shards for cut in own.values() if cut.shards is not None} - {mesh.shards}
    placement = _placement({p: own[name] for name, p in module.named_parameters()}, other_axes, device)
    blocks = [block for block in blocks if any(True for _ in block.parameters())]
    for part in (*blocks, module):
        unit = fully_shard(
            part,
            mesh=shards,
            shard_placement_fn=placement,
            reshard_after_forward=reshard and part is not module,
            mp_policy=policy,
            offload_policy=where,
        )
        # Neither is recursive. Sums, because the objective is one; and by a reduction that gloo has.
        unit.set_gradient_divide_factor(1.0)
        unit.set_force_sum_reduction_for_comms(True)
        if device.type == "cpu" and not other_axes:  # a unit on several takes only PyTorch's
            unit.set_custom_reduce_scatter(RowSums())  # type: ignore[arg-type]  # its base class has no public name
    if device.type == "cpu":
        _gather_ahead(module, blocks)
    memory = torch.device("cpu") if offload else device
    module._apply(lambda t: torch.empty_like(t, device=memory) if t.is_meta else t)  # type: ignore[no-untyped-call]
    for name, parameter in module.named_parameters():
        parameter.cut = own[name]  # type: ignore[attr-defined]


class RowSums:
    """A reduce-scatter of sums for gloo, which has none: PyTorch's sums everything on every rank and keeps a part.

    Of the kind that `FSDPModule.set_custom_reduce_scatter` takes.
    """

    def allocate(self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Memory for what is sent, or for the sums."""
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, op: Any, async_op: bool = False
    ) -> None:
        """Every rank's part for this one, added up in the ranks' order."""
        received = torch.empty_like(input_tensor)
        dist.all_to_all_single(received, input_tensor, group=group)
        torch.sum(received.view(group.size(), -1), 0, out=output_tensor)


def _gather_ahead(module: nn.Module, blocks: Sequence[nn.Module]) -> None:
    """Gather a block's weights while the one before it computes.

    On CPU nothing else would: a gather is waited for where it begins, and every block then waits for the slowest rank.
    """
    parts = [part for part in (module, *blocks) if isinstance(part, FSDPModule)]
    for part in parts:
        part._set_unshard_async_op(True)
    for part, following in itertools.pairwise(parts):
        part.set_modules_to_forward_prefetch([following])


def cut_of(parameter: Tensor) -> Cut:
    """How a parameter that `shard` has divided is divided."""
    return parameter.cut  # type: ignore[attr-defined, no-any-return]


def _placement(
    parameters: Mapping[nn.Parameter, Cut], other_axes: Collection[Axis], device: torch.device
) -> Callable[[nn.Parameter], Any] | None:
    """Tells `fully_shard` where rows are that are not of the first dimension, or on other axes than most; None = none."""
    if not other_axes:
        return (lambda p: Shard(parameters[p].dim)) if any(own.dim for own in parameters.values()) else None
    # PyTorch has no public name for it yet (2.12, pull request 173509).
    from torch.distributed.fsdp._fully_shard._fsdp_common import FSDPMeshInfo, ShardPlacementResult

    infos = {axis: FSDPMeshInfo(mesh=_device_mesh(axis, device), shard_mesh_dim=0) for axis in other_axes}

    def placement(parameter: nn.Parameter) -> Any:
        own = parameters[parameter]
        return ShardPlacementResult(Shard(own.dim), infos[own.shards]) if own.shards in infos else Shard(own.dim)

    return placement


def _device_mesh(axis: Axis, device: torch.device) -> DeviceMesh:
    assert axis.group is not None
    return DeviceMesh.from_group(axis.group, device.type)


def units(module: nn.Module) -> list[FSDPModule]:
    """The parts of a module that are gathered one at a time, itself the first."""
    return [part for part in module.modules() if isinstance(part, FSDPModule)]


def always_reshard(module: nn.Module) -> None:
    """Free all weights behind every forward: of a module without a backward nothing else would."""
    for unit in units(module):
        unit.set_reshard_after_forward(True, recurse=False)


def local(parameter: Tensor) -> Tensor:
    """This rank's rows of a parameter, in the memory that it is gathered from."""
    assert isinstance(parameter, DTensor)
    with torch.no_grad():
        rows: Tensor = parameter.to_local()
    return rows.detach()


def cast(parameter: nn.Parameter, dtype: torch.dtype) -> None:
    """Hold a parameter in another format, before its first use."""
    values = nn.Parameter(parameter.detach().to(dtype), requires_grad=parameter.requires_grad)
    if (own := getattr(parameter, "cut", None)) is not None:
        values.cut = own  # type: ignore[attr-defined]
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


def _refuse_other_orders(module: nn.Module, mesh: Mesh) -> None:
    """PyTorch lays parameters end to end in the order of their registration and compares nothing between ranks."""
    own = [[name, list(cut.shape)] for name, cut in cuts_of(module, mesh).items()]
    stage = mesh.pipeline.rank
    digests = distributed.gather([stage, hashlib.sha256(repr(own).encode()).hexdigest()])
    if len({tuple(digest) for digest in digests}) == mesh.pipeline.size:
        return
    every: list[Any] = distributed.gather([stage, own])
    first = [next(rank for rank, (there, _) in enumerate(every) if there == stage) for stage, _ in every]
    other = next(rank for rank, (_, names) in enumerate(every) if names != every[first[rank]][1])
    expected, names = every[first[other]][1], every[other][1]
    pairs = zip(expected, names, strict=False)
    here, there = next(((a, b) for a, b in pairs if a != b), (expected[-1], names[-1]))
    raise RuntimeError(
        f"rank {other} has registered {there[0]} {tuple(there[1])} where rank {first[other]} has {here[0]} {tuple(here[1])}: "
        "build the model in the same order everywhere, and iterate over no set of names"
    )
