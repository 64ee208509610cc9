"""Replicated training: PyTorch's DistributedDataParallel, or the bare module on one rank."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from trainer.batch import Batch
from trainer.config import schema, setting
from trainer.optim import Optimizer, create_state, gradient_norm, moments
from trainer.parallel import distributed
from trainer.parallel.engine import Engine, Fragment, LossOf, Outcome, Report, digest_of, owned_spans
from trainer.parallel.precision import Precision
from trainer.parallel.strategy import Strategy


@schema("strategy/ddp")
@dataclass
class DDP(Strategy):
    """Every rank holds the whole model; gradients are averaged in buckets while the backward runs."""

    bucket_mb: int = setting(25, "size of a gradient bucket, MiB", least=1)

    def wrap(self, module: nn.Module, optimizer: Optimizer, precision: Precision) -> Engine:
        return ReplicatedEngine(module, optimizer, precision, self.bucket_mb)


class ReplicatedEngine(Engine):
    """Float32 replicas under autocast; clipping and loss scaling ride on the fused optimizer's own pass."""

    def __init__(self, module: nn.Module, optimizer: Optimizer, precision: Precision, bucket_mb: int) -> None:
        world = distributed.world()
        self.device, self.ranks = world.device, world.size
        self.module = module.to(self.device)
        self.model: nn.Module = self.module
        if world.size > 1:
            self.model = DistributedDataParallel(
                self.module, bucket_cap_mb=bucket_mb, gradient_as_bucket_view=True, broadcast_buffers=False
            )
        self.clip = optimizer.clip
        self.optimizers = optimizer.build(self.module)
        self.precision = precision
        self.scale = precision.loss_scale(self.device)
        self._weighed = torch.ones((), dtype=torch.bool, device=self.device)
        self._warm = False

    def accumulate(self, loss_of: LossOf[Report], micro_batches: Sequence[Batch], weight: Tensor) -> list[Report]:
        reports = []
        self.model.train()
        self._weighed = weight > 0
        # DDP averages over ranks; the objective is a sum over them. A weight of 0 leaves a gradient of 0.
        factor = self.scale.scale * self.ranks / weight.clamp(min=1e-30).float()
        if self.ranks > 2 and not self._warm:
            self._warm_up(loss_of, micro_batches[0])
        # One context around all of them: autocast then casts every weight once a step.
        with self.autocast():
            for number, batch in enumerate(micro_batches, start=1):
                # no_sync spans the forward too: DDP arms its reducer there.
                with self._silent() if number < len(micro_batches) else nullcontext():
                    loss, report = loss_of(batch.to(self.device))
                    with torch.autocast(self.device.type, enabled=False):
                        (loss * factor).backward()  # type: ignore[no-untyped-call]
                reports.append(report)
        return reports

    def _warm_up(self, loss_of: LossOf[Any], batch: Batch) -> None:
        """Let DDP order its buckets before the first step instead of after it.

        A sum over more than two ranks depends on the buckets, so a resumed run would differ from an uninterrupted one in the
        last bits of its first step.
        """
        with self.autocast():
            loss_of(batch.to(self.device))[0].backward()  # type: ignore[no-untyped-call]
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        self._warm = True

    def step(self, limit: Tensor | None = None) -> Outcome:
        parameters = [p for o in self.optimizers for g in o.param_groups for p in g["params"]]
        norm = gradient_norm(parameters) / self.scale.scale
        finite = torch.isfinite(norm)
        applied = finite & self._weighed
        if limit is not None:
            applied = applied & (norm <= limit)
        shrink = (self.clip / (norm + 1e-6)).clamp(max=1.0) if self.clip else torch.ones_like(norm)
        divisor = self.scale.scale / torch.where(finite, shrink, 1.0)
        if all(isinstance(o, torch.optim.AdamW) for o in self.optimizers):
            self._step_fused(divisor, applied)
        elif bool(applied):
            torch._foreach_div_([p.grad for p in parameters if p.grad is not None], divisor)
            for optimizer in self.optimizers:
                optimizer.step()
        self.scale.update(~finite)
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        return Outcome(norm, applied)

    def _step_fused(self, divisor: Tensor, applied: Tensor) -> None:
        """Divide, skip and update in one kernel, without asking the device whether the gradient was finite."""
        for optimizer in self.optimizers:
            fused: Any = optimizer
            fused.grad_scale, fused.found_inf = divisor, (~applied).float()
            optimizer.step()

    def _silent(self) -> AbstractContextManager[None]:
        return self.model.no_sync() if isinstance(self.model, DistributedDataParallel) else nullcontext()

    def set_lr(self, factor: float) -> None:
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["base_lr"] * factor

    def autocast(self) -> AbstractContextManager[Any]:
        return self.precision.autocast(self.device)

    @contextmanager
    def gathered(self, *, only: Callable[[str], bool] = bool) -> Iterator[nn.Module]:
        yield self.module

    def weights(self, *, frozen: bool = True) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in self._logical(frozen=frozen):
            yield name, tensor.detach()

    def fragments(self, *, owned: bool) -> Iterator[Fragment]:
        for optimizer in self.optimizers:
            create_state(optimizer)
        tensors = list(self._logical(frozen=False))
        for number, first, last in owned_spans([t.numel() for _, t in tensors], owned=owned):
            name, tensor = tensors[number]
            for state, values in self._states(tensor).items():
                yield Fragment(name, state, tuple(tensor.shape), first, values.detach().view(-1)[first:last])

    def digest(self) -> list[int]:
        return digest_of(tensor for _, tensor in self._logical())

    def optimizer_steps(self) -> dict[str, float]:
        names = {id(t): name for name, t in self._logical()}
        held = ((p, s) for o in self.optimizers for p, s in o.state.items() if "step" in s)
        return {names[id(p)]: float(s["step"]) for p, s in held}

    def restored(self, steps: Mapping[str, float], state: Mapping[str, Any]) -> None:
        tensors = dict(self._logical())
        for optimizer in self.optimizers:
            create_state(optimizer)
            for name, step in steps.items():
                if "step" in (held := optimizer.state.get(tensors[name], {})):
                    held["step"].fill_(step)
        self.scale.load(state.get("loss_scale", {}))

    def state(self) -> dict[str, Any]:
        return {"loss_scale": self.scale.state()}

    def _logical(self, *, frozen: bool = True) -> Iterator[tuple[str, Tensor]]:
        """Every parameter and every buffer that belongs to the saved model, by name, tied ones once."""
        yield from ((name, p) for name, p in self.module.named_parameters() if frozen or p.requires_grad)
        saved = self.module.state_dict(keep_vars=True)
        yield from ((name, b) for name, b in self.module.named_buffers() if name in saved and b.numel())

    def _states(self, tensor: Tensor) -> dict[str, Tensor]:
        views = {"param": tensor}
        for optimizer in self.optimizers:
            if tensor in optimizer.state:
                views.update({name: optimizer.state[tensor][name] for name in moments(optimizer)})
        return views
