"""What a rank holds under ZeRO: its fragments of masters and moments, whole weights on request, and plain modules.

The accessors are DeepSpeed's internals (0.19.8), pinned in setup.py and held by tests/distributed/test_checkpoint.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from trainer.optim.state import create_state, elements, moments
from trainer.parallel import distributed
from trainer.parallel.engine import Fragment, owned_spans, saved_buffers


def reader(module: nn.Module, inner: Any, zero: Any, stage: int) -> ZeroState:
    """The reader for a stage."""
    return (PartitionedParameters if stage == 3 else PartitionedOptimizer)(module, inner, zero)


class ZeroState:
    """The state of one rank, by logical names."""

    def __init__(self, module: nn.Module, inner: Any, zero: Any) -> None:
        self.module, self.inner, self.zero = module, inner, zero
        self.parameters = dict(module.named_parameters())
        self.buffers = dict(saved_buffers(module))

    @property
    def device(self) -> torch.device:
        """Where the optimizer's partitions are: CPU if they are offloaded."""
        return self.flats()[0][1].device

    def flats(self) -> list[tuple[dict[str, Any], Tensor]]:
        """This rank's flat float32 partitions, each with its parameter group."""
        raise NotImplementedError

    def located(self, name: str, p: nn.Parameter) -> tuple[Tensor, int, int, int] | None:
        """(flat partition, offset in it, first element, elements) of a trained parameter; None where nothing is here."""
        raise NotImplementedError

    def refresh(self) -> None:
        """After masters were written: the model's own weights."""
        raise NotImplementedError

    def full(self, name: str, p: nn.Parameter) -> Tensor:
        """A whole parameter, in float32 or as bytes; collective."""
        raise NotImplementedError

    def create_moments(self) -> None:
        """Give every partition the state that AdamW's first step would create, as zeros; existing state stays."""
        create_state(self.inner, self.flats())

    def fragments(self, owned: bool) -> Iterator[Fragment]:
        """This rank's pieces; ``owned``: over all ranks disjoint and complete."""
        for name, p in self.parameters.items():
            if p.requires_grad and (place := self.located(name, p)) is not None:
                flat, at, start, size = place
                shape = tuple(getattr(p, "ds_shape", p.shape))
                own = {moment: self.inner.state[flat][moment] for moment in moments(self.inner)}
                for state, values in {"param": flat, **own}.items():
                    values = elements(values, at, at + size, restoring=not owned)
                    yield Fragment.of_tensor(name, state, shape, start, values)
        yield from self._replicated(owned)

    def optimizer_steps(self) -> dict[str, float]:
        """Updates applied to each parameter that this rank holds a piece of."""
        steps = {}
        for name, p in self.parameters.items():
            if p.requires_grad and (place := self.located(name, p)) is not None:
                state = self.inner.state.get(place[0], {})
                if "step" in state:
                    steps[name] = float(state["step"])
        return steps

    def set_optimizer_steps(self, steps: Mapping[str, float]) -> None:
        """One count serves a whole partition, so all of its parameters must have the same."""
        counts: dict[int, float] = {}
        for name, p in self.parameters.items():
            place = self.located(name, p) if p.requires_grad and name in steps else None
            if place is None:
                continue
            if counts.setdefault(id(place[0]), steps[name]) != steps[name]:
                raise ValueError(
                    f"{name} has had {steps[name]} updates, others of its partition {counts[id(place[0])]}"
                )
            self.inner.state[place[0]]["step"].fill_(steps[name])

    def full_weights(self, frozen: bool) -> Iterator[tuple[str, Tensor]]:
        """Every logical tensor whole, one at a time; collective."""
        for name, p in self.parameters.items():
            if frozen or p.requires_grad:
                yield name, self.full(name, p)
        yield from self.buffers.items()

    def _replicated(self, owned: bool) -> Iterator[Fragment]:
        buffers = list(self.buffers.items())
        for number, first, last in owned_spans([b.numel() for _, b in buffers], owned=owned):
            name, tensor = buffers[number]
            yield Fragment.of_tensor(name, "param", tensor.shape, first, tensor.detach().view(-1)[first:last])


class PartitionedOptimizer(ZeroState):
    """Stages 1 and 2: parameters are whole on every rank, masters and moments are partitions of their concatenation."""

    def flats(self) -> list[tuple[dict[str, Any], Tensor]]:
        return [(group, flat) for group in self.inner.param_groups for flat in group["params"]]

    def located(self, name: str, p: nn.Parameter) -> tuple[Tensor, int, int, int] | None:
        mapping = p._hp_mapping  # type: ignore[attr-defined]
        if mapping is None:
            return None
        flat = self.inner.param_groups[mapping.param_group_index]["params"][0]
        here = mapping.hp_fragment_address
        return flat, here.start, mapping.lp_fragment_address.start, here.numel

    def refresh(self) -> None:
        self.zero.update_lp_params()

    def full(self, name: str, p: nn.Parameter) -> Tensor:
        if not p.requires_grad or p.dtype is torch.float32:
            return p.detach().float() if p.is_floating_point() else p.detach()
        # The working copy is bfloat16: put the float32 masters of all ranks together.
        full = torch.zeros(p.numel(), dtype=torch.float32, device=distributed.world().device)
        if (place := self.located(name, p)) is not None:
            flat, at, start, size = place
            full[start : start + size] = flat.detach()[at : at + size].to(full.device)
        return distributed.sum_over_data(full).view(p.shape)


class PartitionedParameters(ZeroState):
    """Stage 3: every parameter is split evenly over the ranks."""

    def flats(self) -> list[tuple[dict[str, Any], Tensor]]:
        groups = self.zero.sub_group_to_group_id
        flats = enumerate(self.zero.fp32_partitioned_groups_flat)
        return [(self.inner.param_groups[groups[number]], flat) for number, flat in flats]

    def located(self, name: str, p: nn.Parameter) -> tuple[Tensor, int, int, int] | None:
        start, size = share(p)
        if size <= 0:
            return None
        group, at, _ = self.zero.grad_position[self.zero.get_param_id(p)]
        return self.zero.fp32_partitioned_groups_flat[group], at, start, size

    def refresh(self) -> None:
        for p in self.parameters.values():
            if p.requires_grad:
                group, at, size = self.zero.grad_position[self.zero.get_param_id(p)]
                p.ds_tensor.data.copy_(self.zero.fp32_partitioned_groups_flat[group].data.narrow(0, at, size))  # type: ignore[attr-defined]
        # Small parameters keep a full copy: drop it and gather it again.
        if small := self.zero.persistent_parameters:
            small[0].partition(small)
            small[0].all_gather(small)

    def full(self, name: str, p: nn.Parameter) -> Tensor:
        dtype = torch.float32 if p.is_floating_point() else p.dtype
        full = torch.zeros(p.ds_numel, dtype=dtype, device=distributed.world().device)  # type: ignore[attr-defined]
        if p.requires_grad:
            place = self.located(name, p)
            if place is not None:
                flat, at, start, size = place
                full[start : start + size] = flat.detach()[at : at + size].to(full.device)
        else:
            start, size = share(p)
            if size > 0:
                full[start : start + size] = p.ds_tensor.detach()[:size]  # type: ignore[attr-defined]
        return distributed.sum_over_data(full).view(p.ds_shape)  # type: ignore[attr-defined]


def share(p: Any) -> tuple[int, int]:
    """(first element, elements) of this rank's part of a sharded parameter; what is behind its end is padding."""
    part = p.ds_tensor.numel()
    start = part * distributed.world().rank
    return start, min(part, p.ds_numel - start)


@contextmanager
def gathered(module: nn.Module, zero: Any, only: Callable[[str], bool]) -> Iterator[nn.Module]:
    """A plain module with whole weights and without DeepSpeed's hooks, so that ranks may run unequal numbers of forwards.

    ``only``: says by name which weights are needed. Collective at both ends; training continues unchanged afterwards.
    """
    import deepspeed

    parameters = list(module.parameters())
    training = module.training
    with deepspeed.zero.GatheredParameters([p for name, p in module.named_parameters() if only(name)]):
        zero.parameter_offload._remove_module_hooks()
        for p in parameters:
            p.ds_active_sub_modules.clear()  # type: ignore[attr-defined]
        module.eval()
        try:
            yield module
        finally:
            module.train(training)
            zero.parameter_offload.setup_zero_stage3_hooks()
            for p in parameters:
                p.ds_active_sub_modules.clear()  # type: ignore[attr-defined]
