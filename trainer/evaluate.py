"""The same loss on held-out data, per source, its largest errors, and a few generations."""

from __future__ import annotations

import logging
import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor

from trainer.config import Node, schema, setting
from trainer.data.corpus import Corpus, Prompt
from trainer.data.store import UnitStore
from trainer.generation.completion import Response
from trainer.generation.generate import generate
from trainer.generation.sampling import Sampling
from trainer.metrics import Metrics
from trainer.models.load import ModelLoader
from trainer.models.packed import on_original
from trainer.parallel import distributed
from trainer.parallel.engine import Engine
from trainer.pipelines.base import Models, Pipeline

log = logging.getLogger(__name__)

MAX_CONCURRENT = 32
"""Prompts that are answered at once."""


@dataclass(frozen=True)
class HeldOutMetrics:
    """What held-out data showed.

    ``values``: by metric, scalars on the device.
    ``units``: by metric, its value of every unit.
    ``errors``: the units with the worst values, as texts.
    """

    values: dict[str, Tensor]
    units: dict[str, list[float]]
    errors: list[dict[str, Any]]


class ScoredResponse(NamedTuple):
    """A held-out prompt's completion.

    ``response``: the prompt and its completion.
    ``ended``: whether the completion came to an end by itself.
    ``scores``: by name; None where a reward has none.
    """

    response: Response
    ended: bool
    scores: dict[str, float | None]


@schema("evaluation")
@dataclass
class Evaluation(Node):
    """When to measure held-out data, and how much of it."""

    every: int = setting(0, "steps between evaluations; 0 = after the last step only", least=0)
    first: bool = setting(False, "also before the first step: what the run starts from")
    rows: int | None = setting(None, "rows of each held-out source; null = all", least=1)
    micro: int | None = setting(None, "rows a forward on a rank; null = batch.micro", least=1)
    errors: int = setting(4, "units with the largest errors that are shown of each source, for preferences", least=0)
    samples: int = setting(4, "texts shown of each evaluation; 0 = none", least=0)
    answers: int = setting(
        0, "held-out prompts that are answered and judged at each evaluation, for data that has some", least=0
    )
    sample_tokens: int = setting(64, "longest generation, tokens", least=1)
    temperature: float = setting(1.0, "of the generations; 0 = greedy", least=0)
    prompts: list[str] = setting(list, "texts to continue; empty = from nothing but the beginning-of-document token")

    def due(self, step: int, last: int) -> bool:
        """Whether to evaluate after ``step``."""
        return step == last or (self.every > 0 and step % self.every == 0)

    def measure(
        self, pipeline: Pipeline, models: Models, engine: Engine, heldout: Mapping[str, UnitStore], micro: int
    ) -> HeldOutMetrics:
        """``eval/<metric>`` over all sources, and ``eval/<source>/<metric>`` where there are several.

        Every rank runs the same number of forwards, the last ones on rows of weight 0: a ZeRO-3 forward is collective.
        """
        overall, values, units, errors = Metrics(), {}, dict[str, list[float]](), list[dict[str, Any]]()
        with engine.evaluating():
            for name, rows in heldout.items():
                metrics = Metrics()
                batches = pipeline.prepare_step(models, engine, self._batches(rows, self.micro or micro))
                for measured in engine.map_batches(partial(pipeline.evaluate, models), batches):
                    metrics.merge(measured)
                overall.merge(metrics)
                if len(heldout) > 1:
                    values.update({f"eval/{name}/{key}": v for key, v in _counted(metrics).items()})
                for key, by_unit in _per_unit(metrics).items():
                    units.setdefault(f"eval/{key}", []).extend(by_unit.values())
                    for number in sorted(by_unit, key=lambda n: by_unit[n])[: self.errors]:
                        texts = rows.preview(number, models.tokenizer)
                        errors.append({"source": name, "row": number, key: by_unit[number], **texts})
        values.update({f"eval/{key}": v for key, v in _counted(overall).items()})
        return HeldOutMetrics(values, units, errors)

    def measure_on_original(
        self, pipeline: Pipeline, models: Models, engine: Engine, corpus: Corpus, load: ModelLoader, micro: int
    ) -> dict[str, float]:
        """``eval/loss_on_original``: with the weights that the packed ones were made of, as `MergeBase` would merge.

        Nothing where none are packed, where the folder has packed ones alone, or where memory lacks; collective.
        """
        if not load.packed or (load.files is not None and load.files.files.quantized) or not corpus.heldout:
            return {}
        with on_original(engine.module, load.start, engine.precision.dtype) as lack:
            if lack is not None:
                log.warning("the held-out loss of a merge onto the original weights is not measured: %s", lack)
                return {}
            values = replace(self, errors=0).measure(pipeline, models, engine, corpus.heldout, micro).values
        if "eval/loss" not in values:
            return {}
        loss, onto = float(values["eval/loss"]), "original" if load.adapter.merges_onto_original else "trained"
        if distributed.world().is_main:
            log.info(
                "held-out loss with the adapters on the original weights: %.4g; eval/loss is on those that they were trained "
                "beside, and export/ is merged onto the %s ones (adapter.merge_onto)", loss, onto,
            )  # fmt: skip
        return {"eval/loss_on_original": loss}

    def answer(
        self, pipeline: Pipeline, models: Models, engine: Engine, corpus: Corpus, step: int, seed: int
    ) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """Metrics of the held-out prompts' completions, and rows for ``samples.jsonl``; every rank writes its share.

        Without held-out prompts, ``prompts`` are continued and nothing is measured.
        """
        prompts = corpus.prompts(self.answers)
        if not prompts:
            return {}, self._continuations(models, engine, step, seed)
        answers = self._complete(pipeline, models, engine, prompts, seed)
        values = {
            "eval/ended": statistics.fmean(answer.ended for answer in answers),
            "eval/length": statistics.fmean(len(answer.response.ids) for answer in answers),
        }
        if checkable := [r for r, _, _ in answers if r.prompt.ideal]:
            values["eval/exact_match"] = statistics.fmean(r.prompt.right(r.text) for r in checkable)
        for name in sorted({name for _, _, scores in answers for name in scores}):
            if known := [value for _, _, scores in answers if (value := scores[name]) is not None]:
                values[f"eval/{name}"] = statistics.fmean(known)
        samples = [
            {"step": step, "prompt": r.prompt.text, "completion": r.text, "ended": ended, **scores}
            | ({"ideal": r.prompt.ideal} if r.prompt.ideal else {})
            for r, ended, scores in answers[: self.samples]
        ]
        return values, samples

    def _continuations(self, models: Models, engine: Engine, step: int, seed: int) -> list[dict[str, Any]]:
        if not self.samples:
            return []
        tokenizer = models.tokenizer
        start = [tokenizer.bos if tokenizer.bos is not None and tokenizer.adds_bos else tokenizer.eos]
        texts = (self.prompts or [""])[: self.samples]
        prompts = [Prompt(start + tokenizer.encode(t), t) for t in (texts[i % len(texts)] for i in range(self.samples))]
        answers = self._complete(Pipeline(), models, engine, prompts, seed)
        return [{"step": step, "prompt": r.prompt.text, "completion": r.text} for r, _, _ in answers]

    def _complete(
        self, pipeline: Pipeline, models: Models, engine: Engine, prompts: list[Prompt], seed: int
    ) -> list[ScoredResponse]:
        """Each prompt's completion, judged by the pipeline; shared among the ranks."""
        tokenizer = models.tokenizer
        # In order of length, so that every rank has short and long ones.
        by_length = sorted(range(len(prompts)), key=lambda n: len(prompts[n].ids))
        mine = distributed.world().data.share(by_length)
        sampling = Sampling(self.sample_tokens, self.temperature)
        with engine.evaluating():
            with engine.gathered() as module:
                completions = generate(
                    module, [prompts[n].ids for n in mine], sampling, stops=tokenizer.stops,
                    keys=[(seed, n) for n in mine], max_concurrent=MAX_CONCURRENT,
                )  # fmt: skip
            answers = [
                Response(prompts[n], c.ids, tokenizer.decode(c.ids), n) for n, c in zip(mine, completions, strict=True)
            ]
            scores = pipeline.judge(models, answers)
        own: list[list[Any]] = [
            [a.number, a.ids, a.text, completion.ended, {name: values[at] for name, values in scores.items()}]
            for at, (a, completion) in enumerate(zip(answers, completions, strict=True))
        ]
        every = sorted(item for part in distributed.gather_over_data(own) for item in part)
        return [ScoredResponse(Response(prompts[n], ids, text, n), ended, by) for n, ids, text, ended, by in every]

    def _batches(self, rows: UnitStore, micro: int) -> Iterator[Any]:
        data = distributed.world().data
        count = min(len(rows), self.rows or len(rows))
        for first in range(0, count, micro * data.size):
            yield rows.collate([n if n < count else -1 for n in data.block(first, micro)])


def _counted(metrics: Metrics) -> dict[str, Tensor]:
    """Values of what there was: rows without a chosen answer have no mean of chosen answers, not one of 0."""
    return metrics.reduced(distributed.stack_over_data, drop_empty=True)


def _per_unit(metrics: Metrics) -> dict[str, dict[int, float]]:
    """By metric every unit's value by its number, from all ranks; those that only filled up a forward are left out."""
    mine = {
        name: [(n, v) for rows, values in parts for n, v in zip(rows.tolist(), values.tolist(), strict=True) if n >= 0]
        for name, parts in metrics.units.items()
    }
    ranks = distributed.gather_over_data(mine)
    return {name: {n: v for rank in ranks for n, v in rank[name]} for name in mine}
