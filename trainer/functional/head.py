"""The projection that a reader is given: what makes logits of hidden states."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import linear


@dataclass(frozen=True)
class Head:
    """The output embedding ``weight`` ``(V, d)``, or a vector that scores ``(1, d)``.

    ``cap``: bound of the logits, ``cap * tanh(logits / cap)``, which cannot be folded into the weight; None = none.
    """

    weight: Tensor
    cap: float | None = None

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits ``(..., V)`` of ``hidden`` ``(..., d)``."""
        out = linear(hidden, self.weight)
        return out if self.cap is None else self.cap * (out / self.cap).tanh()


def bound(logits: Tensor, cap: float | None) -> Tensor | None:
    """Bound logits in place; gives the slope, by which a gradient of bounded ones is multiplied. None: both as they are."""
    if cap is None:
        return None
    part = logits.div_(cap).tanh_()
    slope = 1 - part.square()
    logits.mul_(cap)
    return slope
