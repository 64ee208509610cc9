"""How a model is spread over the ranks: the choice that `strategy=` makes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from enum import StrEnum, auto
from typing import ClassVar

import torch
from torch import Tensor, nn

from trainer.config import Node
from trainer.optim import Optimizer
from trainer.parallel import distributed
from trainer.parallel.engine import Engine
from trainer.parallel.mesh import UNDIVIDED, Axis, MeshShape
from trainer.parallel.precision import Precision


class Offload(StrEnum):
    """What lives in CPU memory."""

    none = auto()
    optimizer = auto()
    parameters = auto()


@dataclass
class Strategy(Node):
    """The contract of every strategy; what it returns hides how many ranks there are."""

    @property
    def name(self) -> str:
        """The name that users type."""
        return type(self).__name__.lower()

    @property
    def stage(self) -> int:
        """What is sharded: 0 nothing, 1 optimizer state, 2 gradients too, 3 parameters too."""
        return 0

    float_rows: ClassVar[bool] = False
    """Whether a rank's shards are float32 rows, with no working copy beside them."""

    @property
    def mesh(self) -> MeshShape:
        """How many ranks divide what of a replica."""
        return MeshShape()

    @property
    def stages(self) -> Axis:
        """The ranks that have different layers of a model, among them this one; in a session."""
        return UNDIVIDED

    def low_precision_weights(self, precision: Precision, *, cuda: bool) -> bool:
        """Whether the working copy of the weights is in the compute format, instead of float32 under autocast."""
        return False

    def validate_optimizer(self, optimizer: Optimizer) -> Iterator[str]:
        """One sentence for everything about an optimizer that does not work under this strategy."""
        yield from ()

    def validate_compiled(self) -> Iterator[str]:
        """One sentence for why compiled blocks do not work under this strategy."""
        yield from ()

    def validate_packed(self) -> Iterator[str]:
        """One sentence for why frozen weights in four bits do not work under this strategy."""
        yield from ()

    def validate_device(self, *, cuda: bool) -> Iterator[str]:
        """One sentence for everything that needs another device."""
        yield from ()

    def construction(self) -> AbstractContextManager[object]:
        """The context in which a model is built: parameters are initialised sharded where the strategy shards them."""
        return nullcontext()

    def place(self, module: nn.Module, blocks: Iterable[nn.Module], precision: Precision) -> None:
        """Divide a newly built model before it is filled, where the strategy does; ``blocks``: its layers. Collective."""

    def shape_of(self, parameter: nn.Parameter) -> tuple[int, ...]:
        """The logical shape of a parameter, also where this strategy shards its data away."""
        return tuple(parameter.shape)

    @torch.no_grad()
    def fill(self, parameter: nn.Parameter, values: Tensor) -> None:
        """Write into a parameter of a newly built model: this rank's part of ``values``, which is the whole parameter."""
        parameter.copy_(values)

    def cast_frozen(self, parameter: nn.Parameter, dtype: torch.dtype) -> None:
        """Hold a parameter that is never trained in the compute format: autocast keeps no cast of it from use to use.

        One that holds bytes stays as it is.
        """
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)

    def wrap(self, module: nn.Module, optimizer: Optimizer, precision: Precision) -> Engine:
        """Train ``module`` under this strategy."""
        raise NotImplementedError(f"strategy {self.name} trains nothing")

    def freeze(self, module: nn.Module, precision: Precision) -> nn.Module:
        """Keep ``module`` for forwards alone, sharded where the strategy shards, with the numerics of a trained model.

        What autocast would cast in every forward is cast once here: it takes half the memory.
        """
        self.narrow(module, precision)
        return module.to(distributed.world().device)

    def narrow(self, module: nn.Module, precision: Precision) -> None:
        """Make a module one for forwards alone, in the formats that a trained one computes in."""
        module.requires_grad_(False).eval()
        device = distributed.world().device
        if precision.dtype is not torch.float32:
            # Never the buffers: DeepSpeed leaves the angles of a trained model in float32, too.
            low_precision = self.low_precision_weights(precision, cuda=device.type == "cuda")
            for layer in module.modules():
                narrow = low_precision or isinstance(layer, nn.Linear) or getattr(layer, "casts_weights", False)
                for parameter in layer.parameters(recurse=False) if narrow else ():
                    self.cast_frozen(parameter, precision.dtype)

    def computing(self, precision: Precision) -> AbstractContextManager[object]:
        """The context in which models of this strategy compute."""
        device = distributed.world().device
        return (
            nullcontext()
            if self.low_precision_weights(precision, cuda=device.type == "cuda")
            else precision.autocast(device)
        )
