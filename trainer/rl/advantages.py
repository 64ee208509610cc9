"""Advantages: how much better than expected each token turned out; pure functions of scores, KL penalties and values.

Where these differ from the papers:

- Scores are clipped, and a completion without an end loses ``pipeline.missing_eos_penalty``, before anything is compared.
- The KL penalty is part of the reward, so groups compare rewards after it; GRPO's own KL term is ``pipeline.kl_loss_coef``.
- A completion without a score (None) is left out of its group's mean; it is not a zero.
- GRPO divides by the standard deviation of the sample (n - 1) plus 1e-4; the paper states neither.
- The loss averages over all tokens of a step (DAPO), where GRPO's paper averages over each completion first
  (``pipeline.aggregate=sequence_mean``).

An estimator is a function in this file, or in a module that ``imports=[mine]`` names (docs/algorithms.md#advantages):

    @advantage_estimator("centred", samples_per_prompt=4)
    def centred(x: AdvantageInputs) -> tuple[Tensor, Tensor]:
        rewards = x.completion_rewards().view(-1, x.group_size)
        return x.per_token((rewards - rewards.mean(1, keepdim=True)).flatten()), torch.zeros_like(x.values)

Completions are ragged: tensors over all N tokens lie end to end, ``lengths`` ``(C,)`` divides them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor


@dataclass(frozen=True)
class AdvantageInputs:
    """What an estimator knows of an iteration: C completions of N tokens, `group_size` in a row of the same prompt.

    scores: of completions (C,), nan where there is none
    penalties: rewards of single tokens (N,): minus the KL coefficient times the KL estimate
    values: expected returns where each token is predicted (N,), zeros without a critic
    bootstrap_values: the value behind a completion that was cut off (C,), else 0
    weights: of tokens in the loss (N,), 0 where they are not trained on
    units: of completions in the loss (C,), likewise
    lengths: tokens of each completion (C,), int64
    group_size: completions of a prompt
    rows: the prompts' row numbers in the data (C / group_size,), the same ones in every epoch
    gamma: discount of future rewards
    lam: lambda of generalised advantage estimation
    """

    scores: Tensor
    penalties: Tensor
    values: Tensor
    bootstrap_values: Tensor
    weights: Tensor
    units: Tensor
    lengths: Tensor
    group_size: int
    rows: Tensor
    gamma: float = 1.0
    lam: float = 0.95

    def token_rewards(self) -> Tensor:
        """Penalties ``(N,)``, and on each completion's last token its score too."""
        rewards = self.penalties.clone()
        last = self.lengths.cumsum(0) - 1
        rewards[last] += torch.nan_to_num(self.scores)
        return rewards

    def completion_rewards(self) -> Tensor:
        """Sums of `token_rewards` ``(C,)``."""
        return completion_sums(self.token_rewards(), self.lengths)

    def has_score(self) -> Tensor:
        """Which completions have a score ``(C,)``, bool."""
        return ~torch.isnan(self.scores)

    def per_token(self, of_completions: Tensor) -> Tensor:
        """A completion's value at each of its tokens ``(N,)``."""
        return of_completions[completion_ids(self.lengths)]


Compute = Callable[[AdvantageInputs], tuple[Tensor, Tensor]]
F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class Estimator:
    """How advantages are estimated, with the settings that go with it where the user gives none.

    compute: from the inputs to advantages and returns, (N,) each; or a class of which an instance does, with
        state_dict() and load_state_dict() (JSON values) where it remembers something from iteration to iteration
    critic: whether values are needed
    samples_per_prompt, ppo_epochs, kl_coef, aggregate: defaults of the settings ``pipeline.*``
    """

    compute: Compute | type
    critic: bool = False
    samples_per_prompt: int = 8
    ppo_epochs: int = 1
    kl_coef: float = 0.0
    aggregate: str = "token_mean"

    def build(self) -> Compute:
        """The function, or a new instance of the class."""
        return self.compute() if isinstance(self.compute, type) else self.compute


ESTIMATORS: dict[str, Estimator] = {}


def advantage_estimator(name: str, **defaults: Any) -> Callable[[F], F]:
    """Make a function or class the choice ``pipeline.advantage=name``; ``defaults``: fields of `Estimator`."""

    def register(compute: F) -> F:
        ESTIMATORS[name] = Estimator(compute, **defaults)
        return compute

    return register


def generalised_advantages(x: AdvantageInputs) -> tuple[Tensor, Tensor]:
    """Advantages and returns ``(N,)``: generalised advantage estimation (Schulman et al. 2016, arXiv:1506.02438, eq. 16)."""
    rewards, values = padded(x.token_rewards(), x.lengths), padded(x.values, x.lengths)
    real = padded(torch.ones_like(x.values), x.lengths) > 0
    advantages = torch.zeros_like(values)
    next_value, next_advantage = x.bootstrap_values.clone(), torch.zeros_like(x.bootstrap_values)
    for t in range(values.shape[1] - 1, -1, -1):
        advantage = rewards[:, t] + x.gamma * next_value - values[:, t] + x.gamma * x.lam * next_advantage
        next_advantage = torch.where(real[:, t], advantage, next_advantage)
        next_value = torch.where(real[:, t], values[:, t], next_value)
        advantages[:, t] = next_advantage
    flat = advantages[real]
    return flat, flat + x.values


@advantage_estimator("gae", critic=True, samples_per_prompt=1, ppo_epochs=4, kl_coef=0.05)
def gae(x: AdvantageInputs) -> tuple[Tensor, Tensor]:
    """`generalised_advantages`, whitened; returns are never whitened."""
    advantages, returns = generalised_advantages(x)
    return whitened(advantages, x.weights), returns


@advantage_estimator("grpo")
def grpo(x: AdvantageInputs) -> tuple[Tensor, Tensor]:
    """``(r - mean) / (std + 1e-4)`` in each group (Shao et al. 2024, arXiv:2402.03300, section 4.1.2)."""
    centred, present = _centred(x)
    count = present.sum(1, keepdim=True)
    deviation = (centred.square().sum(1, keepdim=True) / (count - 1).clamp(min=1)).sqrt()
    return x.per_token((centred / (deviation + 1e-4)).flatten()), torch.zeros_like(x.values)


@advantage_estimator("dr_grpo", aggregate="constant")
def dr_grpo(x: AdvantageInputs) -> tuple[Tensor, Tensor]:
    """``r - mean``: no prompt counts more because its scores differ less (Liu et al. 2025, arXiv:2503.20783)."""
    return x.per_token(_centred(x)[0].flatten()), torch.zeros_like(x.values)


@advantage_estimator("rloo")
def rloo(x: AdvantageInputs) -> tuple[Tensor, Tensor]:
    """``r`` less the mean of the group's others (Ahmadian et al. 2024, arXiv:2402.14740, eq. 8)."""
    centred, present = _centred(x)
    count = present.sum(1, keepdim=True)
    return x.per_token((centred * count / (count - 1).clamp(min=1)).flatten()), torch.zeros_like(x.values)


def _centred(x: AdvantageInputs) -> tuple[Tensor, Tensor]:
    """Completion rewards less their group's mean ``(G, group_size)``, 0 where there is no score; and which have one."""
    present = x.has_score().view(-1, x.group_size)
    rewards = x.completion_rewards().view(-1, x.group_size) * present
    mean = rewards.sum(1, keepdim=True) / present.sum(1, keepdim=True).clamp(min=1)
    return (rewards - mean) * present, present


def whitened(advantages: Tensor, weights: Tensor) -> Tensor:
    """Mean 0 and variance 1 over the tokens that are trained on; ``(N,)``."""
    trained = weights > 0
    if not bool(trained.any()):
        return advantages
    values = advantages.double()
    mean = values[trained].mean()
    variance = (values[trained] - mean).square().mean()
    return ((values - mean) / (variance + 1e-8).sqrt()).to(advantages.dtype)


def token_mean(lengths: Tensor, longest: int) -> tuple[Tensor, Tensor]:
    """Every token counts alike (Yu et al. 2025, DAPO, arXiv:2503.14476)."""
    return torch.ones(int(lengths.sum())), lengths.float()


def sequence_mean(lengths: Tensor, longest: int) -> tuple[Tensor, Tensor]:
    """Every completion counts alike: a token of a long one counts less."""
    return (1 / lengths.float())[completion_ids(lengths)], torch.ones(len(lengths))


def constant(lengths: Tensor, longest: int) -> tuple[Tensor, Tensor]:
    """Every token counts ``1 / longest`` of a completion, however long its own is (Liu et al. 2025, arXiv:2503.20783)."""
    return torch.full((int(lengths.sum()),), 1 / longest), torch.ones(len(lengths))


AGGREGATES: dict[str, Callable[[Tensor, int], tuple[Tensor, Tensor]]] = {
    "token_mean": token_mean,
    "sequence_mean": sequence_mean,
    "constant": constant,
}
"""From lengths ``(C,)`` and the longest possible one: weights of tokens ``(N,)`` and of completions ``(C,)`` in the loss."""


def completion_ids(lengths: Tensor) -> Tensor:
    """Which completion each token belongs to ``(N,)``."""
    return torch.repeat_interleave(torch.arange(len(lengths)), lengths)


def completion_sums(values: Tensor, lengths: Tensor) -> Tensor:
    """Sums over each completion's tokens ``(C,)``."""
    return torch.zeros(len(lengths)).index_add(0, completion_ids(lengths), values)


def padded(values: Tensor, lengths: Tensor) -> Tensor:
    """Ragged values ``(N,)`` as ``(C, longest)``, zeros behind the ends."""
    inside = torch.arange(int(lengths.max()))[None] < lengths[:, None]
    out = values.new_zeros(inside.shape)
    out[inside] = values
    return out
