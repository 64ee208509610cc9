"""Completions under a policy and a reference: what preference optimisation is a function of."""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from enum import StrEnum, auto
from functools import cached_property, partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from trainer.config import InputError, setting
from trainer.data.corpus import Corpus
from trainer.data.pairs import AnswerBatch, PairStore
from trainer.data.tokenizer import Tokenizer
from trainer.diagnostics.first_step import FirstStep
from trainer.disk import save_tensors
from trainer.functional import logprobs_at
from trainer.models.adapter import Adapter
from trainer.models.architecture import Architecture
from trainer.models.load import ModelLoader
from trainer.models.lora import adapters_off
from trainer.parallel import distributed
from trainer.parallel.engine import Engine
from trainer.pipelines.base import Models, Pipeline

ADAPTERS_OFF = "pipeline.reference=adapters_off needs adapter=lora or qlora, starting as the model without its adapters"
"""The rule; why an adapter breaks it follows."""
OWN_REFERENCE = "before the first update the policy is its own reference"
REFERENCE_REMEDY = "the reference must be what the policy starts from, in the same precision and without dropout"


@dataclass(frozen=True)
class CompletionLogps:
    """Log-probabilities of completions given their prompts, in nats, each tensor ``(B,)``.

    ``policy``: summed over a completion's tokens, under the policy.
    ``reference``: the same under the reference; 0 where there is none.
    ``tokens``: how many tokens that are; at least 1.
    """

    policy: Tensor
    reference: Tensor
    tokens: Tensor

    @cached_property
    def mean(self) -> Tensor:
        """Mean log-probability of a token under the policy."""
        return self.policy / self.tokens

    @cached_property
    def ratio(self) -> Tensor:
        """Log-ratio of policy and reference, summed over the completion."""
        return self.policy - self.reference

    @cached_property
    def mean_ratio(self) -> Tensor:
        """Mean log-ratio of a token."""
        return self.ratio / self.tokens


def policy_logps(model: Any, batch: AnswerBatch) -> tuple[Tensor, Tensor, Tensor]:
    """Of a micro-batch's A completions under a model: summed log-probabilities and tokens ``(A,)``, entropies ``(N,)``."""
    values, entropy = model(batch.tokens, batch.documents, logprobs_at(batch.logit_index, batch.targets))
    sums = values.new_zeros(len(batch.final_index)).index_add(0, batch.sequence_id, values)
    counts = torch.zeros_like(sums).index_add(0, batch.sequence_id, torch.ones_like(values))
    return sums, counts.detach(), entropy


class ReferenceSource(StrEnum):
    """Where the reference's log-probabilities come from."""

    model = auto()
    precomputed = auto()
    adapters_off = auto()
    none = auto()


@dataclass
class ReferencePipeline(Pipeline):
    """A pipeline that learns from completions and compares the policy with a reference."""

    learning_rate: ClassVar[float] = 1e-6

    reference: ReferenceSource = setting(
        ReferenceSource.model,
        "model: a frozen copy; precomputed: once, before training; adapters_off: the base under adapter=lora or qlora; none",
    )

    @property
    def uses_reference(self) -> bool:
        """Whether the loss compares with a reference at all."""
        return self.reference is not ReferenceSource.none

    def validate_adapter(self, adapter: Adapter, new_tokens: int = 0) -> Iterator[str]:
        reason = adapter.moves_reference(new_tokens)
        if self.reference is ReferenceSource.adapters_off and reason is not None:
            yield f"{ADAPTERS_OFF}; {reason}: use pipeline.reference=model or precomputed"

    def auxiliary_models(self, architecture: Architecture) -> Iterator[tuple[Architecture, bool]]:
        if self.uses_reference and self.reference is ReferenceSource.model:
            yield architecture, False

    def models(self, load: ModelLoader, tokenizer: Tokenizer) -> Models:
        models = super().models(load, tokenizer)
        if self.uses_reference and self.reference is ReferenceSource.model:
            models.frozen["reference"] = load.frozen()
        return models

    def prepare(self, models: Models, engine: Engine, corpus: Corpus, cache: Path) -> None:
        """The reference's log-probabilities of every unit, from the policy before its first step; kept for later runs."""
        if not self.uses_reference or self.reference is not ReferenceSource.precomputed:
            return
        sources: list[Any] = [*getattr(corpus.train, "parts", []), *corpus.heldout.values()]
        for pairs in sources:
            key = f"{models.origin}:{pairs.fingerprint}:{engine.precision.compute}"
            file = cache / "references" / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.safetensors"
            if not distributed.run_on_main(file.is_file):
                with engine.evaluating():
                    values = score_all(models, pairs, engine.device)
                distributed.run_on_main(partial(_write, file, values, key))
            pairs.reference = _read(file, key, len(pairs))

    def reference_logps(self, models: Models, batch: AnswerBatch) -> Tensor:
        """Summed log-probabilities ``(A,)`` under the reference; zeros where there is none."""
        if not self.uses_reference:
            return torch.zeros_like(batch.reference)
        if self.reference is ReferenceSource.precomputed:
            return batch.reference
        model = models.frozen.get("reference", models.trained)
        disabled: AbstractContextManager[Any] = (
            adapters_off(model) if self.reference is ReferenceSource.adapters_off else nullcontext()
        )
        with torch.no_grad(), disabled:
            sums, _, _ = policy_logps(model, batch)
        return sums

    def first_step_problems(self, first: FirstStep) -> list[str]:
        """Also, a policy that is its own reference prefers nothing yet."""
        problems = super().first_step_problems(first)
        if not self.uses_reference or getattr(first.load.adapter, "dropout", 0.0) > 0:
            return problems
        return problems + first.near("rewards/margin", 0.0, f"{OWN_REFERENCE}, whose margin is 0", REFERENCE_REMEDY)


def score_all(models: Models, pairs: PairStore, device: torch.device) -> Tensor:
    """Summed log-probabilities ``(n, 2)`` of every unit's completions under the model as it is; shared among the ranks."""
    data, mine = distributed.world().data, list[tuple[int, list[float]]]()
    for numbers in pairs.forwards(data.rank, data.size):
        batch = pairs.collate(numbers).to(device)
        sums = [policy_logps(models.trained, part)[0].view(len(numbers), -1) for part in batch.parts]
        mine += zip(numbers, torch.cat(sums, dim=1).float().cpu().tolist(), strict=True)
    by_number = dict(unit for part in distributed.gather_over_data(mine) for unit in part)
    return torch.tensor([by_number[n] for n in range(len(pairs))])


def _write(file: Path, values: Tensor, key: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_name(f"{file.name}.tmp-{uuid.uuid4().hex[:8]}")
    save_tensors({"reference": values}, unfinished, metadata={"made_from": key})
    unfinished.rename(file)


def _read(file: Path, key: str, count: int) -> Tensor:
    """The values in a file that were computed from just these units by just this model.

    Raises:
        InputError: if they were not, or the file is damaged.
    """
    try:
        with safe_open(file, framework="pt") as opened:
            made_from, values = opened.metadata(), opened.get_tensor("reference")
    except (OSError, SafetensorError) as error:
        raise InputError(f"{file} cannot be read ({error}); delete it, and it is computed again") from None
    if made_from != {"made_from": key} or values.shape != (count, 2):
        raise InputError(f"{file} was computed from another model or other pairs; delete it, and it is computed again")
    return values  # type: ignore[no-any-return]
