"""Completions with their scores and log-probabilities: what an iteration is judged by, the same on all ranks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from trainer.data.corpus import Prompt
from trainer.generation.completion import Completion, Response
from trainer.parallel import distributed
from trainer.rl.rewards import Scorer

T = TypeVar("T")
Scores = dict[str, list[float | None]]
"""A score a completion by the name of its reward, None where one is missing; ``score`` is what is trained on."""


class PromptGroup(NamedTuple):
    """A prompt with its completions.

    row: the prompt's row number in the data
    number: its place in the iteration
    prompt: its tokens and text, on the rank that sampled all of it
    completions: what the policy sampled
    """

    row: int
    number: int
    prompt: Prompt
    completions: list[Completion]


class RolloutLogprobs(NamedTuple):
    """Log-probabilities and values of a group's completions at sampling time; N tokens end to end, C completions.

    logprobs: the policy's, nats (N,)
    entropy: of the policy's distribution at each token (N,); minus ``logprobs``, whose mean estimates it, where the sampler's
        log-probabilities serve
    reference: the reference's log-probabilities (N,); the policy's where there is none
    values: the critic's, where each token is predicted (N,)
    bootstrap_values: the critic's behind each completion (C,)
    """

    logprobs: Tensor
    entropy: Tensor
    reference: Tensor
    values: Tensor
    bootstrap_values: Tensor


class ScoredRollouts(NamedTuple):
    """Groups of an iteration, in order, with their log-probabilities and scores."""

    groups: list[PromptGroup]
    logprobs: list[RolloutLogprobs]
    scores: Scores

    @property
    def completions(self) -> list[Completion]:
        """All of them, in order."""
        return [completion for group in self.groups for completion in group.completions]

    def column(self, name: str) -> Tensor:
        """A field of `RolloutLogprobs` over all groups, end to end."""
        return torch.cat([getattr(part, name) for part in self.logprobs])

    def of_group(self, values: Sequence[T], number: int) -> Sequence[T]:
        """What of a value a completion is a group's."""
        size = len(self.groups[0].completions)
        return values[number * size : (number + 1) * size]

    def select(self, numbers: Sequence[int]) -> ScoredRollouts:
        """These groups alone."""
        scores = {name: [v for n in numbers for v in self.of_group(values, n)] for name, values in self.scores.items()}
        return ScoredRollouts([self.groups[n] for n in numbers], [self.logprobs[n] for n in numbers], scores)

    def joined(self, other: ScoredRollouts) -> ScoredRollouts:
        """The other's groups behind these."""
        scores = {name: self.scores.get(name, []) + values for name, values in other.scores.items()}
        return ScoredRollouts(self.groups + other.groups, self.logprobs + other.logprobs, scores)

    def clipped(self, size: float) -> list[float | None]:
        """What is trained on, cut to ``-size`` .. ``size``; 0 = as it is."""
        limit = size or math.inf
        return [None if score is None else max(-limit, min(limit, score)) for score in self.scores["score"]]

    def differing(self, clip: float) -> list[int]:
        """Groups whose scores, ``clip``ped, are not all equal: where they are, a group estimator's advantages are 0."""
        scores = self.clipped(clip)
        return [n for n in range(len(self.groups)) if len(set(self.of_group(scores, n))) > 1]

    def gathered(self) -> ScoredRollouts:
        """The groups of all ranks, by their number; exchanged as plain lists. Collective."""
        mine: list[dict[str, Any]] = [
            {
                "row": group.row,
                "number": group.number,
                "prompt": [group.prompt.ids, group.prompt.text],
                "completions": [[c.ids, c.logprobs, c.ended] for c in group.completions],
                "logprobs": [t.tolist() for t in self.logprobs[n]],
                "scores": {name: self.of_group(values, n) for name, values in self.scores.items()},
            }
            for n, group in enumerate(self.groups)
        ]
        every = [item for part in distributed.gather_over_data(mine) for item in part]
        every.sort(key=lambda item: item["number"])
        return ScoredRollouts(
            [
                PromptGroup(
                    item["row"], item["number"], Prompt(*item["prompt"]), [Completion(*c) for c in item["completions"]]
                )
                for item in every
            ],
            [RolloutLogprobs(*(torch.tensor(values) for values in item["logprobs"])) for item in every],
            {name: [v for item in every for v in item["scores"][name]] for name in self.scores},
        )


def as_tensor(scores: Sequence[float | None]) -> Tensor:
    """Scores in float32, nan where one is missing."""
    return torch.tensor([math.nan if score is None else score for score in scores], dtype=torch.float32)


@dataclass(frozen=True)
class RewardSum:
    """Scores of several rewards, and their weighted sum."""

    scorers: Mapping[str, Scorer]
    weights: Mapping[str, float]

    def __call__(self, responses: Sequence[Response]) -> Scores:
        """Scores by name, and ``score``: the sum, None where a part of it is missing; collective."""
        parts = {name: scorer(responses) for name, scorer in self.scorers.items()}
        totals: list[float | None] = [0] * len(responses)
        for name, weight in self.weights.items():
            if weight:
                totals = [
                    None if t is None or v is None else t + weight * v for t, v in zip(totals, parts[name], strict=True)
                ]
        return {**(parts if len(parts) > 1 else {}), "score": totals}
