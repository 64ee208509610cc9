"""What every pipeline is: which models, which batches, which loss."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol

from torch import Tensor, nn

from trainer.batch import Batch, PackedRows
from trainer.config import Node
from trainer.data.corpus import Corpus
from trainer.data.tokenizer import Tokenizer
from trainer.diagnostics.first_step import FirstStep
from trainer.generation.completion import Response
from trainer.metrics import Metrics
from trainer.models.adapter import Adapter
from trainer.models.architecture import Architecture
from trainer.models.balance import Balancer
from trainer.models.linear import FakeQuantizer
from trainer.models.load import ModelLoader
from trainer.models.packed import PackedBase
from trainer.parallel import distributed
from trainer.parallel.engine import Engine
from trainer.parallel.mesh import MeshShape, lacks
from trainer.settings import BatchSizes
from trainer.tracking.throughput import Stopwatch


class Source(Protocol):
    """Endless micro-batches of this rank, with a state of a few integers that counts what was consumed."""

    def __iter__(self) -> Iterator[Batch]: ...
    def __next__(self) -> Batch: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...
    def observe(self, metrics: Mapping[str, Tensor]) -> None:
        """What became of the step that was taken last."""
        ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class Plan:
    """How much is learnt from at once: ``size`` units over all ranks, ``micro`` in a forward of one, of ``length`` tokens."""

    size: int
    micro: int
    length: int
    seed: int
    watch: Stopwatch


@dataclass
class Models:
    """The models of a run: the one that is trained (wrapped by the engine once it exists), and frozen ones by name.

    ``origin``: fingerprint of what the trained one started from.
    ``balancer``: keeps the trained one's experts busy alike; None where it has none.
    ``fake_quantizer``: rounds the weights of the trained one in its forward; None where nothing does.
    """

    trained: nn.Module
    tokenizer: Tokenizer
    origin: str = ""
    frozen: dict[str, nn.Module] = field(default_factory=dict)
    balancer: Balancer | None = None
    fake_quantizer: FakeQuantizer | None = None

    @property
    def parts(self) -> dict[str, Balancer | PackedBase]:
        """Parts of the run whose state is in its checkpoints, by name; collective.

        Raises:
            RunError: if ranks pack frozen weights differently.
        """
        parts: dict[str, Balancer | PackedBase] = {} if self.balancer is None else {"routing": self.balancer}
        base = PackedBase.of(self.trained)
        return {**parts, "base": base} if base.digests else parts


@dataclass
class Pipeline(Node):
    """The contract of every pipeline; its fields are its hyper-parameters."""

    learning_rate: ClassVar[float]
    """What ``optimizer.lr=null`` means here."""
    scores: ClassVar[bool] = False
    """Whether the trained model scores sequences instead of predicting tokens."""
    batch_type: ClassVar[type[Batch]] = PackedRows
    """The micro-batches that it needs from the data."""
    one_forward: ClassVar[bool] = False
    """Whether a step and an evaluation call the trained model once a batch, and use nothing of it but what a reader gives."""
    next_command: ClassVar[str] = "onecurve chat {export}"
    """What to do first with the model that it exports."""

    @property
    def initial_loss(self) -> float | None:
        """The loss of a model that has learnt nothing yet, where the algorithm knows it."""
        return None

    def validate_adapter(self, adapter: Adapter, new_tokens: int = 0) -> Iterator[str]:
        """Yield one sentence for everything about ``adapter`` that does not work here.

        ``new_tokens``: tokens that the model's folder lacks, as far as that is known already.
        """
        yield from ()

    def validate_batch(self, batch: Any, replicas: int) -> Iterator[str]:
        """Yield one sentence for everything about ``batch`` (size, micro, length) that does not work on so many replicas."""
        yield from ()

    def validate_mesh(self, shape: MeshShape) -> Iterator[str]:
        """Yield one sentence for every axis of a mesh that ranks cannot be laid out on here."""
        if shape.pipeline > 1 and not self.one_forward:
            yield (
                f"strategy.pipeline={shape.pipeline} passes a micro-batch through the model once, and this pipeline calls it "
                "more often or samples from it; use strategy.tensor or strategy.sequence"
            )

    def validate_layout(self, batch: BatchSizes, shape: MeshShape, ranks: int) -> Iterator[str]:
        """Yield one sentence for everything about so many ranks, laid out in a shape, that does not work here."""
        yield from self.validate_mesh(shape)
        if lack := lacks(shape, ranks):
            yield lack
            return
        replicas = ranks // shape.replica
        yield from batch.validate_replicas(replicas, "rank" if shape.replica == 1 else "replica")
        yield from batch.validate_stages(replicas, shape.pipeline)
        yield from self.validate_batch(batch, replicas)

    def validate_tokenizer(self, tokenizer: Tokenizer) -> Iterator[str]:
        """Yield one sentence for everything about ``tokenizer`` that does not work here."""
        yield from ()

    def data_length(self, length: int) -> int:
        """The most tokens of the data in a row of ``length`` tokens."""
        return length

    def steps(self, units: int, epochs: float, size: int) -> float:
        """Optimizer steps of ``epochs`` passes over so many units, ``size`` a step."""
        return units * epochs / size

    def auxiliary_models(self, architecture: Architecture) -> Iterator[tuple[Architecture, bool]]:
        """The shape of each model beside a policy of this shape, and whether it is trained too: what takes memory."""
        yield from ()

    def models(self, load: ModelLoader, tokenizer: Tokenizer) -> Models:
        """Build the trained model and the frozen ones."""
        return Models(load.load(), tokenizer, load.fingerprint(), fake_quantizer=load.fake_quantizer)

    def prepare(self, models: Models, engine: Engine, corpus: Corpus, cache: Path) -> None:
        """What is computed once with the models as they start; ``cache``: a folder for it. Collective."""

    def finalize(self, models: Models, engine: Engine, corpus: Corpus) -> dict[str, Any]:
        """What is computed once after the last step and kept with the export (``onecurve.json``). Collective."""
        return {}

    def batches(self, models: Models, engine: Engine, corpus: Corpus, plan: Plan) -> Source:
        """The micro-batches that `loss` understands, of this rank."""
        data = distributed.world().data
        source: Source = corpus.train.loader(micro=plan.micro, seed=plan.seed, rank=data.rank, ranks=data.size)
        return source

    def exports(self, name: str) -> bool:
        """Whether a tensor of the trained module belongs to the model that is exported."""
        return True

    def judge(self, models: Models, answers: Sequence[Response]) -> dict[str, list[float | None]]:
        """Scores by name of answers to held-out prompts, of this rank; collective."""
        return {}

    def prepare_step(self, models: Models, engine: Engine, micro_batches: Iterable[Any]) -> Iterable[Any]:
        """What `loss` gets in place of a step's micro-batches: the same, with what all of them decide. Collective."""
        return micro_batches

    def first_step_problems(self, first: FirstStep) -> list[str]:
        """One sentence for everything in the first step of a fresh run that contradicts the algorithm. Collective.

        What is only unusual is logged.
        """
        remedy = "look for rows with broken values, or begin with precision=fp32 and a lower optimizer.lr"
        problems = first.unless(math.isfinite(first.values["loss"]), "loss", "a loss is a number", remedy)
        if first.learnt_nothing:
            problems.append(
                "the first step learns from nothing, since all its loss weights are 0: onecurve preview with the same "
                "overrides shows what is learnt of each row; see data.train_on, data.truncation and batch.length"
            )
        elif first.values["grad_norm"] == 0:
            problems += self.flat_step_problems(first)
        return problems

    def flat_step_problems(self, first: FirstStep) -> list[str]:
        """One sentence for what makes a first step whose gradient is exactly 0 an error."""
        remedy = (
            "no trained weight has an influence on the loss; look at adapter, pipeline and the rows (onecurve preview)"
        )
        return [f"the first step's grad_norm is exactly 0, so nothing is learnt: {remedy}"]

    def loss(self, models: Models, batch: Any) -> tuple[Tensor, Metrics]:
        """The sum of the objective over a micro-batch (``batch.weight`` units), connected to the graph; and statistics."""
        raise NotImplementedError(f"{type(self).__name__} has no loss")

    def evaluate(self, models: Models, batch: Any) -> Metrics:
        """What held-out data is measured by: ``loss`` and whatever else tells how good the model is."""
        loss, metrics = self.loss(models, batch)
        metrics.mean("loss", loss, batch.weight)
        return metrics
