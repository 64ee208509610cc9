"""Settings of a run that belong to no other part of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

from trainer.config import Node, schema, setting
from trainer.parallel import distributed


class Resume(StrEnum):
    """What to do with what is in ``run_dir``."""

    auto = "auto"
    new = "new"
    never = "never"


@schema("batch")
@dataclass
class BatchSizes(Node):
    """How much is learnt from at once. A unit is a packed row (pretrain, sft), a pair (reward, dpo) or a completion (ppo)."""

    size: int = setting(32, "units of a step, over all ranks", least=1)
    micro: int = setting(8, "units of a forward on one rank", least=1)
    length: int = setting(512, "tokens of a row", least=2)

    def problems(self) -> Iterator[str]:
        # What no layout of the ranks can do; the rest is said where the strategy is known.
        if self.size % self.micro:
            yield from self.validate_replicas(distributed.ranks(), "rank")

    def validate_replicas(self, replicas: int, word: str) -> Iterator[str]:
        """One sentence if so many ``replicas``, ``word`` in words, cannot learn from as many micro-batches each."""
        unit = self.micro * replicas
        if self.size % unit:
            below = self.size // unit * unit
            nearest = f"{below} or {below + unit}" if below else f"{unit}, or a smaller batch.micro"
            word = word if replicas == 1 else f"{word}s"
            yield (
                f"batch.size={self.size} is not a multiple of {unit} ({replicas} {word} x batch.micro={self.micro}); "
                f"use {nearest}"
            )

    def validate_stages(self, replicas: int, stages: int) -> Iterator[str]:
        """One sentence if a replica has fewer micro-batches a step than the ``stages`` that they pass through."""
        accumulate = self.size // (self.micro * replicas)
        if 0 < accumulate < stages:
            most = self.size // (replicas * stages)
            fits = [micro for micro in range(1, most + 1) if self.size % (micro * replicas) == 0]
            remedy = f"batch.size={self.micro * replicas * stages}" + (f" or batch.micro={fits[-1]}" if fits else "")
            yield (
                f"strategy.pipeline={stages} wants at least {stages} micro-batches a step, so that every stage has one, "
                f"and batch.size={self.size} is {accumulate} of batch.micro={self.micro} a replica; use {remedy}"
            )


class Direction(StrEnum):
    """Which end of the metric is the better one."""

    minimize = "minimize"
    maximize = "maximize"


@schema("sweep")
@dataclass
class Sweep(Node):
    """How the points of a sweep run (``--multirun``)."""

    ranks: int = setting(
        1, "ranks of a point on this machine; a point that is a job of its own has one a task", least=1
    )
    metric: str = setting("eval/loss", "the metric that points are compared by, at the end of each")
    direction: Direction = setting(Direction.minimize, "which end of the metric is the better one")
