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
from trainer.optim import Optimizer, applies_on_device, create_state, gradient_norm, moments
from trainer.optim.muon import Replicas
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
    """Float32 replicas under autocast; clipping and loss scaling ride on the fused optimizer's own pass.

    Args:
        bucket_mb: Size of a gradient bucket, MiB; None = no DistributedDataParallel: a subclass exchanges gradients.
    """

    def __init__(self, module: nn.Module, optimizer: Optimizer, precision: Precision, bucket_mb: int | None) -> None:
        super().__init__(module, optimizer, precision)
        module.to(self.device)
        if self.ranks > 1 and bucket_mb is not None:
            self.model = DistributedDataParallel(
                module, bucket_cap_mb=bucket_mb, gradient_as_bucket_view=True, broadcast_buffers=False
            )
        self.optimizers = optimizer.build(module)
        data = distributed.world().data
        optimizer.share_work(self.optimizers, Replicas(data.rank, data.size, distributed.stack_over_data))
        self._warm = self.ranks < 3 or self.model is module

    def accumulate(self, loss_of: LossOf[Report], micro_batches: Sequence[Batch], weight: Tensor) -> list[Report]:
        if not self._warm:
            self.model.train()
            self._warm_up(loss_of, micro_batches[0])
        return super().accumulate(loss_of, micro_batches, weight)

    def exchanging(self, last: bool) -> AbstractContextManager[Any]:
        # no_sync spans the forward too: DDP arms its reducer there.
        if isinstance(self.model, DistributedDataParallel) and not last:
            return self.model.no_sync()
        return nullcontext()

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
        norm, applied, divisor = self.decide(gradient_norm(parameters), limit)
        if all(applies_on_device(o) for o in self.optimizers):
            self._step_fused(divisor, applied)
        elif bool(applied):
            torch._foreach_div_([p.grad for p in parameters if p.grad is not None], divisor)
            for optimizer in self.optimizers:
                optimizer.step()
        self.scale.update(~torch.isfinite(norm))
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        return Outcome(norm, applied)

    def _step_fused(self, divisor: Tensor, applied: Tensor) -> None:
        """Divide, skip and update in the optimizers' own passes, without asking the device about the gradient."""
        for optimizer in self.optimizers:
            fused: Any = optimizer
            fused.grad_scale, fused.found_inf = divisor, (~applied).float()
            optimizer.step()

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
        states = ((p, s) for o in self.optimizers for p, s in o.state.items() if "step" in s)
        return {names[id(p)]: float(s["step"]) for p, s in states}

    def restored(self, steps: Mapping[str, float], state: Mapping[str, Any]) -> None:
        tensors = dict(self._logical())
        for optimizer in self.optimizers:
            create_state(optimizer)
            for name, step in steps.items():
                if "step" in (own := optimizer.state.get(tensors[name], {})):
                    own["step"].fill_(step)
        self.scale.load(state.get("loss_scale", {}))

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
