"""Mixtures of experts: every token goes through a few of many MLPs, which a router chooses. No token is dropped."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trainer.functional import working_dtype
from trainer.models.architecture import Architecture, Layer
from trainer.models.grouped import Assignment, GroupedLinear
from trainer.models.mlp import ACTIVATIONS, MLP
from trainer.models.packed import PackedWeight
from trainer.parallel.cuts import cut, cuts
from trainer.parallel.mesh import UNDIVIDED, Axis, Mesh


@dataclass
class RouterLosses:
    """What a router adds to the objective of a step, and where it counts.

    ``weights`` ``(2,)``: of the balance loss and of the z-loss of one token, already divided by the step's tokens.
    ``tally`` ``(E + 3,)``: a leaf of the graph. Its gradient is `Router.statistics`: the backward runs once for every
    forward that is learnt from, however often that is computed again.
    """

    weights: Tensor
    tally: Tensor


class Router(nn.Module):
    """Which experts a token goes to, and what each then weighs; in float32.

    A softmax (Shazeer et al. 2017, arXiv:1701.06538), or sigmoids with a bias ``balance`` that takes part in the choice
    alone (DeepSeek-AI 2024, arXiv:2412.19437, eq. 16).

    Attributes:
        load: ``(E,)``, every expert's share of the choices of the step before, over all ranks.
        losses: What is added to the objective of this micro-batch; None where nothing is learnt.
    """

    balance: Tensor | None
    load: Tensor

    def __init__(self, a: Architecture) -> None:
        super().__init__()
        self.choices, self.sigmoid = a.experts_per_token, a.router_sigmoid
        self.normalised, self.scale = a.router_normalised, a.router_scale
        self.weight = nn.Parameter(torch.empty(a.experts, a.hidden_size))
        self.bias = nn.Parameter(torch.empty(a.experts)) if a.expert_bias else None
        self.register_buffer("balance", torch.zeros(a.experts) if a.router_sigmoid else None)
        self.register_buffer("load", torch.full((a.experts,), 1 / a.experts), persistent=False)
        self.losses: RouterLosses | None = None

    def forward(self, x: Tensor, real: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Experts and weights ``(n, k)`` of tokens ``(n, d)``; ``real`` ``(n,)``: those that count, None = all."""
        with torch.autocast(x.device.type, enabled=False):
            logits = F.linear(x.float(), self.weight.float(), None if self.bias is None else self.bias.float())
            scores = logits.sigmoid() if self.sigmoid else logits.softmax(-1)
            ranked = scores if self.balance is None else scores + self.balance
            chosen = ranked.detach().topk(self.choices).indices
            weights = scores.gather(1, chosen)
            if self.normalised:
                weights = weights / (weights.sum(-1, keepdim=True) + (1e-20 if self.sigmoid else 0.0))
            weights = weights * self.scale
            if self.losses is None or not torch.is_grad_enabled():
                return chosen, weights
            counted = torch.ones_like(logits[:, 0]) if real is None else real.to(logits.dtype)
            return chosen, self._with_losses(self.losses, weights, chosen, scores, logits, counted)

    def _with_losses(
        self, losses: RouterLosses, weights: Tensor, chosen: Tensor, scores: Tensor, logits: Tensor, counted: Tensor
    ) -> Tensor:
        """``weights``, whose backward adds the gradients of the router's losses.

        Balance: E * sum over experts of load * probability (Fedus et al. 2021, arXiv:2101.03961, eq. 4), with the load of the
        step before: it is then a sum over tokens, whatever they are grouped by. z: logsumexp ** 2 (Zoph et al. 2022,
        arXiv:2202.08906, eq. 5). Neither is of sigmoids.
        """
        statistics = self.statistics(chosen, scores, logits, counted)
        if self.sigmoid:
            return _Attached.apply(weights, losses.tally, statistics.detach(), None)  # type: ignore[no-any-return, no-untyped-call]
        added = (losses.weights * statistics[-2:]).sum()
        return _Attached.apply(weights, losses.tally, statistics.detach(), added)  # type: ignore[no-any-return, no-untyped-call]

    def statistics(self, chosen: Tensor, scores: Tensor, logits: Tensor, counted: Tensor) -> Tensor:
        """``(E + 3,)`` sums over tokens: how often each expert is chosen, entropy in nats, balance loss, z-loss."""
        shares = scores / scores.sum(-1, keepdim=True) if self.sigmoid else scores
        times = counted[:, None].expand_as(chosen).reshape(-1)
        counts = torch.zeros_like(self.load).index_add(0, chosen.flatten(), times)
        entropy = -(shares * shares.clamp(min=1e-30).log()).sum(-1).detach()
        balance = len(self.load) * (shares * self.load).sum(-1)
        z = logits.logsumexp(-1).square()
        return torch.cat([counts, (torch.stack([entropy, balance, z]) * counted).sum(1)])


class AbsentRouter(nn.Module):
    """Stands for the router of a layer that another stage of a pipeline has, whose numbers are known everywhere."""

    load: Tensor
    balance: Tensor | None = None

    def __init__(self, a: Architecture) -> None:
        super().__init__()
        self.choices = a.experts_per_token
        self.register_buffer("load", torch.full((a.experts,), 1 / a.experts), persistent=False)
        self.losses: RouterLosses | None = None


class _Attached(torch.autograd.Function):
    """A tensor as it is, whose backward adds a loss to the objective, and gives ``tally`` the ``statistics`` as gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, tally: Tensor, statistics: Tensor, added: Tensor | None) -> Tensor:
        ctx.save_for_backward(statistics)
        ctx.adds = added is not None
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, Tensor | None]:
        [statistics] = ctx.saved_tensors
        return gradients[0], statistics, None, statistics.new_ones(()) if ctx.adds else None


@dataclass(frozen=True)
class Routes:
    """Where the sorted rows of the tokens of ranks go that divide the experts among them.

    Args:
        sent: Rows of this rank for each rank, in turn.
        received: Rows of each rank for this one.
        assignment: Of the rows that are received, in that order, to the experts that are here.
    """

    sent: list[int]
    received: list[int]
    assignment: Assignment

    @classmethod
    def of(cls, ends: Tensor, axis: Axis) -> Routes:
        """Of rows with `Assignment.ends` ``(E,)``; the host waits for the device once. Collective."""
        first, last = axis.span(len(ends))
        rows = axis.stack(ends.long().diff(prepend=ends.new_zeros(1))).view(axis.size, axis.size, last - first)
        # rows[from, to, expert]: what a rank has for an expert of another.
        sent, received = torch.stack([rows[axis.rank].sum(1), rows[:, axis.rank].sum(1)]).tolist()
        numbers = torch.arange(last - first, device=ends.device).repeat(axis.size)
        expert = numbers.repeat_interleave(rows[:, axis.rank].flatten(), output_size=sum(received))
        return cls(sent, received, Assignment.of(expert[:, None], last - first))


class Experts(nn.Module):
    """MLPs in two stacked tensors: the tokens' choices are sorted by expert, and a grouped product serves all of them.

    Attributes:
        axis: Ranks that divide the experts among them; tokens go to those that have what they chose, and come back.
        tensor: Ranks with the same tokens that divide the experts among them: each computes its own, and their results are
            added up.
    """

    axis: Axis = UNDIVIDED
    tensor: Axis = UNDIVIDED

    def __init__(self, a: Architecture) -> None:
        super().__init__()
        self.experts, self.limit, self.activation = a.experts, a.glu_limit, ACTIVATIONS[a.activation]
        self.gate_up_proj = GroupedLinear(a.experts, a.hidden_size, 2 * a.expert_size, a.expert_bias)
        self.down_proj = GroupedLinear(a.experts, a.expert_size, a.hidden_size, a.expert_bias)

    def divide(self, mesh: Mesh) -> None:
        """Leave this rank's experts, with the adapters beside them; none has values yet.

        Not a part of each expert: gate and input lie end to end in one matrix, of which it would have two parts. Where
        both axes divide a model, ranks of ``mesh.tensor`` compute the same.
        """
        self.axis = mesh.expert
        alone = mesh.expert.size == 1
        self.tensor = mesh.tensor if alone else UNDIVIDED
        axes = (mesh.tensor, None) if alone else (mesh.expert, mesh.expert_shards)
        for layer in self.modules():
            if isinstance(layer, PackedWeight):
                layer.cut(0, *axes)
                continue
            for name, _ in list(layer.named_parameters(recurse=False)):
                cut(layer, name, 0, *axes)

    @contextmanager
    def joined(self) -> Iterator[None]:
        """All experts on every rank for a while, so that forwards need not keep step; collective when it begins."""
        axis, self.axis = self.axis, UNDIVIDED
        layers = list(self.modules()) if axis.size > 1 else []
        owned = [(layer, name, layer.get_parameter(name)) for layer in layers for name in cuts(layer)]
        spans = [(layer, layer.span) for layer in layers if isinstance(layer, PackedWeight)]
        try:
            for layer, name, parameter in owned:
                setattr(layer, name, nn.Parameter(axis.stack(parameter).flatten(0, 1), requires_grad=False))
            for weight, _ in spans:
                weight.span = None
            yield
        finally:
            self.axis = axis
            for layer, name, parameter in owned:
                setattr(layer, name, parameter)
            for weight, span in spans:
                weight.span = span

    def forward(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """Tokens ``(n, d)``, of which each goes through the ``chosen`` experts ``(n, k)`` and their results are added up."""
        dtype = working_dtype(x)
        x, weights = self.tensor.enter(x), self.tensor.enter(weights)
        if self.tensor.size > 1:  # this rank's experts first
            chosen = (chosen - self.tensor.span(self.experts)[0]) % self.experts
        assignment = Assignment.of(chosen, self.experts)
        rows = assignment.dispatch(x.to(dtype))
        if self.axis.size > 1:
            rows = self._exchanged(rows, assignment.ends)
        elif self.tensor.size > 1:
            rows = self._own(rows, assignment)
        else:
            rows = self._computed(rows, assignment)
        return self.tensor.leave((assignment.combine(rows) * weights[..., None]).sum(1).to(dtype))

    def _own(self, rows: Tensor, assignment: Assignment) -> Tensor:
        """Sorted rows ``(S, d)``, the first of which are those of this rank's experts; zeros for the others.

        The host waits for the device once.
        """
        first, last = self.tensor.span(self.experts)
        ends = assignment.ends[: last - first]
        count = int(ends[-1])
        here = replace(assignment, expert=assignment.expert[:count], ends=ends)
        return F.pad(self._computed(rows[:count], here), (0, 0, 0, len(rows) - count))

    def _computed(self, rows: Tensor, assignment: Assignment) -> Tensor:
        """Sorted rows ``(S, d)`` through the experts that are here."""
        gate, up = self.gate_up_proj(rows, assignment).chunk(2, -1)
        return self.down_proj(self._gated(gate, up), assignment)  # type: ignore[no-any-return]

    def _exchanged(self, rows: Tensor, ends: Tensor) -> Tensor:
        """Sorted rows ``(S, d)`` of this rank's tokens through all experts, wherever they are."""
        routes = Routes.of(ends, self.axis)
        here = routes.assignment
        rows = self.axis.exchange(rows, routes.sent, routes.received)
        rows = here.combine(self._computed(here.dispatch(rows), here)).squeeze(1)
        return self.axis.exchange(rows, routes.received, routes.sent)

    def _gated(self, gate: Tensor, up: Tensor) -> Tensor:
        if self.limit is None:
            return self.activation(gate) * up
        # gpt-oss (OpenAI 2025, arXiv:2508.10925): a clamped SwiGLU of slope 1.702 whose linear part is shifted by 1.
        gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
        return gate * torch.sigmoid(1.702 * gate) * (up + 1)


class SharedExpertGate(nn.Module):
    """What the expert that every token goes through weighs, token by token (Qwen2-MoE, arXiv:2407.10671)."""

    def __init__(self, a: Architecture) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(1, a.hidden_size))

    def forward(self, x: Tensor) -> Tensor:
        """``(n, d)`` to ``(n, 1)``."""
        return F.linear(x, self.weight.to(x.dtype)).sigmoid()


class MixtureOfExperts(nn.Module):
    """Router and experts in the MLP's place, and an MLP that every token goes through where there is a shared one."""

    def __init__(self, a: Architecture) -> None:
        super().__init__()
        self.router, self.experts = Router(a), Experts(a)
        self.shared = MLP(a, a.shared_size) if a.shared_size else None
        self.shared_gate = SharedExpertGate(a) if a.shared_gate else None

    def divide(self, mesh: Mesh) -> None:
        """Leave this rank's experts; the router is on all ranks."""
        if mesh.expert.size > 1 or mesh.tensor.size > 1:
            self.experts.divide(mesh)
        if self.shared is not None and mesh.tensor.size > 1:
            self.shared.divide(mesh)

    def forward(self, x: Tensor, real: Tensor | None = None) -> Tensor:
        """``(B, T, d)`` to ``(B, T, d)``; ``real`` ``(B, T)``: tokens that count for balance, None = all."""
        tokens = x.flatten(0, 1)
        out = self.experts(tokens, *self.router(tokens, None if real is None else real.flatten()))
        if self.shared is not None:
            always = self.shared(tokens)
            out = out + (always if self.shared_gate is None else always * self.shared_gate(tokens))
        return out.view_as(x)  # type: ignore[no-any-return]


def mlp_of(a: Architecture, layer: Layer) -> MLP | MixtureOfExperts:
    """What a layer has after its mixer."""
    return MixtureOfExperts(a) if layer.sparse else MLP(a, a.intermediate_size)
