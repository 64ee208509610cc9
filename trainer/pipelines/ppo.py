"""Proximal policy optimisation, and group-based policy gradients: a policy learns from what its own completions are worth."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from trainer.config import ConfigError, schema
from trainer.data.corpus import Corpus
from trainer.data.tokenizer import Tokenizer
from trainer.diagnostics.first_step import FirstStep
from trainer.functional import logprobs_at
from trainer.generation.completion import Response
from trainer.metrics import Metrics
from trainer.models.actor_critic import CRITIC, ActorCritic, ValueHead, of_policy, values_at
from trainer.models.architecture import Architecture
from trainer.models.hf_format import read_architecture
from trainer.models.load import ModelLoader
from trainer.models.lora import Full
from trainer.parallel import distributed
from trainer.parallel.engine import Engine
from trainer.pipelines.base import Models, Plan, Source
from trainer.pipelines.ppo_settings import Critic, PolicyGradient, Reference, Unfinished
from trainer.rl.actor import Actor, Decoder
from trainer.rl.advantages import AGGREGATES, KL, Discount
from trainer.rl.experience import RolloutBatch
from trainer.rl.learning import Learning
from trainer.rl.losses import approx_kl, policy_loss, ratios, value_loss
from trainer.rl.rewards import Sum
from trainer.rl.rollouts import Judged, Learnable, Rollouts, Sampler

log = logging.getLogger(__name__)


@dataclass
class Players(Models):
    """Besides the policy, the rewards that judge it, and the folder that it began from."""

    rewards: Sum = field(default_factory=lambda: Sum({}, {}))
    folder: str = ""


@schema("pipeline/ppo")
@dataclass
class PPO(PolicyGradient):
    """Clipped policy gradients on rollouts (docs/algorithms.md#ppo; Schulman et al. 2017, arXiv:1707.06347)."""

    def auxiliary_models(self, architecture: Architecture) -> Iterator[tuple[Architecture, bool]]:
        if self.reference is Reference.model and (self.kl_price or self.kl_loss):
            yield architecture, False
        for scorer in (found for reward in self.reward.values() if (found := reward.starts_critic())):
            yield read_architecture(Path(scorer)), False
        if self.estimator.critic and (self.critic is not Critic.head or self.critic_path):
            folder = self.critic_path or (self.reward_folder if self.critic is Critic.reward else None)
            shape = architecture if folder is None else read_architecture(Path(folder))
            yield dataclasses.replace(shape, scores=True), True

    def models(self, load: ModelLoader, tokenizer: Tokenizer) -> Players:
        policy = dataclasses.replace(load, kind=ActorCritic).load() if self.estimator.critic else load.load()
        if isinstance(policy, ActorCritic):
            self._attach_critic(policy, load)
        rewards = Sum(
            {name: reward.open(load, tokenizer) for name, reward in self.reward.items()},
            {name: reward.weight for name, reward in self.reward.items()},
        )
        models = Players(policy, tokenizer, load.fingerprint(), rewards=rewards, folder=load.config.path or "")
        if self.reference is Reference.model and (self.kl_price or self.kl_loss):
            models.frozen["reference"] = load.frozen()
        return models

    def _attach_critic(self, policy: ActorCritic, load: ModelLoader) -> None:
        policy.rates = {CRITIC: self.critic_lr}
        if self.critic is Critic.head and self.critic_path is None:
            with load.strategy.construction():
                policy.critic = ValueHead(policy.architecture.hidden_size)
            load.strategy.fill(policy.critic.weight, torch.zeros(1, policy.architecture.hidden_size))
            return
        folder = self.critic_path or (self.reward_folder if self.critic is Critic.reward else load.config.path)
        config = load.config if folder is None else dataclasses.replace(load.config, path=folder)
        grow = load.grow and folder == load.config.path
        policy.critic = dataclasses.replace(load, config=config, adapter=Full(), grow=grow, scores=True).load()

    def exports(self, name: str) -> bool:
        return of_policy(name)

    def batches(self, models: Models, engine: Engine, corpus: Corpus, plan: Plan) -> Source:
        assert isinstance(models, Players)
        world, tokenizer = distributed.world(), models.tokenizer
        actor = Actor(
            engine, tokenizer.stops, self.rollout, self.estimator.critic, models.frozen.get("reference"),
            self.reference is Reference.adapters_off and bool(self.kl_price or self.kl_loss),
        )  # fmt: skip
        prompts = corpus.train.loader(
            micro=self.rollout.size // self.each // world.data.size,
            seed=plan.seed,
            rank=world.data.rank,
            ranks=world.data.size,
        )
        if self.rollout.cut and world.is_main:
            names = " and ".join(f"pipeline.rollout.{name}" for name in self.rollout.cut)
            log.warning(
                "%s cut the distribution that is sampled from, so ratios are biased; set them back to train", names
            )
        sampler: Sampler = actor.sample
        if self.rollout.engine is Decoder.vllm:
            sampler = self._vllm(models, engine, plan)
        return Rollouts(
            actor, sampler, prompts, models.rewards, partial(self.learn, models), self.adapted,
            partial(text_of, tokenizer), plan.watch, samples=self.each, passes=self.passes, micro=plan.micro,
            kl=self.kl_price, limit=self.kl_limit, seed=plan.seed,
        )  # fmt: skip

    def _vllm(self, models: Players, engine: Engine, plan: Plan) -> Sampler:
        from trainer.generation.vllm import VLLMSampler

        if not models.folder:
            raise ConfigError(
                ["pipeline.rollout.engine=vllm opens the policy's shape from model.path; give one, or use own"]
            )

        def weights() -> Iterator[tuple[str, Tensor]]:
            return ((name, tensor) for name, tensor in engine.weights() if of_policy(name))

        return VLLMSampler(
            Path(models.folder), weights, self.rollout.sampling, models.tokenizer.stops, length=plan.length,
            memory=self.rollout.memory, dtype=str(engine.precision.dtype).removeprefix("torch."),
        )  # fmt: skip

    def first_step_problems(self, first: FirstStep) -> list[str]:
        """Also, the policy that learns from its first mini-batch is still the one that sampled it."""
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
        return problems

    def learn(self, models: Models, judged: Judged, kl: float) -> Learnable:
        """What is learnt from an iteration: advantages and returns at the price ``kl``."""
        return Learning(
            estimator=self.estimator, discount=Discount(self.gamma, self.lam), kl=kl, kl_of=KL[self.kl_estimator],
            aggregate=AGGREGATES[self.aggregate or self.estimator.aggregate], score_clip=self.score_clip,
            penalty=self.penalty, masks=self.unfinished is Unfinished.mask,
            bootstraps=self.unfinished is Unfinished.bootstrap, longest=self.rollout.tokens, shown=self.rollout.shown,
            decode=partial(text_of, models.tokenizer),
        ).of(judged)  # fmt: skip

    def adapted(self, kl: float, found: float) -> float:
        """The price of a nat after an iteration that was ``found`` nats a completion away from the reference."""
        if self.kl_target is None:
            return kl
        return kl * (1 + 0.1 * min(0.2, max(-0.2, found / self.kl_target - 1)))

    def loss(self, models: Models, batch: RolloutBatch) -> tuple[Tensor, Metrics]:
        read = logprobs_at(batch.places, batch.targets, self.rollout.temperature)
        if self.estimator.critic:
            (logprobs, entropy), values = models.trained(batch.tokens, batch.documents, read, values_at(batch.places))
        else:
            logprobs, entropy = models.trained(batch.tokens, batch.documents, read)
        w, metrics = batch.weights, Metrics()
        ratio = ratios(logprobs, batch.logprobs)
        policy = policy_loss(ratio, batch.advantages, self.clip_low, self.clip_high)
        if self.correction:
            policy = policy._replace(
                loss=policy.loss * ratios(batch.logprobs, batch.sampled).clamp(max=self.correction)
            )
        loss = (w * policy.loss).sum()
        if self.entropy:
            loss = loss - self.entropy * (w * entropy).sum()
        if self.kl_loss:
            away = (w * KL[self.kl_loss_estimator](logprobs - batch.reference)).sum()
            loss = loss + self.kl_loss * away
            metrics.mean("policy/kl_loss", away, batch.weight)
        if self.estimator.critic:
            value = value_loss(values, batch.values, batch.returns, self.clip_value)
            loss = loss + self.value_weight * (w * value.loss).sum()
            self._report_values(metrics, values.detach(), batch, value.loss.detach(), value.clipped)
        tokens = w.detach()
        count = tokens.sum().double()
        metrics.mean("policy/loss", (w * policy.loss).sum(), batch.weight)
        for name, column in {
            "policy/approx_kl": approx_kl(ratio), "policy/clip_fraction": policy.clipped, "policy/ratio_mean": ratio,
            "policy/entropy": entropy, "rollout/mismatch": (batch.logprobs - batch.sampled).abs(),
        }.items():  # fmt: skip
            metrics.mean(name, (tokens * column.detach()).sum(), count)
        for name, number in batch.made.items():
            metrics.mean(name, loss.new_tensor(number, dtype=torch.float64), 1.0)
        return loss, metrics

    def _report_values(
        self, metrics: Metrics, values: Tensor, batch: RolloutBatch, loss: Tensor, clipped: Tensor
    ) -> None:
        w = batch.weights
        metrics.mean("value/loss", (w * loss).sum(), batch.weight)
        metrics.mean("value/clip_fraction", (w * clipped).sum(), w.sum())
        metrics.mean("value/mean", (w * values).sum(), w.sum())

    def judge(self, models: Models, answers: Sequence[Response]) -> dict[str, list[float | None]]:
        assert isinstance(models, Players)
        return models.rewards(answers)


def text_of(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """A completion without the token that ended it."""
    return tokenizer.decode(ids[:-1] if ids and ids[-1] in tokenizer.stops else ids)
