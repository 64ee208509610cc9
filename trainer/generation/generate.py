"""Sampling from a decoder: many prompts at once, each slot taken over by a waiting prompt as soon as it is free."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

from torch import nn

from trainer.generation.completion import Completion
from trainer.generation.decoding import Decoding
from trainer.generation.sampling import Sampling
from trainer.models.packed import widened


def generate(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    stops: Collection[int],
    keys: Sequence[tuple[int, ...]] | None = None,
    max_concurrent: int = 64,
) -> list[Completion]:
    """A completion of every prompt, in their order; at most ``max_concurrent`` are decoded at once.

    ``keys``: what the draws of each completion depend on, with the position; default (0, n). So a token is a function of
    its key, its position, the prompt and the model, not of what it is decoded with, in which order, or on which rank.
    (Sums of other shapes may differ in the last bits of a logit; what is drawn then changes only if the draw falls between
    the two, in float32 about once in 10^6 tokens.) Equal prompts pass through the model once and are copied.

    Raises:
        ValueError: if a prompt is empty, or there are not as many keys as prompts.
    """
    done = {}
    with widened(model):
        for sequence in Decoding(model, prompts, sampling, stops=stops, keys=keys, max_concurrent=max_concurrent):
            if sequence.done:
                done[sequence.number] = Completion(sequence.ids, sequence.logprobs, sequence.ended)
    return [done[n] for n in range(len(prompts))]


def stream(
    model: nn.Module,
    prompt: Sequence[int],
    sampling: Sampling,
    *,
    stops: Collection[int],
    key: tuple[int, ...] = (0, 0),
) -> Iterator[int]:
    """The tokens of `generate` for one prompt, each as soon as it is known."""
    with widened(model):
        for sequence in Decoding(model, [prompt], sampling, stops=stops, keys=[key], max_concurrent=1):
            yield sequence.ids[-1]
