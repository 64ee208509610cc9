"""The part of a decoder that a rank has where a pipeline divides the layers."""

from __future__ import annotations

from typing import Any

from torch import nn

from trainer.models.architecture import Architecture
from trainer.models.experts import AbsentRouter
from trainer.parallel.mesh import Axis
from trainer.parallel.stages import PassThrough, Received


def keep_stage(model: nn.Module, axis: Axis) -> None:
    """Leave of a newly built decoder what this rank of a pipeline has; names stay as they are.

    Its layers; with the first ones the embedding, with the last ones the final norm and the head. A tied table is at both.
    """
    if axis.size == 1:
        return
    decoder: Any = model.model
    model.stages = axis  # type: ignore[assignment]
    a: Architecture = model.architecture  # type: ignore[assignment]
    first, last = axis.span(len(decoder.layers))
    for number in (*range(first), *range(last, len(decoder.layers))):
        absent = decoder.layers[number] = PassThrough()
        if a.layers[number].sparse:
            absent.router = AbsentRouter(a)
    at_end, head = axis.rank == axis.size - 1, "score" if a.scores else "lm_head"
    if axis.rank == 0:
        # Its gradient meets that of the head on another rank, where both are dense.
        decoder.embed_tokens.tied = False
    else:
        tied = a.tie_word_embeddings and not a.scores
        decoder.embed_tokens = Received(a.hidden_size, decoder.embed_tokens.weight if tied and at_end else None)
    if not at_end:
        decoder.norm = PassThrough()
        setattr(model, head, PassThrough())
