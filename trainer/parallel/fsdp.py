"""Weights, gradients and optimizer state in shards, by PyTorch alone (FSDP; Zhao et al. 2023, arXiv:2304.11277)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import ClassVar
from unittest import mock

import torch
from torch import Tensor, nn

from trainer.config import schema, setting
from trainer.optim import Optimizer
from trainer.parallel import distributed
from trainer.parallel.engine import Engine
from trainer.parallel.precision import Compute, Precision
from trainer.parallel.strategy import Offload, Strategy

# PyTorch's own FSDP is imported where it is first needed: with DTensor it takes half a second of every start.


@schema("strategy/fsdp")
@dataclass
class FSDP(Strategy):
    """Every rank holds its rows of every weight; a block's weights are gathered where it computes."""

    float_rows: ClassVar[bool] = True

    reshard: bool = setting(
        True,
        "give a block's weights back behind its forward and gradients with every micro-batch, as ZeRO-3 does; false: keep "
        "both through a step, for fewer exchanges",
    )
    autocast: bool | None = setting(
        None, "bf16 by autocast over float32 weights instead of gathering bf16 weights; null = on CPU only"
    )
    offload: Offload = setting(
        Offload.none, "what lives in CPU memory: nothing, or parameters with all that belongs to them"
    )

    @property
    def stage(self) -> int:
        return 3

    def problems(self) -> Iterator[str]:
        if self.offload is Offload.optimizer:
            yield "strategy.offload=optimizer needs strategy=zero1, zero2 or zero3; use parameters, which takes all with it"

    def validate_device(self, *, cuda: bool) -> Iterator[str]:
        if self.offload is not Offload.none and not cuda:
            yield "strategy.offload=parameters needs a GPU to compute on; use none"

    def construction(self) -> AbstractContextManager[object]:
        return _parameters_on_meta()

    def place(self, module: nn.Module, blocks: Iterable[nn.Module], precision: Precision) -> None:
        from trainer.parallel import sharding

        low = self.low_precision_weights(precision, cuda=distributed.world().device.type == "cuda")
        sharding.shard(
            module, blocks, dtype=precision.dtype if low else None, reshard=self.reshard,
            offload=self.offload is not Offload.none,
        )  # fmt: skip

    @torch.no_grad()
    def fill(self, parameter: nn.Parameter, values: Tensor) -> None:
        from trainer.parallel import sharding

        first, last = sharding.rows(parameter.shape)
        sharding.local(parameter).copy_(values[first:last])

    def cast_frozen(self, parameter: nn.Parameter, dtype: torch.dtype) -> None:
        from trainer.parallel import sharding

        if parameter.is_floating_point():
            sharding.cast(parameter, dtype)

    def wrap(self, module: nn.Module, optimizer: Optimizer, precision: Precision) -> Engine:
        from trainer.parallel.sharded_engine import ShardedEngine

        low = self.low_precision_weights(precision, cuda=distributed.world().device.type == "cuda")
        return ShardedEngine(module, optimizer, precision, low_precision=low, reshard=self.reshard)

    def freeze(self, module: nn.Module, precision: Precision) -> nn.Module:
        from trainer.parallel import sharding

        self.narrow(module, precision)
        sharding.always_reshard(module)
        return module

    def low_precision_weights(self, precision: Precision, *, cuda: bool) -> bool:
        """Whether weights are gathered in bfloat16; this rank's rows are float32 all the same."""
        autocast = not cuda if self.autocast is None else self.autocast
        return precision.compute is Compute.bf16 and not autocast


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Parameters have no memory until they are divided; buffers have values, and what is tied is one parameter."""
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:
            parameter = nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)
        register(module, name, parameter)

    with mock.patch.object(nn.Module, "register_parameter", on_meta):
        yield
