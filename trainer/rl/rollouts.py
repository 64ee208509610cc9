"""Reinforcement learning as a source of batches. An iteration is one straight line:

    prompts -> sample -> score -> log-probabilities -> advantages -> experience -> mini-batches

An iteration's experience is the same on all ranks and on any number of them. So mini-batches are cut out of it like out of
any data, and a checkpoint in the middle of an iteration holds it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from trainer.data.loader import Prefetched, permuted
from trainer.data.tokenizer import Tokenizer
from trainer.generation.completion import Response
from trainer.parallel import distributed
from trainer.rl.actor import Actor
from trainer.rl.experience import AdvantageComputer, Experience, RolloutBatch
from trainer.rl.losses import KLController
from trainer.rl.rollout_metrics import explained_variance, rollout_metrics, rollout_samples
from trainer.rl.scoring import PromptGroup, ScoredRollouts, Scores
from trainer.rl.settings import PolicyGradientSettings
from trainer.tracking.throughput import Stopwatch

log = logging.getLogger(__name__)


class Rollouts:
    """Endless micro-batches of what the current policy does (a `Source`).

    settings: of the pipeline
    prompts: endless batches of this rank's prompts, each what an iteration needs
    actor: the policy, which samples, with reference and critic
    rewards: scores by name of this rank's responses, ``score`` among them; collective
    watch: times sampling and scoring
    micro: completions of a micro-batch
    seed: of sampling and of the order of mini-batches
    """

    def __init__(
        self,
        settings: PolicyGradientSettings,
        prompts: Prefetched,
        actor: Actor,
        rewards: Callable[[Sequence[Response]], Scores],
        watch: Stopwatch,
        *,
        micro: int,
        seed: int,
    ) -> None:
        self.settings, self.prompts, self.actor, self.rewards, self.watch = settings, prompts, actor, rewards, watch
        self.micro, self.seed = micro, seed
        self.size, self.group_size = settings.rollout.size, settings.group_size
        self.advantages = AdvantageComputer(settings)
        self.kl = KLController(settings.initial_kl_coef, settings.kl_target)
        self.iteration, self.position = 0, 0
        self.experience: Experience | None = None
        self._metrics: dict[str, float] = {}
        self._samples: list[dict[str, Any]] = []
        self._warned = False

    def __iter__(self) -> Iterator[RolloutBatch]:
        return self

    def __next__(self) -> RolloutBatch:
        if self.experience is None:
            self.experience = self._collect()
        data = distributed.world().data
        epoch, index = divmod(self.position, self.size)
        batch = self.experience.batch([self._shuffled(epoch, n) for n in data.block(index, self.micro)])
        batch.rollout_metrics, batch.samples = self._metrics, self._samples
        self._metrics, self._samples = {}, []
        self.position += self.micro * data.size
        if self.position >= self.size * self.settings.epochs:
            self._end_iteration()
        return batch

    def observe(self, metrics: Mapping[str, Tensor]) -> None:
        """Skip the rest of an iteration once the policy has moved too far in it."""
        limit = self.settings.kl_limit
        if limit is not None and self.position and float(metrics["policy/approx_kl"]) > limit:
            self._end_iteration()

    def _collect(self) -> Experience:
        rollouts, metrics = self._scored_rollouts()
        inputs = self.advantages.inputs(rollouts, self.kl.coef)
        experience = self.advantages.experience(rollouts, inputs)
        metrics |= rollout_metrics(rollouts, inputs, experience, self.settings.clip_at)
        metrics["objective/kl_coef"] = self.kl.coef
        self._warn_of_clipping(metrics.get("objective/clipped", 0.0))
        if self.settings.estimator.critic:
            metrics["value/explained_variance"] = explained_variance(
                experience.values, experience.returns, experience.weights
            )
        self.kl.update(metrics["objective/kl"])
        self._metrics = metrics
        self._samples = rollout_samples(rollouts, experience, self._decode, self.settings.rollout.log_samples)
        return experience

    def _warn_of_clipping(self, share: float) -> None:
        if share and not self._warned and distributed.world().is_main:
            self._warned = True
            log.warning(
                "%.0f %% of an iteration's scores lie beyond pipeline.score_clip=%g and are cut to it; scale "
                "pipeline.reward.NAME.weight, or use pipeline.score_clip=0",
                100 * share, self.settings.clip_at,
            )  # fmt: skip

    def _scored_rollouts(self) -> tuple[ScoredRollouts, dict[str, float]]:
        """An iteration's groups; those whose scores are all equal only where further draws did not replace them."""
        count, draws = self.size // self.group_size, self.settings.rollout.max_resample
        if not draws:
            return self._score(self._sample(0)), {}
        useful = equal = ScoredRollouts([], [], {})
        for draw in range(1 + draws):
            rollouts = self._score(self._sample(draw * count))
            differing = rollouts.differing(self.settings.clip_at)
            useful = useful.joined(rollouts.select(differing))
            equal = equal.joined(rollouts.select([n for n in range(count) if n not in differing]))
            if len(useful.groups) >= count:
                break
        share = len(equal.groups) / (len(useful.groups) + len(equal.groups))
        return useful.joined(equal).select(range(count)), {"rollout/equal_groups": share}

    def _sample(self, drawn: int) -> list[PromptGroup]:
        """This rank's prompts of a draw with their completions; ``drawn``: prompts that this iteration drew before."""
        batch: Any = next(self.prompts)
        numbers = distributed.world().data.share(range(drawn, drawn + self.size // self.group_size))
        # A completion's random draws depend on its key alone: the same on any number of ranks.
        keys = [(self.seed, self.iteration, number, k) for number in numbers for k in range(self.group_size)]
        with self.watch.lap("rollout"):
            completions = self.actor.sample([p.ids for p in batch.prompts for _ in range(self.group_size)], keys)
        groups = [completions[n : n + self.group_size] for n in range(0, len(completions), self.group_size)]
        return [
            PromptGroup(row, number, prompt, group)
            for row, number, prompt, group in zip(batch.rows.tolist(), numbers, batch.prompts, groups, strict=True)
        ]

    def _score(self, groups: list[PromptGroup]) -> ScoredRollouts:
        """This rank's groups with their scores and log-probabilities, and those of all other ranks."""
        responses = [Response(g.prompt, c.ids, self._decode(c.ids), g.row) for g in groups for c in g.completions]
        with self.watch.lap("score"):
            scores = self.rewards(responses)
            logprobs = self.actor.logprobs(groups)
        return ScoredRollouts(groups, logprobs, scores).gathered()

    def _shuffled(self, epoch: int, index: int) -> int:
        """The completion at an index of a pass: prompts in a new order each pass, their completions next to each other."""
        group, sample = divmod(index, self.group_size)
        key = f"{self.seed}:{self.iteration}:{epoch}"
        return permuted(group, self.size // self.group_size, key) * self.group_size + sample

    def _decode(self, ids: Sequence[int]) -> str:
        return text_of(self.actor.tokenizer, ids)

    def _end_iteration(self) -> None:
        self.experience, self.position = None, 0
        self.iteration += 1

    def state_dict(self) -> dict[str, Any]:
        state = {
            "prompts": self.prompts.state_dict(),
            "iteration": self.iteration,
            "position": self.position,
            "kl": self.kl.coef,
        }
        if remembered := self.advantages.state_dict():
            state["advantage"] = remembered
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.prompts.load_state_dict(state["prompts"])
        self.iteration, self.position, self.kl.coef = state["iteration"], state["position"], state["kl"]
        if "advantage" in state:
            self.advantages.load_state_dict(state["advantage"])
        self.experience = None

    def tensors(self) -> dict[str, Tensor]:
        """What of this iteration is still to be trained on (docs/algorithms.md#ppo)."""
        return {} if self.experience is None else self.experience.tensors()

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Continue in the middle of an iteration."""
        self.experience = Experience.of(tensors) if tensors else None

    def close(self) -> None:
        """Stop reading ahead."""
        self.prompts.close()


def text_of(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """A completion without the token that ended it."""
    return tokenizer.decode(ids[:-1] if ids and ids[-1] in tokenizer.stops else ids)
