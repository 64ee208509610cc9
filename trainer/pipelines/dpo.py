"""Direct preference optimisation and its family: a policy learns from pairs of answers, beside a reference."""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from enum import StrEnum, auto
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from trainer.config import schema, setting
from trainer.data.corpus import Corpus
from trainer.data.pairs import AnswerBatch, Pairs
from trainer.data.tokenizer import Tokenizer
from trainer.diagnostics.first_step import TOLERANCE, Expectation, near
from trainer.metrics import Metrics
from trainer.models.architecture import Architecture
from trainer.models.load import ModelLoader
from trainer.models.lora import Adapter, adapters_off
from trainer.parallel import distributed
from trainer.parallel.engine import Engine
from trainer.pipelines.answers import Answers, PairAnswers, read_answers
from trainer.pipelines.base import Models, Pipeline
from trainer.pipelines.preference_losses import OBJECTIVES, Objective, Strength


class Reference(StrEnum):
    """Where the reference's log-probabilities come from."""

    model = auto()
    precomputed = auto()
    adapters_off = auto()
    none = auto()


@schema("pipeline/dpo")
@dataclass
class DPO(Pipeline):
    """A loss of log-probabilities of answers, in pairs or single (docs/algorithms.md#preferences)."""

    learning_rate: ClassVar[float] = 1e-6

    objective: str = setting("sigmoid", f"the loss: {', '.join(OBJECTIVES)}")
    beta: float | None = setting(None, "how strongly to stay with the reference; null = the objective's usual", above=0)
    gamma: float | None = setting(
        None, "simpo: the margin; orpo: weight of the odds ratio; null = the objective's usual", least=0
    )
    label_smoothing: float = setting(0.0, "probability that a label is wrong (sigmoid, robust)", least=0, below=0.5)
    desirable: float = setting(1.0, "kto: weight of desirable completions", least=0)
    undesirable: float = setting(1.0, "kto: weight of undesirable completions", least=0)
    average: bool = setting(True, "ipo: mean log-probability of a token instead of the answer's sum")
    rpo_alpha: float = setting(0.0, "weight of an added loss of the chosen answer's tokens (arXiv:2404.19733)", least=0)
    reference: Reference = setting(
        Reference.model,
        "model: a frozen copy; precomputed: once, before training; adapters_off: the base under adapter=lora; none",
    )

    def problems(self) -> Iterator[str]:
        if self.objective not in OBJECTIVES:
            yield f"pipeline.objective={self.objective} is not known; use {', '.join(OBJECTIVES)}"
        elif self.label_smoothing and self.objective not in ("sigmoid", "robust"):
            yield f"pipeline.label_smoothing is not used by pipeline.objective={self.objective}; set it to 0"

    def refusals(self, adapter: Adapter) -> Iterator[str]:
        if self.reference is Reference.adapters_off and not adapter.removable:
            yield "pipeline.reference=adapters_off needs adapter=lora; use model or precomputed"

    @property
    def unit(self) -> str:
        """What the objective learns from."""
        return self.chosen.unit if self.objective in OBJECTIVES else super().unit

    @property
    def chosen(self) -> Objective:
        """The objective's entry in the table."""
        return OBJECTIVES[self.objective]

    @property
    def strength(self) -> Strength:
        """The settings of the loss, the objective's usual ones where none are given."""
        usual = self.chosen
        return Strength(
            usual.beta if self.beta is None else self.beta, self.label_smoothing,
            usual.gamma if self.gamma is None else self.gamma, self.average, self.desirable, self.undesirable,
        )  # fmt: skip

    def beside(self, architecture: Architecture) -> Iterator[tuple[Architecture, bool]]:
        if self.chosen.referenced and self.reference is Reference.model:
            yield architecture, False

    def models(self, load: ModelLoader, tokenizer: Tokenizer) -> Models:
        models = super().models(load, tokenizer)
        if self.chosen.referenced and self.reference is Reference.model:
            models.frozen["reference"] = load.frozen()
        return models

    def prepare(self, models: Models, engine: Engine, corpus: Corpus, cache: Path) -> None:
        """The reference's log-probabilities of every pair, from the policy before its first step; kept for later runs."""
        if not self.chosen.referenced or self.reference is not Reference.precomputed:
            return
        everything: list[Any] = [*getattr(corpus.train, "parts", []), *corpus.heldout.values()]
        for pairs in everything:
            key = f"{models.origin}:{pairs.fingerprint}:{engine.precision.compute}"
            file = cache / "references" / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.safetensors"
            if not distributed.on_first_rank(file.is_file):
                with engine.evaluating():
                    found = scored(models, pairs, engine.device)
                distributed.on_first_rank(partial(_keep, file, found, key))
            pairs.reference = _kept(file, key, len(pairs))

    def begin(self, models: Models, engine: Engine, batches: Iterable[Any]) -> None:
        """What KTO needs: how far the policy has moved, over all micro-batches of the step."""

        def policy(batch: AnswerBatch) -> Tensor:
            return read_answers(models.trained, batch).sums

        with engine.evaluating():
            moved = (batch.to(engine.device) for batch in batches)
            models.known = self.chosen.reads.known(policy, partial(self._reference, models), moved)

    def loss(self, models: Models, batch: AnswerBatch) -> tuple[Tensor, Metrics]:
        policy = read_answers(models.trained, batch)
        answers = self.chosen.reads.of(batch, policy, self._reference(models, batch), models.known)
        losses = self.chosen.loss(answers, self.strength) - self.rpo_alpha * answers.liked
        return (losses * batch.unit_mask).sum(), self.report(answers, policy.entropy, batch)

    def expected(
        self, load: ModelLoader, models: Models, engine: Engine, micro_batches: Sequence[Any]
    ) -> Iterator[Expectation]:
        """A policy that is its own reference prefers nothing yet: the loss of a margin of 0, ln 2 for sigmoid."""
        yield from super().expected(load, models, engine, micro_batches)
        moved = getattr(load.adapter, "path", None) is not None and self.reference is not Reference.precomputed
        dropped = getattr(load.adapter, "dropout", 0.0) > 0
        compared = self.chosen.referenced and self.reference is not Reference.none and self.chosen.reads is PairAnswers
        if compared and not moved and not dropped and not self.rpo_alpha:
            start = float(self.chosen.loss(PairAnswers(*torch.zeros(8, 1)), self.strength))
            tolerance = TOLERANCE[engine.precision.compute] * max(1.0, start)
            rule = "before the first update the policy is its own reference"
            remedy = "the reference must come from model.path itself, in the same precision and without dropout"
            yield near("loss", start, tolerance, f"{rule}, whose loss is {start:.6f}", remedy)
            yield near("rewards/margin", 0.0, tolerance, f"{rule}, whose margin is 0", remedy)

    def report(self, answers: Answers, entropy: Tensor, batch: AnswerBatch) -> Metrics:
        """Implicit rewards, how often they are on the right side, and the policy's entropy at the answers' tokens."""
        settings: dict[str, Any] = {"beta": self.strength.beta, "referenced": self.chosen.referenced}
        metrics = Metrics()
        for name, (values, weights) in answers.figures(**settings).items():
            metrics.mean(name, (values * weights * batch.unit_mask).sum(), (weights * batch.unit_mask).sum())
        metrics.mean("entropy", entropy.detach().sum(), entropy.new_tensor(float(entropy.numel())))
        metrics.each("rewards/margin", answers.margins(**settings), batch.rows)
        return metrics

    def _reference(self, models: Models, batch: AnswerBatch) -> Tensor:
        """Summed log-probabilities ``(A,)`` under the reference; zeros where there is none."""
        if not self.chosen.referenced or self.reference is Reference.none:
            return torch.zeros_like(batch.reference)
        if self.reference is Reference.precomputed:
            return batch.reference
        model = models.frozen.get("reference", models.trained)
        off: AbstractContextManager[Any] = (
            adapters_off(model) if self.reference is Reference.adapters_off else nullcontext()
        )
        with torch.no_grad(), off:
            return read_answers(model, batch).sums


def _keep(file: Path, values: Tensor, key: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_name(f"{file.name}.tmp-{uuid.uuid4().hex[:8]}")
    save_file({"reference": values}, unfinished, metadata={"made_from": key})
    unfinished.rename(file)


def _kept(file: Path, key: str, count: int) -> Tensor:
    """The values in a file that were computed from just these pairs by just this model."""
    with safe_open(file, framework="pt") as opened:
        values: Tensor = opened.get_tensor("reference")
        if opened.metadata() != {"made_from": key} or values.shape != (count, 2):
            raise ValueError(f"{file} was computed from another model or other pairs; delete it")
    return values


def scored(models: Models, pairs: Pairs, device: torch.device) -> Tensor:
    """Summed log-probabilities ``(n, 2)`` of every unit's answers under the model as it is; shared among the ranks."""
    world, found = distributed.world(), dict[int, list[float]]()
    for numbers in pairs.forwards(world.rank, world.size):
        batch = pairs.collate(numbers).to(device)
        sums = [read_answers(models.trained, part).sums.view(len(numbers), -1) for part in batch.parts]
        found |= zip(numbers, torch.cat(sums, dim=1).float().cpu().tolist(), strict=True)
    whole = {n: values for part in distributed.gather(found) for n, values in part.items()}
    return torch.tensor([whole[n] for n in range(len(pairs))])
