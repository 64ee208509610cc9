"""The policy as an actor: it samples, and gives the log-probabilities of what it sampled, beside reference and critic."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

from trainer.data.corpus import Prompt
from trainer.data.pairs import collate_shared_prefix
from trainer.data.rows import Encoded
from trainer.data.tokenizer import Tokenizer
from trainer.functional import logprobs_at
from trainer.generation.completion import Completion
from trainer.generation.generate import generate
from trainer.generation.scoring import in_forwards
from trainer.models.actor_critic import of_policy, values_at
from trainer.models.lora import adapters_off
from trainer.parallel.engine import Engine
from trainer.rl.experience import unshared
from trainer.rl.scoring import PromptGroup, RolloutLogprobs
from trainer.rl.settings import RolloutSettings

PADDING = PromptGroup(-1, -1, Prompt([0], ""), [Completion([0], [0.0], True)])
"""What a rank without groups of its own passes through, since a forward is collective."""


class Sampler(Protocol):
    """Completes this rank's prompts with the policy as it is now; collective. ``keys``: the seed of each completion."""

    def __call__(self, prompts: Sequence[Sequence[int]], keys: Sequence[tuple[int, ...]]) -> list[Completion]: ...


@dataclass
class Actor:
    """A policy that is being trained, and what is asked beside it.

    engine: holds the policy, and the critic where there is one
    tokenizer: the policy's
    settings: how completions are sampled
    critic: whether the engine's module has a critic
    reference: a frozen reference policy
    base_is_reference: the policy without its adapters is the reference
    sampler: samples in place of our own decoder
    """

    engine: Engine
    tokenizer: Tokenizer
    settings: RolloutSettings
    critic: bool
    reference: nn.Module | None = None
    base_is_reference: bool = False
    sampler: Sampler | None = None

    def sample(self, prompts: Sequence[Sequence[int]], keys: Sequence[tuple[int, ...]]) -> list[Completion]:
        """Completions of this rank's prompts; collective, though ranks may decode for different numbers of steps."""
        if self.sampler is not None:
            return self.sampler(prompts, keys)
        with self.engine.evaluating(), self.engine.gathered(only=of_policy) as module:
            return generate(
                module,
                prompts,
                self.settings.sampling,
                stops=self.tokenizer.stops,
                keys=keys,
                max_concurrent=self.settings.max_concurrent,
            )

    def logprobs(self, groups: Sequence[PromptGroup]) -> list[RolloutLogprobs]:
        """Log-probabilities and values of every completion, computed as in training; collective."""
        by_number: dict[int, RolloutLogprobs] = {}
        sizes = [len(g.prompt.ids) + sum(len(c.ids) for c in g.completions) for g in groups]
        with self.engine.evaluating():
            for numbers in in_forwards(sizes):
                chunk = [groups[n] for n in numbers]
                by_number.update(zip(numbers, self._forward(chunk or [PADDING]), strict=False))
        return [by_number[n] for n in range(len(groups))]

    def _forward(self, groups: Sequence[PromptGroup]) -> list[RolloutLogprobs]:
        collated = collate_shared_prefix(
            [(len(g.prompt.ids), [_sequence(g.prompt.ids, c.ids) for c in g.completions]) for g in groups], [0]
        )
        device = self.engine.device
        tokens, documents = collated["tokens"].to(device), unshared(collated["documents"]).to(device)
        logit_index, final_index = collated["logit_index"].to(device), collated["final_index"].to(device)
        read_policy = logprobs_at(logit_index, collated["targets"].to(device), self.settings.temperature)
        model, read = self.engine.model, read_policy if self.settings.recompute_logprobs else None
        policy, values = None, tokens.new_zeros(len(logit_index) + len(final_index))
        if self.critic:
            policy, values = model(tokens, documents, read, values_at(torch.cat([logit_index, final_index])))
        elif read is not None:
            policy = model(tokens, documents, read)
        if policy is None:
            sampled = torch.tensor(
                [value for g in groups for c in g.completions for value in c.logprobs], device=device
            )
            policy = sampled, -sampled
        logprobs, entropy = policy
        reference = logprobs
        if self.reference is not None or self.base_is_reference:
            frozen = model if self.reference is None else self.reference
            with adapters_off(model) if self.reference is None else nullcontext():
                reference = frozen(tokens, documents, read_policy)[0]
        columns = logprobs, entropy, reference, values[: len(logit_index)]
        lengths = [sum(len(c.ids) for c in g.completions) for g in groups]
        per_group = [column.float().cpu().split(lengths) for column in columns]
        bootstrap = values[len(logit_index) :].float().cpu().split([len(g.completions) for g in groups])
        return [RolloutLogprobs(*parts) for parts in zip(*per_group, bootstrap, strict=True)]


def _sequence(prompt: Sequence[int], completion: Sequence[int]) -> Encoded:
    return Encoded([*prompt, *completion], [False] * len(prompt) + [True] * len(completion))
