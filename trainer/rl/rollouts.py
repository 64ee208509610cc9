"""Reinforcement learning as a source of batches: sample with the current policy, score, find advantages, hand out.

An iteration's experience is the same on all ranks and on any number of them. So mini-batches are cut out of it like out of
any data, and a checkpoint in the middle of an iteration holds it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from trainer.data.loader import Prefetched, permuted
from trainer.generation.completion import Completion, Response
from trainer.parallel import distributed
from trainer.rl.actor import Actor, Group, Reading
from trainer.rl.experience import Experience, RolloutBatch
from trainer.tracking.throughput import Stopwatch


class Sampler(Protocol):
    """Completes prompts with the policy as it is now; collective. ``keys``: what each completion's draws depend on."""

    def __call__(self, prompts: Sequence[Sequence[int]], keys: Sequence[tuple[int, ...]]) -> list[Completion]: ...


class Learnable(NamedTuple):
    """An iteration, ready to be learnt from: its experience, metrics, and texts to be seen."""

    experience: Experience
    made: dict[str, float]
    samples: list[dict[str, Any]]


class Judged(NamedTuple):
    """Groups of an iteration with what models and rewards say of them; scores by name, None where one is missing."""

    groups: list[Group]
    readings: list[Reading]
    scores: dict[str, list[float | None]]

    def but(self, kept: Sequence[int]) -> Judged:
        """These groups alone."""
        each = len(self.groups[0].completions) if self.groups else 1
        chosen = [n * each + k for n in kept for k in range(each)]
        scores = {name: [values[n] for n in chosen] for name, values in self.scores.items()}
        return Judged([self.groups[n] for n in kept], [self.readings[n] for n in kept], scores)

    def __add__(self, other: object) -> Judged:
        assert isinstance(other, Judged)
        scores = {name: self.scores.get(name, []) + values for name, values in other.scores.items()}
        return Judged(self.groups + other.groups, self.readings + other.readings, scores)


class Rollouts:
    """Endless micro-batches of what the current policy does (a `Source`).

    ``judge``: scores by name of this rank's answers, ``score`` among them. ``learn``: what is learnt from an iteration, at
    the price ``kl`` of leaving the reference. ``adapt``: that price after an iteration. ``passes``: over an iteration.
    """

    def __init__(
        self,
        actor: Actor,
        sampler: Sampler,
        prompts: Prefetched,
        judge: Callable[[Sequence[Response]], Mapping[str, list[float | None]]],
        learn: Callable[[Judged, float], Learnable],
        adapt: Callable[[float, float], float],
        decode: Callable[[Sequence[int]], str],
        watch: Stopwatch,
        *,
        samples: int,
        passes: int,
        micro: int,
        kl: float,
        limit: float | None,
        seed: int,
    ) -> None:
        self.actor, self.sampler, self.prompts, self.judge, self.learn = actor, sampler, prompts, judge, learn
        self.adapt, self.decode, self.watch = adapt, decode, watch
        self.samples, self.passes, self.micro, self.limit, self.seed = samples, passes, micro, limit, seed
        self.size = actor.settings.size
        self.iteration, self.position, self.kl = 0, 0, kl
        self.experience: Experience | None = None
        self._said: Learnable | None = None

    def __iter__(self) -> Iterator[RolloutBatch]:
        return self

    def __next__(self) -> RolloutBatch:
        if self.experience is None:
            learnable = self._collect()
            self.experience, self._said = learnable.experience, learnable
            self.kl = self.adapt(self.kl, learnable.made["objective/kl"])
        data = distributed.world().data
        turn, place = divmod(self.position, self.size)
        batch = self.experience.batch([self._number(turn, n) for n in data.block(place, self.micro)])
        if self._said is not None:
            batch.made, batch.samples, self._said = self._said.made, self._said.samples, None
        self.position += self.micro * data.size
        if self.position >= self.size * self.passes:
            self._end()
        return batch

    def observe(self, metrics: Mapping[str, Tensor]) -> None:
        """Leave the rest of an iteration out once the policy has moved too far in it."""
        if self.limit is not None and self.position and float(metrics["policy/approx_kl"]) > self.limit:
            self._end()

    def state_dict(self) -> dict[str, Any]:
        return {
            "prompts": self.prompts.state_dict(),
            "iteration": self.iteration,
            "position": self.position,
            "kl": self.kl,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.prompts.load_state_dict(state["prompts"])
        self.iteration, self.position, self.kl = state["iteration"], state["position"], state["kl"]
        self.experience = None

    def tensors(self) -> dict[str, Tensor]:
        """What of this iteration is still to be learnt from."""
        return {} if self.experience is None else self.experience.tensors()

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Continue in the middle of an iteration."""
        self.experience = Experience.of(tensors) if tensors else None

    def close(self) -> None:
        """Stop reading ahead."""
        self.prompts.close()

    def _end(self) -> None:
        self.experience, self.position = None, 0
        self.iteration += 1

    def _number(self, turn: int, place: int) -> int:
        """The completion at a place of a pass: prompts in a new order each time, their completions together."""
        group, sample = divmod(place, self.samples)
        return (
            permuted(group, self.size // self.samples, f"{self.seed}:{self.iteration}:{turn}") * self.samples + sample
        )

    def _collect(self) -> Learnable:
        """Sample, score and read an iteration, all of which every rank then holds."""
        wanted, kept, equal = self.size // self.samples, Judged([], [], {}), Judged([], [], {})
        for draw in range(1 + self.actor.settings.redraws):
            judged = self._judged(self._sampled(draw * wanted))
            every, scores = range(len(judged.groups)), judged.scores["score"]
            differ = [n for n in every if not self.actor.settings.redraws or len(set(self._of(scores, n))) > 1]
            kept += judged.but(differ)
            equal += judged.but([n for n in every if n not in differ])
            if len(kept.groups) >= wanted:
                break
        whole = kept + equal.but(range(max(0, min(wanted - len(kept.groups), len(equal.groups)))))
        learnable = self.learn(whole.but(range(wanted)), self.kl)
        if self.actor.settings.redraws:
            learnable.made["rollout/equal_groups"] = len(equal.groups) / (len(kept.groups) + len(equal.groups))
        return learnable

    def _of(self, values: list[float | None], group: int) -> list[float | None]:
        """What of values of completions is a group's."""
        return values[group * self.samples : (group + 1) * self.samples]

    def _sampled(self, before: int) -> list[Group]:
        """This rank's groups of a draw; ``before``: prompts that this iteration drew earlier."""
        batch: Any = next(self.prompts)
        places = distributed.world().data.share(range(before, before + self.size // self.samples))
        keys = [(self.seed, self.iteration, place, k) for place in places for k in range(self.samples)]
        with self.watch.lap("rollout"):
            found = self.sampler([p.ids for p in batch.prompts for _ in range(self.samples)], keys)
        rows = batch.rows.tolist()
        return [
            Group(rows[n], place, batch.prompts[n], found[n * self.samples : (n + 1) * self.samples])
            for n, place in enumerate(places)
        ]

    def _judged(self, groups: list[Group]) -> Judged:
        """Groups of all ranks in their order, judged where they were sampled."""
        answers = [Response(g.prompt, c.ids, self.decode(c.ids), g.row) for g in groups for c in g.completions]
        with self.watch.lap("score"):
            scores = self.judge(answers)
            readings = self.actor.read(groups)
        mine: list[list[Any]] = [
            [g.as_json(), [t.tolist() for t in reading], {name: self._of(values, n) for name, values in scores.items()}]
            for n, (g, reading) in enumerate(zip(groups, readings, strict=True))
        ]
        gathered = (item for part in distributed.gather_over_data(mine) for item in part)
        every = sorted(((Group.from_json(g), *rest) for g, *rest in gathered), key=lambda item: item[0].number)
        names = list(scores)
        return Judged(
            [g for g, _, _ in every],
            [Reading(*(torch.tensor(values) for values in read)) for _, read, _ in every],
            {name: [value for _, _, found in every for value in found[name]] for name in names},
        )
