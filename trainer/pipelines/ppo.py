"""Proximal policy optimisation, and group-based policy gradients: a policy is trained on rewards of its own completions.

Where this differs from the papers (Schulman et al. 2017, arXiv:1707.06347; Shao et al. 2024, arXiv:2402.03300):

- Actor and critic are one module under one engine, with a learning rate each; the gradient is clipped jointly.
- The KL divergence from the reference is a penalty in the reward, token by token, as in InstructGPT; ``kl_loss_coef`` adds
  GRPO's term to the loss.
- The ratio's two limits may differ (DAPO's clip-higher), and tokens add up as ``aggregate`` says.
- The old log-probabilities are computed again by the trainer, since sampler and trainer round differently;
  ``importance_cap`` weighs tokens for what is left of that difference.

What advantages deviate in stands in `trainer.rl.advantages`. Mathematics: docs/algorithms.md#ppo.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from trainer.batch import Batch
from trainer.config import ConfigError, schema
from trainer.data.corpus import Corpus
from trainer.data.prompts import PromptBatch
from trainer.data.tokenizer import Tokenizer, open_tokenizer
from trainer.diagnostics.first_step import FirstStep
from trainer.export.peft import merged_policy
from trainer.functional import logprobs_at
from trainer.generation.completion import Response
from trainer.metrics import Metrics
from trainer.models.actor_critic import CRITIC, ActorCritic, ValueHead, of_policy, values_at
from trainer.models.adapter import Adapter, Full
from trainer.models.architecture import Architecture
from trainer.models.hf_format import read_architecture
from trainer.models.load import ModelLoader
from trainer.models.quantized_base import validate_base
from trainer.parallel import distributed
from trainer.parallel.engine import Engine
from trainer.parallel.mesh import MeshShape
from trainer.pipelines.base import Models, Pipeline, Plan, Source
from trainer.pipelines.reference import ADAPTERS_OFF, OWN_REFERENCE, REFERENCE_REMEDY
from trainer.rl.actor import Actor, Sampler
from trainer.rl.advantages import ESTIMATORS
from trainer.rl.experience import RolloutBatch
from trainer.rl.judge import JudgeReward
from trainer.rl.losses import KL_ESTIMATORS, Clipped, approx_kl, policy_loss, ratios, value_loss
from trainer.rl.rewards import FunctionReward, ModelReward
from trainer.rl.rollouts import Rollouts
from trainer.rl.scoring import RewardSum, Scores
from trainer.rl.settings import CriticInit, PolicyGradientSettings, ReferencePolicy, RolloutEngine

log = logging.getLogger(__name__)

HEAD_REMEDY = "use pipeline.critic=head"

REWARDS = (ModelReward, FunctionReward, JudgeReward)
"""Rewards that come with the framework: naming them here registers them."""


@dataclass
class PPOModels(Models):
    """Beside the policy, the rewards that score it, and which of its parameters are trained."""

    rewards: RewardSum = field(default_factory=lambda: RewardSum({}, {}))
    adapter: Adapter = field(default_factory=Full)


@schema("pipeline/ppo")
@dataclass
class PPO(PolicyGradientSettings, Pipeline):
    """Clipped policy gradients on rollouts (docs/algorithms.md#ppo; Schulman et al. 2017, arXiv:1707.06347)."""

    learning_rate: ClassVar[float] = 1e-6
    batch_type: ClassVar[type[Batch]] = PromptBatch

    def data_length(self, length: int) -> int:
        # The last id of a completion is predicted, never read.
        return length + 1 - self.rollout.tokens

    def steps(self, units: int, epochs: float, size: int) -> float:
        return units * self.group_size * epochs * self.epochs / size

    def validate_adapter(self, adapter: Adapter, new_tokens: int = 0) -> Iterator[str]:
        reason = adapter.moves_reference(new_tokens)
        if self.reference is ReferencePolicy.adapters_off and reason is not None:
            yield f"{ADAPTERS_OFF}; {reason}: use pipeline.reference=model"
        if dropout := getattr(adapter, "dropout", 0.0):
            yield f"adapter.dropout={dropout} makes old and new probabilities differ by chance; use adapter.dropout=0"

    def validate_batch(self, batch: Any, replicas: int) -> Iterator[str]:
        if self.advantage not in ESTIMATORS:
            return
        size, prompts = self.rollout.size, self.rollout.size // self.group_size
        if size % batch.size:
            near = max(size // batch.size, 1) * batch.size
            yield f"pipeline.rollout.size={size} is not a multiple of batch.size={batch.size}; use {near}"
        if prompts % replicas:
            rule = f"not a multiple of {replicas} ranks that read different data"
            yield f"pipeline.rollout.size={size} makes {prompts} prompts, {rule}; use another size"
        if self.rollout.tokens >= batch.length:
            yield (
                f"pipeline.rollout.tokens={self.rollout.tokens} leaves no room for a prompt in batch.length={batch.length}; "
                f"use batch.length={2 * self.rollout.tokens} or fewer tokens"
            )

    def validate_mesh(self, shape: MeshShape) -> Iterator[str]:
        yield from super().validate_mesh(shape)
        if self.rollout.engine is RolloutEngine.vllm and shape.replica > 1:
            yield (
                "pipeline.rollout.engine=vllm samples on each rank by itself, and the ranks of a replica must have the same "
                "completions; use pipeline.rollout.engine=own"
            )

    def validate_tokenizer(self, tokenizer: Tokenizer) -> Iterator[str]:
        folder = self.critic_folder
        if self.estimator.critic and folder is not None:
            yield from validate_base(folder, Full(), "pipeline.critic_path", HEAD_REMEDY)
        if self.estimator.critic and folder is not None and not open_tokenizer(folder).ids_as(tokenizer):
            yield f"the critic would start from {folder}, which has another tokenizer; use pipeline.critic=policy or head"

    def auxiliary_models(self, architecture: Architecture) -> Iterator[tuple[Architecture, bool]]:
        if self.reference is ReferencePolicy.model and self.uses_reference:
            yield architecture, False
        for folder in filter(None, (reward.model_folder() for reward in self.reward.values())):
            yield read_architecture(Path(folder)), False
        if self.estimator.critic and not self._critic_is_head:
            shape = architecture if self.critic_folder is None else read_architecture(Path(self.critic_folder))
            yield dataclasses.replace(shape, scores=True), True

    @property
    def _critic_is_head(self) -> bool:
        return self.critic is CriticInit.head and self.critic_path is None

    def models(self, load: ModelLoader, tokenizer: Tokenizer) -> PPOModels:
        policy = dataclasses.replace(load, kind=ActorCritic).load() if self.estimator.critic else load.load()
        if isinstance(policy, ActorCritic):
            self._attach_critic(policy, load)
        scorers = {name: reward.open(load, tokenizer) for name, reward in self.reward.items()}
        rewards = RewardSum(scorers, {name: reward.weight for name, reward in self.reward.items()})
        models = PPOModels(
            policy, tokenizer, load.fingerprint(), fake_quantizer=load.fake_quantizer, rewards=rewards, adapter=load.adapter
        )  # fmt: skip
        if self.reference is ReferencePolicy.model and self.uses_reference:
            models.frozen["reference"] = load.frozen()
        return models

    def _attach_critic(self, policy: ActorCritic, load: ModelLoader) -> None:
        policy.rates = {CRITIC: self.critic_lr}
        if self._critic_is_head:
            with load.strategy.construction():
                policy.critic = ValueHead(policy.architecture.hidden_size)
            load.strategy.place(policy.critic, (), load.precision)
            load.strategy.fill(policy.critic.weight, torch.zeros(1, policy.architecture.hidden_size))
            return
        folder = self.critic_folder or load.config.path
        if folder is not None and (problems := list(validate_base(folder, Full(), "model.path", HEAD_REMEDY))):
            raise ConfigError(problems)
        config = dataclasses.replace(load.config, path=folder)
        new = load.new_tokens if folder == load.config.path else 0
        critic = dataclasses.replace(load, config=config, adapter=Full(), new_tokens=new, fake_quantizer=None)
        policy.critic = dataclasses.replace(critic, scores=True).load()

    def exports(self, name: str) -> bool:
        return of_policy(name)

    def batches(self, models: Models, engine: Engine, corpus: Corpus, plan: Plan) -> Source:
        assert isinstance(models, PPOModels)
        world = distributed.world()
        prompts = corpus.train.loader(
            micro=self.rollout.size // self.group_size // world.data.size,
            seed=plan.seed,
            rank=world.data.rank,
            ranks=world.data.size,
        )
        if self.rollout.off_policy_filters and world.is_main:
            names = " and ".join(f"pipeline.rollout.{name}" for name in self.rollout.off_policy_filters)
            log.warning("%s change what is sampled but not the ratios, which are biased; unset them to train", names)
        actor = Actor(
            engine,
            models.tokenizer,
            self.rollout,
            critic=self.estimator.critic,
            reference=models.frozen.get("reference"),
            base_is_reference=self.reference is ReferencePolicy.adapters_off and self.uses_reference,
            sampler=self._vllm(models, engine, plan) if self.rollout.engine is RolloutEngine.vllm else None,
        )
        return Rollouts(self, prompts, actor, models.rewards, plan.watch, micro=plan.micro, seed=plan.seed)

    def _vllm(self, models: PPOModels, engine: Engine, plan: Plan) -> Sampler:
        from trainer.generation.vllm import VLLMSampler

        weights = partial(merged_policy, engine, models.adapter, models.fake_quantizer)
        return VLLMSampler(
            engine.module.architecture,  # type: ignore[arg-type]
            lambda: ((n, tensor) for n, tensor in weights() if of_policy(n)),
            self.rollout.sampling,
            models.tokenizer.stops,
            length=plan.length + 1,  # the last id of a completion is predicted, never read
            memory=self.rollout.gpu_memory_utilization,
            max_concurrent=self.rollout.max_concurrent,
            dtype=engine.precision.dtype,
        )

    def first_step_problems(self, first: FirstStep) -> list[str]:
        """Also, the policy that is trained on its first mini-batch is still the one that sampled it."""
        if first.values.get("objective/missing") == 1:
            return [
                "no completion of the first iteration has a score (objective/missing is 1): look at what the rewards give; "
                "exact_match needs right answers (data.columns.ideal, data.answer), a function must not give None for all"
            ]
        if first.learnt_nothing:
            log.warning(
                "the first mini-batch teaches nothing, since all its completions are masked: raise pipeline.rollout.tokens, "
                "or use another pipeline.unfinished than mask"
            )
            return []
        problems, rule = super().first_step_problems(first), "the policy has not changed since it sampled"
        remedy = (
            "old and new log-probabilities must come from the same ids, the same temperature and a model without dropout; "
            "with rollouts from another engine, recompute the old ones"
        )
        for metric, value in (("policy/ratio_mean", 1.0), ("policy/clip_fraction", 0.0), ("policy/approx_kl", 0.0)):
            problems += first.near(metric, value, rule, remedy)
        if self.uses_reference:
            kl = first.values["objective/kl"] / first.values["completion/length_mean"]
            rule = f"{OWN_REFERENCE}, from which it is 0 nats a token"
            problems += first.near("objective/kl", 0.0, rule, REFERENCE_REMEDY, value=kl)
        return problems

    def flat_step_problems(self, first: FirstStep) -> list[str]:
        """All scores cut to one value are an error; equal ones may differ later, so they are only logged."""
        clipped = first.values.get("objective/clipped", 0.0)
        if clipped == 1:
            return [
                f"all scores of the first iteration lie beyond pipeline.score_clip={self.clip_at:g}, so they are cut to "
                "equal ones and nothing is learnt: scale pipeline.reward.NAME.weight, or use pipeline.score_clip=0"
            ]
        log.warning(
            "the first step teaches nothing: all advantages are 0, since the scores within every group are equal "
            "(objective/score_std %.3g over all); other prompts, more samples_per_prompt or rollout.max_resample may differ",
            first.values.get("objective/score_std", math.nan),
        )
        return []

    def loss(self, models: Models, batch: RolloutBatch) -> tuple[Tensor, Metrics]:
        read, values = logprobs_at(batch.logit_index, batch.targets, self.rollout.temperature), None
        if self.estimator.critic:
            (logprobs, entropy), values = models.trained(
                batch.tokens, batch.documents, read, values_at(batch.logit_index)
            )
        else:
            logprobs, entropy = models.trained(batch.tokens, batch.documents, read)
        w, metrics = batch.weights, Metrics()
        ratio = ratios(logprobs, batch.logprobs)
        policy = policy_loss(ratio, batch.advantages, self.clip_low, self.clip_high)
        if self.importance_cap:
            importance = ratios(batch.logprobs, batch.sampled).clamp(max=self.importance_cap)
            policy = policy._replace(loss=policy.loss * importance)
        loss = (w * policy.loss).sum()
        if self.entropy_coef:
            loss = loss - self.entropy_coef * (w * entropy).sum()
        if self.kl_loss_coef:
            kl = (w * KL_ESTIMATORS[self.kl_loss_estimator](logprobs - batch.reference)).sum()
            loss = loss + self.kl_loss_coef * kl
            metrics.mean("policy/kl_loss", kl, batch.weight)
        if values is not None:
            value = value_loss(values, batch.values, batch.returns, self.clip_value)
            loss = loss + self.value_coef * (w * value.loss).sum()
            metrics.mean("value/loss", (w * value.loss.detach()).sum(), batch.weight)
            metrics.mean("value/clip_fraction", (w * value.clipped).sum(), w.sum())
            metrics.mean("value/mean", (w * values.detach()).sum(), w.sum())
        self._measure(metrics, batch, policy, ratio, entropy)
        for name, number in batch.rollout_metrics.items():
            metrics.mean(name, loss.new_full((), number, dtype=torch.float64), 1.0)
        return loss, metrics

    def _measure(self, metrics: Metrics, batch: RolloutBatch, policy: Clipped, ratio: Tensor, entropy: Tensor) -> None:
        w = batch.weights
        metrics.mean("policy/loss", (w * policy.loss).sum(), batch.weight)
        columns = {
            "policy/approx_kl": approx_kl(ratio),
            "policy/clip_fraction": policy.clipped,
            "policy/ratio_mean": ratio,
            "policy/entropy": entropy,
            "rollout/mismatch": (batch.logprobs - batch.sampled).abs(),
        }
        for name, column in columns.items():
            metrics.mean(name, (w * column.detach()).sum(), w.sum().double())

    def judge(self, models: Models, responses: Sequence[Response]) -> Scores:
        assert isinstance(models, PPOModels)
        return models.rewards(responses)
