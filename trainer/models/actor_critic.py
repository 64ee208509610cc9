"""A policy under its own names, and beside it, as ``critic.*``, what estimates its returns: one module, one engine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from trainer.batch import Branches, Documents
from trainer.functional import At, Head
from trainer.models.architecture import Architecture
from trainer.models.context import Context
from trainer.models.recompute import Recompute
from trainer.models.transformer import Read, Transformer
from trainer.parallel.mesh import UNDIVIDED, Axis, Mesh

CRITIC = "critic."
"""Begins the names of all that is not the policy's."""


class ActorCritic(Transformer):
    """A language model with a critic: a scoring model of its own, or a vector that reads the policy's hidden states.

    ``rates``: base learning rates by beginning of name.
    """

    critic: nn.Module

    def __init__(self, architecture: Architecture, recompute: Recompute = Recompute.none) -> None:
        super().__init__(architecture, recompute)
        self.rates: Mapping[str, float] = {}

    def forward(
        self, tokens: Tensor, documents: Documents | Branches | Context, read: Read | None, values: Read | None = None
    ) -> Any:
        """What ``read`` makes of the policy (None = nothing); with ``values``, also what that makes of the critic."""
        if values is None:
            assert read is not None
            return super().forward(tokens, documents, read)
        if isinstance(self.critic, Transformer):
            policy = None if read is None else super().forward(tokens, documents, read)
            return policy, self.critic(tokens, documents, values)

        def both(hidden: Tensor, head: Head) -> Any:
            return None if read is None else read(hidden, head), self.critic(hidden, values)

        return super().forward(tokens, documents, both)


class ValueHead(nn.Module):
    """A vector that reads values off a policy's own hidden states; it begins at zero, so every value does.

    Attributes:
        sequence: Ranks that joined the hidden states, and all read the same values.
        vocabulary: Ranks whose gradients of the hidden states are added up, as of parts of a vocabulary.
    """

    sequence: Axis = UNDIVIDED
    vocabulary: Axis = UNDIVIDED

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, size))

    def divide(self, mesh: Mesh) -> None:
        """Read the same values as other ranks."""
        self.sequence, self.vocabulary = mesh.sequence, mesh.vocabulary

    def forward(self, hidden: Tensor, read: Read) -> Any:
        return read(self.vocabulary.even(hidden), Head(self.sequence.even(self.weight)))


def of_policy(name: str) -> bool:
    """Whether a parameter is the policy's."""
    return not name.startswith(CRITIC)


def values_at(places: Tensor) -> At:
    """A reader of float32 scores ``(n,)``, off the tokens at ``places`` of a single row."""
    return At(places, _values)


def _values(hidden: Tensor, head: Head) -> Tensor:
    with torch.autocast(hidden.device.type, enabled=False):
        return linear(hidden[0].float(), head.weight.float())[:, 0]
