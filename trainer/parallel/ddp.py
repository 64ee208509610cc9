"""Replicated training: PyTorch's DistributedDataParallel, or the bare module on one rank."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from trainer.batch import Batch
from trainer.config import schema, setting
from trainer.optim import Optimizer
from trainer.optim.muon import Replicas
from trainer.optim.state import create_state, elements
from trainer.parallel import distributed
from trainer.parallel.engine import Engine, Fragment, LossOf, Report, digest_of, owned_spans, saved_buffers
from trainer.parallel.native import NativeEngine
from trainer.parallel.precision import Precision
from trainer.parallel.strategy import Strategy


@schema("strategy/ddp")
@dataclass
class DDP(Strategy):
    """Every rank holds the whole model; gradients are averaged in buckets while the backward runs."""

    bucket_mb: int = setting(25, "size of a gradient bucket, MiB", least=1)

    def wrap(self, module: nn.Module, optimizer: Optimizer, precision: Precision) -> Engine:
        return ReplicatedEngine(module, optimizer, precision, self.bucket_mb)


class ReplicatedEngine(NativeEngine):
    """Float32 replicas under autocast.

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
            for state, values in self.states(tensor).items():
                own = elements(values, first, last, restoring=not owned)
                yield Fragment.of_tensor(name, state, tensor.shape, first, own)

    def digest(self) -> list[int]:
        return digest_of(tensor for _, tensor in self._logical())

    def trained(self) -> Iterator[tuple[str, Tensor]]:
        return self._logical(frozen=False)

    def _logical(self, *, frozen: bool = True) -> Iterator[tuple[str, Tensor]]:
        """Every parameter and every buffer that belongs to the saved model, by name, tied ones once."""
        yield from ((name, p) for name, p in self.module.named_parameters() if frozen or p.requires_grad)
        yield from saved_buffers(self.module)
