"""A policy that is being trained, what it samples, and what policy, reference and critic say of it."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from enum import StrEnum, auto
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from trainer.batch import Branches, Documents
from trainer.config import Node, schema, setting
from trainer.data.corpus import Prompt
from trainer.data.pairs import collate_shared_prefix
from trainer.data.rows import Encoded
from trainer.functional import logprobs_at
from trainer.generation.completion import Completion
from trainer.generation.generate import generate
from trainer.generation.sampling import Sampling
from trainer.generation.scoring import in_forwards
from trainer.models.actor_critic import of_policy, values_at
from trainer.models.lora import adapters_off
from trainer.models.transformer import Read
from trainer.parallel.engine import Engine
from trainer.rl.experience import unshared


class Decoder(StrEnum):
    """What samples."""

    own = auto()
    vllm = auto()


@schema("rollout")
@dataclass
class Rollout(Node):
    """How completions are sampled."""

    size: int = setting(128, "completions of an iteration, over all ranks", least=1)
    tokens: int = setting(64, "longest completion, tokens", least=1)
    temperature: float = setting(1.0, "divides the logits, in sampling and in all log-probabilities", above=0)
    top_k: int = setting(0, "sample from the k likeliest tokens; 0 = all", least=0)
    top_p: float = setting(1.0, "sample from the likeliest tokens that hold this probability", above=0, most=1)
    min_p: float = setting(0.0, "leave out tokens less likely than this part of the likeliest", least=0, below=1)
    together: int = setting(64, "completions that a rank samples at once", least=1)
    redraws: int = setting(
        0, "further draws of prompts in place of groups whose scores are all equal (DAPO, arXiv:2503.14476)", least=0
    )
    reread: bool = setting(
        True, "compute the policy's log-probabilities of samples again, as training does; false = take the sampler's"
    )
    engine: Decoder = setting(Decoder.own, "what samples: own, or vllm where it is installed (NVIDIA GPUs)")
    memory: float = setting(0.3, "vllm: part of a GPU's memory that it may take", above=0, below=1)
    shown: int = setting(4, "completions of an iteration that are written to samples.jsonl", least=0)

    def problems(self) -> Iterator[str]:
        if self.engine is Decoder.vllm and importlib.util.find_spec("vllm") is None:
            yield "pipeline.rollout.engine=vllm needs the package vllm, which is not installed; install it, or use own"
        if self.engine is Decoder.vllm and not self.reread:
            yield "pipeline.rollout.reread=false does not work with engine=vllm, whose numbers are corrected; use true"

    @property
    def sampling(self) -> Sampling:
        """How tokens are drawn."""
        return Sampling(self.tokens, self.temperature, self.top_k, self.top_p, self.min_p)

    @property
    def cut(self) -> list[str]:
        """Settings under which samples do not follow the distribution that the ratio is taken of."""
        usual = {"top_k": 0, "top_p": 1.0, "min_p": 0.0}
        return [name for name, value in usual.items() if getattr(self, name) != value]


class Group(NamedTuple):
    """A prompt with its completions. ``row``: its number in the data. ``number``: its place in the iteration."""

    row: int
    number: int
    prompt: Prompt
    completions: list[Completion]

    def as_json(self) -> list[Any]:
        """For the other ranks."""
        return [self.row, self.number, vars(self.prompt), [vars(completion) for completion in self.completions]]

    @classmethod
    def from_json(cls, value: list[Any]) -> Group:
        """What `as_json` gave."""
        row, number, prompt, completions = value
        return cls(row, number, Prompt(**prompt), [Completion(**completion) for completion in completions])


class Reading(NamedTuple):
    """What the models say of a group's completions, tokens end to end. ``beyond``: values behind each, ``(samples,)``.

    ``entropy``: of the distribution at each token; where log-probabilities are not read again, their negatives, whose mean
    estimates it.
    """

    logprobs: Tensor
    entropy: Tensor
    reference: Tensor
    values: Tensor
    beyond: Tensor


@dataclass
class Actor:
    """A policy that is being trained, with all that judges it. ``reference``: None = there is none, or its base is it."""

    engine: Engine
    stops: Sequence[int]
    settings: Rollout
    critic: bool
    reference: nn.Module | None = None
    base_is_reference: bool = False

    def sample(self, prompts: Sequence[Sequence[int]], keys: Sequence[tuple[int, ...]]) -> list[Completion]:
        """Completions of this rank's prompts. Inside, ranks need not keep step; collective at both ends."""
        with self.engine.evaluating(), self.engine.gathered(only=of_policy) as module:
            return generate(
                module, prompts, self.settings.sampling, stops=self.stops, keys=keys, together=self.settings.together
            )

    def read(self, groups: Sequence[Group]) -> list[Reading]:
        """What policy, reference and critic say of every completion, as in training; collective."""
        found: list[Reading | None] = [None] * len(groups)
        sizes = [len(g.prompt.ids) + sum(len(c.ids) for c in g.completions) for g in groups]
        with self.engine.evaluating():
            for numbers in in_forwards(sizes):
                for n, reading in zip(numbers, self._forward([groups[n] for n in numbers]), strict=False):
                    found[n] = reading
        return [reading for reading in found if reading is not None]

    def _forward(self, groups: Sequence[Group]) -> list[Reading]:
        filler = Group(-1, -1, Prompt([0], ""), [Completion([0], [0.0], True)])
        laid = collate_shared_prefix(
            [(len(g.prompt.ids), [_side(g.prompt.ids, c.ids) for c in g.completions]) for g in groups or [filler]], [0]
        )
        device = self.engine.device
        tokens, documents = laid["tokens"].to(device), unshared(laid["documents"]).to(device)
        places, last = laid["logit_index"].to(device), laid["final_index"].to(device)
        read = logprobs_at(places, laid["targets"].to(device), self.settings.temperature)
        values_read = values_at(torch.cat([places, last])) if self.critic else None
        said, values = self._trained(tokens, documents, read, values_read)
        if values is None:
            values = tokens.new_zeros(len(places) + len(last))
        if said is None:
            sampled = [value for g in groups or [filler] for c in g.completions for value in c.logprobs]
            policy = torch.tensor(sampled, device=device)
            said = policy, -policy
        policy, entropy = said
        reference = self._referenced(tokens, documents, read, policy)
        columns = [t.float().cpu() for t in (policy, entropy, reference, values[: len(places)])]
        sizes = [sum(len(c.ids) for c in g.completions) for g in groups]
        pieces = [column[: sum(sizes)].split(sizes) for column in columns]
        beyond = values[len(places) :].float().cpu()[: sum(len(g.completions) for g in groups)]
        ends = beyond.split([len(g.completions) for g in groups])
        return [Reading(*parts) for parts in zip(*pieces, ends, strict=True)]

    def _trained(
        self, tokens: Tensor, documents: Documents | Branches, read: Read, values: Read | None
    ) -> tuple[tuple[Tensor, Tensor] | None, Tensor | None]:
        """The policy's log-probabilities and entropies (None: the sampler's serve), and the critic's values."""
        model = self.engine.model
        if values is not None:
            return model(tokens, documents, read if self.settings.reread else None, values)  # type: ignore[no-any-return]
        return (model(tokens, documents, read) if self.settings.reread else None), None

    def _referenced(
        self, tokens: Tensor, documents: Documents | Branches, read: Callable[..., Any], policy: Tensor
    ) -> Tensor:
        if self.reference is None and not self.base_is_reference:
            return policy
        model = self.engine.model if self.reference is None else self.reference
        off: AbstractContextManager[Any] = adapters_off(model) if self.reference is None else nullcontext()
        with off:
            return model(tokens, documents, read)[0]  # type: ignore[no-any-return]


def _side(prompt: Sequence[int], completion: Sequence[int]) -> Encoded:
    return Encoded([*prompt, *completion], [False] * len(prompt) + [True] * len(completion))
