"""Keeping experts busy alike: what routers add to the objective, what they counted, and what follows for the next step.

Nothing here depends on ranks, micro-batches or accumulation (docs/algorithms.md#mixtures-of-experts).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trainer.models.architecture import Architecture
from trainer.models.experts import AbsentRouter, Router, RouterLosses
from trainer.parallel import distributed
from trainer.parallel.mesh import UNDIVIDED, Axis

SUMS = 3
"""Numbers of a router's statistics behind its experts' counts: entropy, balance loss, z-loss."""


@dataclass(frozen=True)
class BalanceRates:
    """How strongly experts are pulled towards an even load.

    ``balance_loss``: weight of the load-balancing loss of softmax routers.
    ``z_loss``: weight of their squared log-partition.
    ``bias_rate``: what a step adds to the choice bias of sigmoid routers, or takes from it.
    """

    balance_loss: float = 0.0
    z_loss: float = 0.0
    bias_rate: float = 0.0


def without_effect(a: Architecture, loss: float | None, z_loss: float | None, bias_rate: float | None) -> Iterator[str]:
    """One sentence for each of ``model.router_*`` that is set and that no router of the architecture heeds."""
    of_sigmoid = {"balance_loss": False, "z_loss": False, "bias_rate": True}
    for (name, sigmoid), value in zip(of_sigmoid.items(), (loss, z_loss, bias_rate), strict=True):
        if value and not a.experts:
            yield f"model.router_{name}={value:g} has no effect on a model without experts; leave it out"
        elif value and sigmoid is not a.router_sigmoid:
            own, other = ("sigmoid", "router_bias_rate") if a.router_sigmoid else ("softmax", "router_balance_loss")
            yield f"model.router_{name}={value:g} has no effect on {own} routers; use model.{other}"


class Balancer:
    """The routers of a module that is trained (a part of a run: the load of the last step is in its checkpoints)."""

    def __init__(self, module: nn.Module, rates: BalanceRates) -> None:
        self.rates = rates
        self.routers = [m for m in module.modules() if isinstance(m, Router | AbsentRouter)]
        # Ranks whose routers see different tokens of the same rows, and ranks with those of other layers.
        self._axes: list[Axis] = [getattr(module, name, UNDIVIDED) for name in ("sequence", "stages")]
        self._weights, self._opened = torch.zeros(2), list[list[Tensor]]()

    def begin(self, factor: Tensor) -> None:
        """Begin a step; ``factor``: what a loss that is a sum over the step's tokens is multiplied by."""
        self._weights = factor * factor.new_tensor([self.rates.balance_loss, self.rates.z_loss])
        self._opened = []

    def open(self) -> list[Tensor]:
        """Begin a micro-batch, or come back to one; gives a leaf a router, whose gradient its statistics add up in."""
        leaves = []
        for router in self.routers:
            size = len(router.load) + SUMS
            leaves.append(torch.zeros(size, device=router.load.device, requires_grad=True))
            router.losses = RouterLosses(self._weights, leaves[-1])
        self._opened.append(leaves)
        return leaves

    @torch.no_grad()
    def finish(self, applied: Tensor) -> dict[str, Tensor]:
        """End a step; gives ``router/*``, scalars on the device. Collective.

        Where the step was not ``applied``, nothing changes.
        """
        sums = torch.cat([_added(leaves) for leaves in zip(*self._opened, strict=True)])
        for axis in self._axes:
            sums = axis.sum(sums)
        sizes = [len(router.load) + SUMS for router in self.routers]
        columns: dict[str, list[Tensor]] = {}
        for router, own in zip(self.routers, torch.split(distributed.sum_over_data(sums), sizes), strict=True):
            router.losses = None
            counts, further = own[:-SUMS], own[-SUMS:]
            self._update(router, counts, applied)
            for name, value in _measured(router, counts, further).items():
                columns.setdefault(name, []).append(value)
        metrics = {name: torch.stack(values).mean() for name, values in columns.items()}
        worst = torch.stack(columns["load_max"]).max()
        return {**{f"router/{name}": v for name, v in metrics.items()}, "router/load_worst": worst}

    def _update(self, router: Router | AbsentRouter, counts: Tensor, applied: Tensor) -> None:
        learnt = applied & (counts.sum() > 0)
        load = (counts / counts.sum().clamp(min=1)).to(router.load.dtype)
        router.load.copy_(torch.where(learnt, load, router.load))
        if router.balance is not None and self.rates.bias_rate:
            # Without a loss (Wang et al. 2024, arXiv:2408.15664): busy experts become less likely, idle ones more.
            moved = router.balance + self.rates.bias_rate * torch.sign(counts.mean() - counts).to(router.balance.dtype)
            router.balance.copy_(torch.where(learnt, moved, router.balance))

    def state_dict(self) -> dict[str, Any]:
        return {"routers": len(self.routers)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Its state is in tensors."""

    def tensors(self) -> dict[str, Tensor]:
        """Every router's load, by number."""
        return {f"load/{number}": router.load for number, router in enumerate(self.routers)}

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Continue with the loads of a checkpoint."""
        for name, load in self.tensors().items():
            load.copy_(tensors[name])


def _added(leaves: tuple[Tensor, ...]) -> Tensor:
    """A router's statistics of all micro-batches; 0 of those in which nothing was learnt through it."""
    parts = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves]
    return torch.stack(parts).double().sum(0)


def _measured(router: Router | AbsentRouter, counts: Tensor, sums: Tensor) -> dict[str, Tensor]:
    tokens = (counts.sum() / router.choices).clamp(min=1)
    share = counts / counts.sum().clamp(min=1)
    return {
        "load_max": share.max() * len(counts),
        "idle": (counts == 0).double().mean(),
        "entropy": sums[0] / tokens,
        "balance_loss": sums[1] / tokens,
        "z_loss": sums[2] / tokens,
        "dropped": torch.zeros_like(tokens),
    }
