"""Weights, gradients and optimizer state in shards, by PyTorch alone (FSDP; Zhao et al. 2023, arXiv:2304.11277)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import ClassVar, Protocol, runtime_checkable
from unittest import mock

import torch
from torch import Tensor, nn

from trainer.config import schema, setting
from trainer.optim import Optimizer
from trainer.parallel import distributed
from trainer.parallel.cuts import Cut
from trainer.parallel.engine import Engine
from trainer.parallel.mesh import Axis, Mesh, MeshShape
from trainer.parallel.precision import Compute, Precision
from trainer.parallel.strategy import Offload, Strategy

# PyTorch's own FSDP is imported where it is first needed: with DTensor it takes half a second of every start.


@runtime_checkable
class Divisible(Protocol):
    """A module whose weights and work the ranks of a replica can divide among them."""

    def divide(self, mesh: Mesh) -> None:
        """Cut the parameters, which have no values yet, for this rank (`cuts.cut`), and compute with others from now on."""


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

    tensor: int = setting(1, "ranks that divide every matrix among them, and with it its layer's work", least=1)
    sequence: int = setting(1, "ranks that divide the tokens of every row among them (Ulysses)", least=1)
    expert: int = setting(1, "ranks that divide the experts of a mixture among them", least=1)
    pipeline: int = setting(1, "ranks that divide the layers among them, and pass micro-batches on", least=1)

    @property
    def stage(self) -> int:
        return 3

    @property
    def mesh(self) -> MeshShape:
        return MeshShape(self.pipeline, self.sequence, self.tensor, self.expert)

    @property
    def stages(self) -> Axis:
        return Mesh.of(self.mesh).pipeline

    def problems(self) -> Iterator[str]:
        if self.offload is Offload.optimizer:
            yield "strategy.offload=optimizer needs strategy=zero1, zero2 or zero3; use parameters, which takes all with it"
        if self.expert > 1 and (lack := _needs("2.12")):
            yield f"strategy.expert={self.expert} {lack}; use 1"
        if self.pipeline > 1 and self.offload is Offload.parameters:
            yield f"strategy.pipeline={self.pipeline} is not built to go with strategy.offload=parameters; use one of them"

    def validate_compiled(self) -> Iterator[str]:
        if self.expert > 1:
            yield (
                f"model.compile=true does not work with strategy.expert={self.expert}, where every layer waits for how many "
                "tokens go where; use model.compile=false"
            )
        if self.tensor > 1:
            yield (
                f"model.compile=true has not been run with strategy.tensor={self.tensor}, which adds up over ranks inside of "
                "blocks; use model.compile=false"
            )

    def validate_packed(self) -> Iterator[str]:
        # Before, `fully_shard` made a parameter that has a gradient of every tensor, which bytes cannot be.
        if lack := _needs("2.12"):
            yield f"adapter=qlora under strategy=fsdp {lack}; use strategy=zero3, or adapter=lora"

    def validate_device(self, *, cuda: bool) -> Iterator[str]:
        if self.offload is not Offload.none and not cuda:
            yield "strategy.offload=parameters needs a GPU to compute on; use none"

    def construction(self) -> AbstractContextManager[object]:
        return _parameters_on_meta()

    def place(self, module: nn.Module, blocks: Iterable[nn.Module], precision: Precision) -> None:
        from trainer.parallel import sharding

        mesh = Mesh.of(self.mesh)
        if self.mesh.axes and isinstance(module, Divisible):
            module.divide(mesh)
        low = self.low_precision_weights(precision, cuda=distributed.world().device.type == "cuda")
        sharding.shard(
            module, blocks, mesh, dtype=precision.dtype if low else None, reshard=self.reshard,
            offload=self.offload is not Offload.none,
        )  # fmt: skip

    def shape_of(self, parameter: nn.Parameter) -> tuple[int, ...]:
        cut: Cut | None = getattr(parameter, "cut", None)
        return tuple(parameter.shape) if cut is None else cut.shape

    @torch.no_grad()
    def fill(self, parameter: nn.Parameter, values: Tensor) -> None:
        from trainer.parallel import sharding

        sharding.local(parameter).copy_(sharding.cut_of(parameter).own(values))

    def cast_frozen(self, parameter: nn.Parameter, dtype: torch.dtype) -> None:
        from trainer.parallel import sharding

        if parameter.is_floating_point():
            sharding.cast(parameter, dtype)

    def wrap(self, module: nn.Module, optimizer: Optimizer, precision: Precision) -> Engine:
        from trainer.parallel.sharded_engine import ShardedEngine
        from trainer.parallel.staged_engine import StagedEngine

        low = self.low_precision_weights(precision, cuda=distributed.world().device.type == "cuda")
        how = {"low_precision": low, "reshard": self.reshard}
        if self.pipeline > 1:
            return StagedEngine(module, optimizer, precision, self.stages, **how)
        return ShardedEngine(module, optimizer, precision, **how)

    def freeze(self, module: nn.Module, precision: Precision) -> nn.Module:
        from trainer.parallel import sharding

        self.narrow(module, precision)
        sharding.always_reshard(module)
        return module

    def low_precision_weights(self, precision: Precision, *, cuda: bool) -> bool:
        """Whether weights are gathered in bfloat16; this rank's rows are float32 all the same."""
        autocast = not cuda if self.autocast is None else self.autocast
        return precision.compute is Compute.bf16 and not autocast


def _needs(version: str) -> str:
    """What an installed torch that is older than that lacks, the end of a sentence; empty where it is not."""
    old = torch.__version__ < version
    return f"needs torch {version} or later, and this is {torch.__version__}" if old else ""


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
