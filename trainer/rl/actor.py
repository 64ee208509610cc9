"""The policy as an actor: it samples, and gives the log-probabilities of what it sampled, beside reference and critic."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from trainer.batch import Branches, Documents, on_device
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
        sizes = [len(g.prompt.ids) + sum(len(c.ids) for c in g.completions) for g in groups]
        order: list[int] = []
        chunks: list[list[PromptGroup]] = []
        computed = []
        with self.engine.evaluating():
            for numbers in in_forwards(sizes):
                order += numbers
                chunks.append([groups[n] for n in numbers] or [PADDING])
                computed.append(self._forward(chunks[-1]))
        # One copy back for all forwards: each would wait for the device.
        values = torch.cat(computed).cpu() if computed else torch.empty(0)
        rows = [
            row for chunk, part in zip(chunks, _split(values, chunks), strict=True) for row in _of_groups(chunk, part)
        ]
        by_number = dict(zip(order, rows, strict=False))
        return [by_number[n] for n in range(len(groups))]

    def _forward(self, groups: Sequence[PromptGroup]) -> Tensor:
        """Of N sampled ids in C completions: ``(4 N + C,)``, on the device, as `_of_groups` takes it apart."""
        row = on_device(ScoredRow.of(groups), self.engine.device)
        read_policy = logprobs_at(row.logit_index, row.targets, self.settings.temperature)
        model, read = self.engine.model, read_policy if self.settings.recompute_logprobs else None
        policy = (row.sampled, -row.sampled)
        values = row.sampled.new_zeros(len(row.logit_index) + len(row.final_index))
        if self.critic:
            places = torch.cat([row.logit_index, row.final_index])
            computed, values = model(row.tokens, row.documents, read, values_at(places))
        else:
            computed = None if read is None else model(row.tokens, row.documents, read)
        logprobs, entropy = policy if computed is None else computed
        reference = logprobs
        if self.reference is not None or self.base_is_reference:
            frozen = model if self.reference is None else self.reference
            with adapters_off(model) if self.reference is None else nullcontext():
                reference = frozen(row.tokens, row.documents, read_policy)[0]
        return torch.cat([logprobs.float(), entropy.float(), reference.float(), values.float()])


@dataclass(frozen=True)
class ScoredRow:
    """Groups in one ragged row ``(1, T)``, in which C completions of N sampled ids share their prompts.

    tokens, documents: of the row
    logit_index: from which token of the row each sampled id is predicted (N,)
    targets: the sampled ids (N,)
    final_index: the token that ends each completion (C,)
    sampled: the sampler's log-probabilities, nats (N,)
    """

    tokens: Tensor
    documents: Branches | Documents
    logit_index: Tensor
    targets: Tensor
    final_index: Tensor
    sampled: Tensor

    @classmethod
    def of(cls, groups: Sequence[PromptGroup]) -> ScoredRow:
        """Lay groups end to end."""
        fields = collate_shared_prefix(
            [(len(g.prompt.ids), [_sequence(g.prompt.ids, c.ids) for c in g.completions]) for g in groups], [0]
        )
        return cls(
            tokens=fields["tokens"],
            documents=unshared(fields["documents"]),
            logit_index=fields["logit_index"],
            targets=fields["targets"],
            final_index=fields["final_index"],
            sampled=torch.tensor([value for g in groups for c in g.completions for value in c.logprobs]),
        )


def _counts(groups: Sequence[PromptGroup]) -> tuple[list[int], list[int]]:
    """Sampled ids, and completions, of every group."""
    return [sum(len(c.ids) for c in g.completions) for g in groups], [len(g.completions) for g in groups]


def _split(values: Tensor, chunks: Sequence[Sequence[PromptGroup]]) -> Sequence[Tensor]:
    """What each forward gave."""
    counts = [_counts(chunk) for chunk in chunks]
    return torch.split(values, [4 * sum(ids) + sum(completions) for ids, completions in counts])


def _of_groups(groups: Sequence[PromptGroup], values: Tensor) -> list[RolloutLogprobs]:
    """A forward's values by group."""
    ids, completions = _counts(groups)
    *columns, bootstrap = torch.split(values, [sum(ids)] * 4 + [sum(completions)])
    per_group = [torch.split(column, ids) for column in columns]
    return [RolloutLogprobs(*parts) for parts in zip(*per_group, torch.split(bootstrap, completions), strict=True)]


def _sequence(prompt: Sequence[int], completion: Sequence[int]) -> Encoded:
    return Encoded([*prompt, *completion], [False] * len(prompt) + [True] * len(completion))
