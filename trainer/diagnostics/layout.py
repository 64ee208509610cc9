"""How a model is spread over ranks, and what each of them then has of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from trainer.models.architecture import Architecture
from trainer.models.recompute import Recompute
from trainer.models.sizes import weights_of
from trainer.models.transformer import narrow_stream
from trainer.parallel.precision import Compute, Precision
from trainer.parallel.strategy import Strategy
from trainer.settings import BatchSizes


@dataclass(frozen=True)
class Layout:
    """How a model is spread and computed.

    Args:
        stage: What is sharded: 0 (DDP: nothing) to 3 (parameters too).
        ranks: All ranks, one a device.
        low_precision_weights: The working copy of the weights is bfloat16 instead of float32 under autocast.
        compute: Bytes of an activation, 2 or 4.
        wide_loss: The loss computes in float32 though activations are of 2 bytes: float16, whose range is too small for it.
        stream: Bytes of an element of the residual stream, 2 or 4.
        micro: Rows of a forward.
        length: Tokens of a row.
        recompute: Activations that the backward computes again.
        offload: What lives in CPU memory: none, optimizer or parameters.
        cuda: Whether the ranks compute on GPUs.
        adapters: Elements that are trained beside a frozen model; 0 = the model itself is trained.
        packed: Elements of that model that are held in NF4, and of the largest matrix of them.
        float_rows: The sharded weights are float32 rows, which the optimizer steps and gathered weights are cast from.
        reshard: Gathered weights and gradients are given back block by block, with every micro-batch.
        auxiliary: Shapes of further models (a reference, a critic, a reward model), and whether each is trained.
        moment: Bytes of a moment of an element of hidden matrices and adapters; 4 of every other one.
        tensor: Ranks that divide matrices.
        sequence: Ranks that divide the tokens of a row.
        expert: Ranks that divide experts, among those that have rows of the same weights.
        pipeline: Ranks that divide layers.
        micro_batches: Forwards of a step, by which a pipeline's first rank is ahead of its last.
    """

    stage: int
    ranks: int
    low_precision_weights: bool
    compute: int
    micro: int
    length: int
    recompute: Recompute = Recompute.none
    offload: str = "none"
    cuda: bool = True
    stream: int = 4
    adapters: int = 0
    packed: tuple[int, int] = (0, 0)
    wide_loss: bool = False
    float_rows: bool = False
    reshard: bool = True
    auxiliary: tuple[tuple[Architecture, bool], ...] = ()
    moment: float = 4.0
    tensor: int = 1
    sequence: int = 1
    expert: int = 1
    pipeline: int = 1
    micro_batches: int = 1

    @classmethod
    def of(
        cls, strategy: Strategy, precision: Precision, batch: BatchSizes, ranks: int, *, cuda: bool, **further: Any
    ) -> Layout:
        """That of a run on so many ranks; ``further``: what else is to be set."""
        shape = strategy.mesh
        micro_batches = max(1, batch.size * shape.replica // (batch.micro * ranks))
        return cls(
            stage=strategy.stage, ranks=ranks, cuda=cuda, float_rows=strategy.float_rows,
            low_precision_weights=strategy.low_precision_weights(precision, cuda=cuda),
            stream=2 if narrow_stream("cuda" if cuda else "cpu", precision.dtype) else 4,
            compute=precision.dtype.itemsize, micro=batch.micro, length=batch.length,
            wide_loss=precision.compute is Compute.fp16,
            offload=getattr(strategy, "offload", "none"), reshard=getattr(strategy, "reshard", True),
            micro_batches=micro_batches, **dataclasses.asdict(shape), **further,
        )  # fmt: skip

    @property
    def data(self) -> int:
        """Replicas, which read different data."""
        return self.ranks // (self.tensor * self.sequence * self.pipeline)

    @property
    def shards(self) -> int:
        """Ranks that have rows of the same weights: data x sequence."""
        return self.data * self.sequence

    @property
    def tokens(self) -> float:
        """Tokens of a forward that a rank's blocks compute."""
        return self.micro * self.length / self.sequence

    @property
    def working(self) -> int:
        """Bytes of a weight that is computed with."""
        return 2 if self.low_precision_weights else 4

    @property
    def table(self) -> int:
        """Bytes of an element of the vocabulary projection; beside weights in NF4 it is held in the compute format."""
        return self.compute if self.packed[0] and self.stage < 3 else self.working

    @property
    def logit(self) -> int:
        """Bytes of a logit's gradient."""
        return 4 if self.wide_loss else self.compute

    @property
    def in_flight(self) -> int:
        """Micro-batches whose activations the first rank of a pipeline keeps (1F1B; Narayanan et al. 2019, PipeDream)."""
        return min(self.pipeline, self.micro_batches)

    def query_width(self, a: Architecture) -> float:
        """Width of the queries of a token on a rank, or of what attention gives."""
        return a.num_attention_heads * a.head_dim / self.tensor

    def key_width(self, a: Architecture) -> float:
        """Width of the keys of a token on a rank. A rank has one head of them at least, before and behind the exchange."""
        heads = max(1.0, a.num_key_value_heads / self.tensor)
        return max(heads, self.sequence if self.sequence > 1 else 1) * a.head_dim


@dataclass(frozen=True)
class Portion:
    """What of a model the ranks have together that divide its rows: a stage's layers, of every matrix a block.

    Attributes:
        dense: elements of its layers, experts aside.
        experts: elements of experts of its layers, of all ranks of the expert axis.
        tables: elements of embedding and projection.
        layers: how many.
        first: whether tokens enter here.
        last: whether the loss is computed here.
    """

    dense: float
    experts: float
    tables: float
    layers: int
    first: bool = True
    last: bool = True

    @property
    def elements(self) -> float:
        """All of them."""
        return self.dense + self.experts + self.tables

    def block(self, layout: Layout) -> float:
        """Elements of a layer that a rank gathers: of experts its own."""
        return (self.dense + self.experts / layout.expert) / self.layers


def portions(a: Architecture, layout: Layout) -> Iterator[Portion]:
    """The portions of a model that may need most: all of it, or the first and the last stage of a pipeline.

    What divides a stage's layers unevenly gives some one more. A tied table is on both.
    """
    weights, count = weights_of(a), a.num_hidden_layers
    layers = -(-count // layout.pipeline)
    shared = min(layout.tensor, a.num_key_value_heads)
    dense = (weights.matrices / layout.tensor + weights.keys / shared + weights.rest) / count
    experts = weights.experts / layout.tensor / count
    tables = weights.tables / layout.tensor
    if layout.pipeline == 1:
        yield Portion(dense * layers, experts * layers, tables, layers)
        return
    table = a.vocab_size * a.hidden_size / layout.tensor
    yield Portion(dense * layers, experts * layers, table, layers, last=False)
    yield Portion(dense * layers, experts * layers, table, layers, first=False)
