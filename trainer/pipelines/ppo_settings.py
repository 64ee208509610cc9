"""What can be set about policy gradients, and what of it does not go together."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum, auto
from pathlib import Path
from typing import Any, ClassVar

from trainer.batch import Batch
from trainer.config import setting
from trainer.data.prompts import PromptBatch
from trainer.data.tokenizer import Tokenizer, open_tokenizer
from trainer.models.lora import Adapter
from trainer.pipelines.base import Pipeline
from trainer.rl.actor import Decoder, Rollout
from trainer.rl.advantages import AGGREGATES, ESTIMATORS, KL, Estimator
from trainer.rl.rewards import Reward


class Reference(StrEnum):
    """What the policy's drift is measured from."""

    model = auto()
    adapters_off = auto()
    none = auto()


class Critic(StrEnum):
    """Where the model of returns comes from."""

    reward = auto()
    policy = auto()
    head = auto()


class Unfinished(StrEnum):
    """What becomes of a completion that reached the limit without an end."""

    penalize = auto()
    mask = auto()
    bootstrap = auto()


@dataclass
class PolicyGradient(Pipeline):
    """Settings of `PPO`."""

    learning_rate: ClassVar[float] = 1e-6
    batch_type: ClassVar[type[Batch]] = PromptBatch

    advantage: str = setting("gae", "estimator of advantages; only gae needs a critic", choices=ESTIMATORS)
    samples: int | None = setting(None, "completions of a prompt; null = 1 for gae, else 8", least=1)
    update_epochs: int | None = setting(None, "passes over a rollout; null = 4 for gae, else 1", least=1)
    rollout: Rollout = setting(Rollout)
    reward: dict[str, Reward] = setting(dict, "what completions are worth, by name; the sum, each times its weight")
    score_clip: float = setting(10.0, "scores are cut to this size; 0 = not", least=0)
    unfinished: Unfinished = setting(
        Unfinished.penalize,
        "a completion without an end: penalize (its score less penalty), mask (not learnt), bootstrap (its value instead)",
    )
    penalty: float = setting(0.0, "taken off the score of a completion without an end", least=0)
    reference: Reference = setting(
        Reference.model, "a frozen model, adapters_off (the base under adapter=lora), or none"
    )
    kl: float | None = setting(
        None, "price of a nat away from the reference, in the reward; null = 0.05 for gae, else 0", least=0
    )
    kl_estimator: str = setting("k1", "estimator of that divergence at a token", choices=KL)
    kl_target: float | None = setting(
        None,
        "nats a completion that the price is steered to (Ziegler et al. 2019, arXiv:1909.08593); null = it stays",
        above=0,
    )
    kl_loss: float = setting(0.0, "weight of the distance from the reference in the loss", least=0)
    kl_loss_estimator: str = setting("k3", "estimator of that divergence at a token", choices=KL)
    kl_limit: float | None = setting(
        None,
        "nats a token between old and new policy after which the rest of a rollout is left out; null = never",
        above=0,
    )
    gamma: float = setting(1.0, "discount of rewards to come", least=0, most=1)
    lam: float = setting(0.95, "of generalised advantage estimation", least=0, most=1)
    clip_low: float = setting(0.2, "how much less likely a token may become", above=0, below=1)
    clip_high: float = setting(0.2, "how much likelier a token may become", above=0)
    clip_value: float = setting(0.2, "how far a value may move from the old one", above=0)
    value_weight: float = setting(0.1, "weight of the critic's loss", least=0)
    entropy: float = setting(0.0, "weight of the entropy bonus", least=0)
    aggregate: str | None = setting(
        None, "how tokens add up; null = constant for dr_grpo, else token_mean", choices=AGGREGATES
    )
    correction: float = setting(
        0.0,
        "largest weight of a token for what trainer and sampler disagree on (truncated importance sampling); 0 = off",
        least=0,
    )
    critic: Critic = setting(
        Critic.reward,
        "a model begun from the reward model, or from the policy; head: a vector on the policy's own states",
    )
    critic_path: str | None = setting(None, "a folder to begin the critic from instead")
    critic_lr: float = setting(5e-6, "base learning rate of the critic", least=0)

    def problems(self) -> Iterator[str]:
        if self.advantage not in ESTIMATORS:
            return
        if not self.estimator.critic and self.each < 2:
            yield f"pipeline.samples={self.samples} compares nothing; pipeline.advantage={self.advantage} needs 2 or more"
        if self.rollout.size % self.each:
            near = self.rollout.size // self.each * self.each or self.each
            yield f"pipeline.rollout.size={self.rollout.size} is not a multiple of pipeline.samples={self.each}; use {near}"
        if not any(reward.weight for reward in self.reward.values()):
            yield "pipeline.reward holds nothing to learn from; use +reward@pipeline.reward.NAME=model|function|judge"
        if self.reference is Reference.none and (self.kl_price or self.kl_loss):
            yield "pipeline.reference=none leaves nothing to stay near; set pipeline.kl=0 and pipeline.kl_loss=0"
        if self.unfinished is Unfinished.bootstrap and not self.estimator.critic:
            yield f"pipeline.unfinished=bootstrap needs a critic, and pipeline.advantage={self.advantage} has none; use mask"
        if (
            self.estimator.critic
            and self.critic is Critic.reward
            and self.critic_path is None
            and self.reward_folder is None
        ):
            yield "pipeline.critic=reward needs a reward model in pipeline.reward; use pipeline.critic=policy or head"
        if self.critic_path is not None and not Path(self.critic_path).is_dir():
            yield f"pipeline.critic_path={self.critic_path} is no folder; give a Hugging Face folder"
        if self.rollout.redraws and self.each < 2:
            yield "pipeline.rollout.redraws compares the scores of a group, and pipeline.samples=1; set it to 0"

    def validate_adapter(self, adapter: Adapter) -> Iterator[str]:
        if self.reference is Reference.adapters_off and not adapter.removable:
            yield "pipeline.reference=adapters_off needs adapter=lora; use model"
        if self.rollout.engine is Decoder.vllm and adapter.removable:
            yield "pipeline.rollout.engine=vllm takes whole weights, which adapter=lora has not; use own"
        if getattr(adapter, "dropout", 0.0):
            yield f"adapter.dropout={adapter.dropout} makes old and new probabilities differ by chance; use adapter.dropout=0"  # type: ignore[attr-defined]

    def validate_batch(self, batch: Any, ranks: int) -> Iterator[str]:
        if self.advantage not in ESTIMATORS:
            return
        size, prompts = self.rollout.size, self.rollout.size // self.each
        if size % batch.size:
            near = max(size // batch.size, 1) * batch.size
            yield f"pipeline.rollout.size={size} is not a multiple of batch.size={batch.size}; use {near}"
        if prompts % ranks:
            yield f"pipeline.rollout.size={size} makes {prompts} prompts, not a multiple of {ranks} ranks; use another size"
        if self.rollout.tokens >= batch.length:
            yield (
                f"pipeline.rollout.tokens={self.rollout.tokens} leaves no room for a prompt in batch.length={batch.length}; "
                f"use batch.length={2 * self.rollout.tokens} or fewer tokens"
            )

    def validate_tokenizer(self, tokenizer: Tokenizer) -> Iterator[str]:
        folder = self.critic_path or (self.reward_folder if self.critic is Critic.reward else None)
        if self.estimator.critic and folder is not None and not open_tokenizer(folder).ids_as(tokenizer):
            yield (
                f"the critic would begin from {folder}, which has another tokenizer; use pipeline.critic=policy or head"
            )

    @property
    def estimator(self) -> Estimator:
        """How advantages are found, with its usual settings."""
        return ESTIMATORS[self.advantage]

    @property
    def each(self) -> int:
        """Completions of a prompt."""
        return self.estimator.samples if self.samples is None else self.samples

    @property
    def passes(self) -> int:
        """Passes over a rollout."""
        return self.estimator.epochs if self.update_epochs is None else self.update_epochs

    @property
    def kl_price(self) -> float:
        """The price of a nat at first."""
        return self.estimator.kl if self.kl is None else self.kl

    @property
    def reward_folder(self) -> str | None:
        """The first reward model's folder."""
        return next((folder for r in self.reward.values() if (folder := r.starts_critic())), None)

    def data_length(self, length: int) -> int:
        # The last id of a completion is predicted, never read.
        return length + 1 - self.rollout.tokens

    def steps(self, units: int, epochs: float, size: int) -> float:
        return units * self.each * epochs * self.passes / size
