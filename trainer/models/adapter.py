"""What a run trains of its model: the contract, and all of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from trainer.config import Node, schema
from trainer.models.architecture import Architecture
from trainer.models.peft_format import Settings
from trainer.models.transformer import Transformer


@dataclass
class Adapter(Node):
    """The contract: which parameters are trained, and what of them is written in the end."""

    rate: ClassVar[float] = 1.0
    """Factor of the pipeline's learning rate where ``optimizer.lr=null``."""
    freezes_model: ClassVar[bool] = False
    """Whether the model is frozen and parameters beside it are trained, which `merged` and `peft_settings` then take."""

    def validate_architecture(self, architecture: Architecture) -> None:
        """Check that it fits a model.

        Raises:
            ConfigError: if it does not.
        """

    def trained(self, architecture: Architecture, grown: bool) -> int:
        """Elements that are trained beside a frozen model; 0 = the model itself is. ``grown``: as for `install`."""
        return 0

    def construction(self) -> AbstractContextManager[object]:
        """The context in which a model's layers are built, before `install`."""
        return nullcontext()

    def packed(self, architecture: Architecture) -> dict[str, tuple[int, ...]]:
        """Shapes of the frozen weights that are held in NF4, by name."""
        return {}

    def packed_elements(self, architecture: Architecture) -> tuple[int, int]:
        """Elements of all of these weights, and of the largest one."""
        sizes = [math.prod(shape) for shape in self.packed(architecture).values()]
        return sum(sizes), max(sizes, default=0)

    def remarks(self, architecture: Architecture) -> Iterator[str]:
        """What the start of a run says of it, a line each."""
        yield from ()

    def install(self, model: Transformer, *, grown: bool) -> None:
        """Change a newly built model, before it has values. ``grown``: its vocabulary has tokens that its folder lacks."""

    def initial(self, name: str, shape: Sequence[int], seed: int) -> Tensor | None:
        """The first values of a parameter that `install` added; None for the model's own."""
        return None

    def frozen_matrices(self, model: nn.Module) -> Iterator[nn.Parameter]:
        """What may be held in the compute format, because no step changes it."""
        yield from ()

    def validate_compiled(self) -> Iterator[str]:
        """One sentence for why it does not work in compiled blocks."""
        yield from ()

    def validate_rounded(self) -> Iterator[str]:
        """One sentence for why its weights cannot be rounded in training (``qat``)."""
        yield from ()

    def moves_reference(self, new_tokens: int) -> str | None:
        """Why the model with this switched off is not the policy before its first step; None where it is.

        ``new_tokens``: tokens that the model's folder lacks.
        """
        return "adapter=none trains every weight"

    @property
    def at_start(self) -> Adapter:
        """What of it a model before its first step has: what a frozen copy of that is built with."""
        return Full()

    @property
    def exports(self) -> bool:
        """Whether a whole model is written in the end."""
        return True

    @property
    def merges_onto_original(self) -> bool:
        """Whether adapters are merged onto the model's weights as they are stored, not onto what was trained beside them."""
        return False

    def record(self, base: str | None, latest: Mapping[str, float]) -> dict[str, Any]:
        """What the record of an export says of it beside its settings.

        ``base``: the folder of the model. ``latest``: the last value of every metric of the run.
        """
        return {}

    def card(self, base: str | None) -> str | None:
        """The README of a folder in PEFT's layout; None where its configuration says all. ``base`` as in `record`."""
        return None

    def merged(self, name: str, trained: Mapping[str, Tensor], start: Callable[[str], Tensor]) -> Tensor:
        """A tensor of the model, what was trained beside it merged in; ``start``: its values before training by name."""
        raise NotImplementedError

    def peft_settings(self, trained: Mapping[str, Tensor]) -> Settings:
        """What PEFT must know to open the trained tensors as an adapter."""
        raise NotImplementedError


@schema("adapter/none")
@dataclass
class Full(Adapter):
    """Every weight of the model is trained."""
