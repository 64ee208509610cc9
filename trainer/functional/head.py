"""The projection that a reader is given: what makes logits of hidden states."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import linear

from trainer.functional.vocabulary_part import VocabularyPart


@dataclass(frozen=True)
class Head:
    """The output embedding ``weight`` ``(V, d)``, or a vector that scores ``(1, d)``.

    ``cap``: bound of the logits, ``cap * tanh(logits / cap)``, which cannot be folded into the weight; None = none.
    ``part``: which rows of the vocabulary the weight is, where ranks divide it; None = all. All ranks then read the same
    hidden states by the same reader, and get bitwise the same values; each has its part of the hidden states' gradient.
    """

    weight: Tensor
    cap: float | None = None
    part: VocabularyPart | None = None

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits ``(..., V)`` of ``hidden`` ``(..., d)``.

        Raises:
            RuntimeError: where a gradient is wanted of logits of which this rank computes a part.
        """
        out = linear(hidden, self.weight)
        out = out if self.cap is None else self.cap * (out / self.cap).tanh()
        if self.part is None:
            return out
        if out.requires_grad:
            raise RuntimeError("logits of a divided vocabulary have no gradient: read log-probabilities instead")
        return self.part.joined(out)


def bound(logits: Tensor, cap: float | None) -> Tensor | None:
    """Bound logits in place; gives the slope, by which a gradient of bounded ones is multiplied. None: both as they are."""
    if cap is None:
        return None
    part = logits.div_(cap).tanh_()
    slope = 1 - part.square()
    logits.mul_(cap)
    return slope


def tempered(scores: Tensor, temperature: float) -> Tensor:
    """Logits divided by the temperature, in float32: a shorter format would round them again."""
    return scores if temperature == 1.0 else scores.float().div_(temperature)
