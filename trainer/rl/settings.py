"""What can be set about rollouts and policy gradients, and what of it does not go together."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum, auto
from pathlib import Path

from trainer.config import Node, schema, setting
from trainer.data.hub import absence, folder_of
from trainer.generation.sampling import Sampling
from trainer.generation.vllm import filter_problems
from trainer.rl.advantages import AGGREGATES, ESTIMATORS, Estimator
from trainer.rl.losses import KL_ESTIMATORS
from trainer.rl.rewards import Reward


class RolloutEngine(StrEnum):
    """What samples."""

    own = auto()
    vllm = auto()


class ReferencePolicy(StrEnum):
    """What the KL divergence of the policy is taken to."""

    model = auto()
    adapters_off = auto()
    none = auto()


class CriticInit(StrEnum):
    """Which weights the critic starts from."""

    reward = auto()
    policy = auto()
    head = auto()


class Unfinished(StrEnum):
    """How a completion that reached the limit without a stop token is handled."""

    penalize = auto()
    mask = auto()
    bootstrap = auto()


@schema("rollout")
@dataclass
class RolloutSettings(Node):
    """How completions are sampled."""

    size: int = setting(128, "completions of an iteration, over all ranks", least=1)
    tokens: int = setting(64, "longest completion, tokens", least=1)
    temperature: float = setting(1.0, "divides the logits, in sampling and in all log-probabilities", above=0)
    top_k: int = setting(0, "sample from the k likeliest tokens; 0 = all", least=0)
    top_p: float = setting(1.0, "sample from the likeliest tokens that hold this probability", above=0, most=1)
    min_p: float = setting(0.0, "leave out tokens less likely than this part of the likeliest", least=0, below=1)
    max_concurrent: int = setting(64, "completions that a rank decodes at once", least=1)
    max_resample: int = setting(0, "further draws in place of groups of equal scores (DAPO, arXiv:2503.14476)", least=0)
    recompute_logprobs: bool = setting(True, "compute samples' log-probabilities as in training; false = the sampler's")
    engine: RolloutEngine = setting(RolloutEngine.own, "what samples: own, or vllm where it is installed")
    gpu_memory_utilization: float = setting(0.3, "vllm: part of a GPU's memory that it may take", above=0, below=1)
    log_samples: int = setting(4, "completions of an iteration that are written to samples.jsonl", least=0)

    def problems(self) -> Iterator[str]:
        if self.engine is not RolloutEngine.vllm:
            return
        if importlib.util.find_spec("vllm") is None:
            yield "pipeline.rollout.engine=vllm needs the package vllm, which is not installed; install it, or use own"
        if not self.recompute_logprobs:
            yield "pipeline.rollout.recompute_logprobs=false does not work with engine=vllm, which rounds otherwise; use true"
        yield from filter_problems(self.sampling)

    @property
    def sampling(self) -> Sampling:
        """How tokens are drawn."""
        return Sampling(self.tokens, self.temperature, self.top_k, self.top_p, self.min_p)

    @property
    def off_policy_filters(self) -> list[str]:
        """Names of the filters in use: what is sampled then does not follow the distribution that ratios are taken of."""
        off = {"top_k": 0, "top_p": 1.0, "min_p": 0.0}
        return [name for name, value in off.items() if getattr(self, name) != value]


@dataclass
class PolicyGradientSettings(Node):
    """Settings of policy gradients on rollouts, all of them fields of ``pipeline``."""

    advantage: str = setting("gae", "estimator of advantages; only gae needs a critic", choices=ESTIMATORS)
    samples_per_prompt: int | None = setting(None, "completions of a prompt; null = 1 for gae, else 8", least=1)
    ppo_epochs: int | None = setting(None, "passes over a rollout; null = 4 for gae, else 1", least=1)
    rollout: RolloutSettings = setting(RolloutSettings)
    reward: dict[str, Reward] = setting(dict, "what scores completions, by name; the sum, each times its weight")
    score_clip: float | None = setting(
        None, "scores are clipped to this size; 0 = not; null = 10 where all rewards are models, else not", least=0
    )
    unfinished: Unfinished = setting(
        Unfinished.penalize,
        "completions without an end: penalize (missing_eos_penalty), mask (no loss), bootstrap (value)",
    )
    missing_eos_penalty: float = setting(0.0, "taken off the score of a completion without an end", least=0)
    reference: ReferencePolicy = setting(
        ReferencePolicy.model, "a frozen model, adapters_off (the base under adapter=lora or qlora), or none"
    )
    kl_coef: float | None = setting(None, "KL coefficient (beta) in the reward; null = 0.05 for gae, else 0", least=0)
    kl_estimator: str = setting("k1", "estimator of the KL divergence in the reward", choices=KL_ESTIMATORS)
    kl_target: float | None = setting(
        None,
        "nats a completion that kl_coef is steered to (Ziegler et al. 2019, arXiv:1909.08593); null = fixed",
        above=0,
    )
    kl_loss_coef: float = setting(0.0, "KL coefficient (beta) in the loss", least=0)
    kl_loss_estimator: str = setting("k3", "estimator of the KL divergence in the loss", choices=KL_ESTIMATORS)
    kl_limit: float | None = setting(
        None, "nats a token from the old policy after which the rest of a rollout is skipped; null = never", above=0
    )
    gamma: float = setting(1.0, "discount of future rewards", least=0, most=1)
    lam: float = setting(0.95, "lambda of generalised advantage estimation", least=0, most=1)
    clip_low: float = setting(0.2, "how far below 1 the probability ratio may go", above=0, below=1)
    clip_high: float = setting(0.2, "how far above 1 the probability ratio may go", above=0)
    clip_value: float = setting(0.2, "how far a value may move from the old one", above=0)
    value_coef: float = setting(0.1, "coefficient of the critic's loss", least=0)
    entropy_coef: float = setting(0.0, "coefficient of the entropy bonus", least=0)
    aggregate: str | None = setting(
        None, "how tokens add up in the loss; null = constant for dr_grpo, else token_mean", choices=AGGREGATES
    )
    importance_cap: float = setting(
        0.0, "cap of truncated importance weights, trainer's over sampler's probability; 0 = no weights", least=0
    )
    critic: CriticInit = setting(
        CriticInit.reward, "what the critic starts from: the reward model, the policy, or head: a vector on its states"
    )
    critic_path: str | None = setting(None, "a folder or a hub id (owner/name) to start the critic from instead")
    critic_lr: float = setting(5e-6, "base learning rate of the critic", least=0)

    def __post_init__(self) -> None:
        self.critic_path = None if self.critic_path is None else folder_of(self.critic_path)

    def problems(self) -> Iterator[str]:
        if self.advantage not in ESTIMATORS:
            return
        yield from self._group_problems()
        yield from self._critic_problems()
        if not any(reward.weight for reward in self.reward.values()):
            yield "pipeline.reward scores nothing; use +reward@pipeline.reward.NAME=model|function|judge"
        if self.kl_loss_coef and self.kl_loss_estimator == "k1":
            yield "pipeline.kl_loss_estimator=k1 has a gradient of 0 in expectation, so it is no loss; use k3 or k2"
        if self.reference is ReferencePolicy.none and self.uses_reference:
            yield "pipeline.reference=none has no KL divergence; set pipeline.kl_coef=0 and pipeline.kl_loss_coef=0"

    def _group_problems(self) -> Iterator[str]:
        size, group = self.rollout.size, self.group_size
        if not self.estimator.critic and group < 2:
            yield f"pipeline.samples_per_prompt={group} has no groups; pipeline.advantage={self.advantage} needs 2 or more"
        if size % group:
            near = size // group * group or group
            yield (f"pipeline.rollout.size={size} is not a multiple of pipeline.samples_per_prompt={group}; use {near}")
        if self.rollout.max_resample and group < 2:
            yield "pipeline.rollout.max_resample compares groups, and pipeline.samples_per_prompt=1; set it to 0"

    def _critic_problems(self) -> Iterator[str]:
        if not self.estimator.critic:
            if self.unfinished is Unfinished.bootstrap:
                yield f"pipeline.unfinished=bootstrap needs a critic, which {self.advantage} has not; use mask"
        elif self.critic is CriticInit.reward and self.critic_folder is None:
            yield "pipeline.critic=reward needs a reward model in pipeline.reward; use pipeline.critic=policy or head"
        if self.critic_path is not None and (absent := absence(self.critic_path)):
            yield f"pipeline.critic_path={self.critic_path}: {absent}"
        elif self.critic_path is not None and not Path(self.critic_path).is_dir():
            yield f"pipeline.critic_path={self.critic_path} is not a directory; give a Hugging Face folder"

    @property
    def estimator(self) -> Estimator:
        """How advantages are estimated, with its usual settings."""
        return ESTIMATORS[self.advantage]

    @property
    def group_size(self) -> int:
        """Completions of a prompt: ``samples_per_prompt``, or the estimator's."""
        return self.estimator.samples_per_prompt if self.samples_per_prompt is None else self.samples_per_prompt

    @property
    def epochs(self) -> int:
        """Passes over a rollout: ``ppo_epochs``, or the estimator's."""
        return self.estimator.ppo_epochs if self.ppo_epochs is None else self.ppo_epochs

    @property
    def initial_kl_coef(self) -> float:
        """The KL coefficient of the first iteration: ``kl_coef``, or the estimator's."""
        return self.estimator.kl_coef if self.kl_coef is None else self.kl_coef

    @property
    def clip_at(self) -> float:
        """The size that scores are clipped to: ``score_clip``, or what is usual for every reward; 0 = they are not."""
        usual = min((reward.usual_clip for reward in self.reward.values() if reward.weight), default=0.0)
        return usual if self.score_clip is None else self.score_clip

    @property
    def uses_reference(self) -> bool:
        """Whether reward or loss have a KL term."""
        return bool(self.initial_kl_coef or self.kl_loss_coef)

    @property
    def critic_folder(self) -> str | None:
        """The folder that the critic starts from; None = the policy, or nothing."""
        if self.critic_path is not None or self.critic is not CriticInit.reward:
            return self.critic_path
        return next((folder for r in self.reward.values() if (folder := r.model_folder())), None)
