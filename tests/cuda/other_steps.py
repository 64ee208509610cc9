"""On fake CUDA, beside the steps of the pipelines: a decoded token, a step's memory, and steps in shards.

Prints, as JSON, what each asked of the device. Run by `test_other_steps.py`.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.distributed.device_mesh import DeviceMesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from tests.cuda.fake_cuda import CUDA, Asked, fake, pretend
from tests.cuda.steps import BF16, lora, pairs, rows, shape, step
from tests.shapes import architecture
from trainer.batch import Batch, Documents, PackedRows
from trainer.diagnostics.layout import Layout
from trainer.diagnostics.memory import memory
from trainer.generation.decode_graph import FixedDecoder
from trainer.generation.decoding import Decoding
from trainer.generation.sampling import Sampling
from trainer.models.architecture import Architecture
from trainer.models.recompute import Recompute
from trainer.models.transformer import Transformer
from trainer.parallel import distributed
from trainer.parallel.ddp import DDP
from trainer.parallel.fsdp import FSDP
from trainer.parallel.mesh import Mesh, MeshShape
from trainer.parallel.precision import Compute, Precision
from trainer.parallel.strategy import Offload, Strategy
from trainer.parallel.zero import Zero1, Zero2, Zero3
from trainer.pipelines.dpo import DPO
from trainer.pipelines.pretrain import Pretrain
from trainer.pipelines.sft import SFT
from trainer.settings import BatchSizes


class CountedDecoder(FixedDecoder):
    """Counts what a graph of the decode step would hold, and replays nothing."""

    asked: Asked

    def _captured(self, model: nn.Module, span: int) -> Any:
        with Asked() as self.asked:
            self._compute(model, span)
        return lambda _: None


def decoded(**filters: float) -> dict[str, Any]:
    """What the graph of a decode step holds, and what a token asks of the device beside it."""
    asked: dict[int, Asked] = {}
    for tokens in (4, 12):
        sampling = Sampling(tokens, **filters)  # type: ignore[arg-type]
        with fake(), torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
            with CUDA:
                model = Transformer(shape()).eval()
            steps = Decoding(model, [[5, 6], [5, 7]], sampling, stops=(), max_concurrent=2, fixed=True)
            decoder = steps._decoder = CountedDecoder(model, 2, 2 + tokens, sampling)
            decoder.load_weights(model)
            steps.cache = decoder.cache
            with Asked() as asked[tokens]:
                for _ in steps:
                    pass
    # Both have the same prompts and one graph, so they differ by eight tokens.
    beside = {
        what: (getattr(asked[12], what).total() - getattr(asked[4], what).total()) / 8
        for what in ("launches", "stalls")
    }
    return {"graph": decoder.asked.report(), **beside}


def packed_rows(size: int, length: int = 512) -> Batch:
    """Rows of one document each."""
    ids, documents = torch.zeros(size, length, dtype=torch.int64), Documents.from_lengths([length] * size, size)
    real = torch.tensor(float(size * length), dtype=torch.float64)
    return PackedRows(torch.arange(size), ids, documents, real, ids, torch.ones(size, length))


def used(
    recompute: Recompute,
    precision: Precision = BF16,
    strategy: Strategy | None = None,
    *,
    size: int = 32,
    module: Callable[[Architecture], Any] | None = None,
    **features: Any,
) -> dict[str, float]:
    """The most bytes that lived on the device in a step, and the estimate of them.

    ``module``: builds a rank's part of a model; None = all of it.
    """
    strategy = strategy or DDP()
    a = architecture(**{
        "num_hidden_layers": 4, "hidden_size": 512, "intermediate_size": 1536, "num_attention_heads": 8,
        "num_key_value_heads": 4, "head_dim": 64, "vocab_size": 1024, **features,
    })  # fmt: skip

    def build() -> Any:
        return Transformer(a, recompute) if module is None else module(a)

    asked = step(Pretrain(), lambda: packed_rows(size), build, strategy=strategy, precision=precision)
    batch = BatchSizes(size=2 * size * distributed.world().data.size, micro=size, length=512)
    layout = Layout.of(strategy, precision, batch, distributed.world().size, cuda=True, recompute=recompute)
    return {"used": asked["peak_bytes"], "estimate": memory(a, layout).total}


class Exchanged:
    """An exchange with a rank that is not there."""

    def wait(self, *_: Any) -> None:
        pass

    def is_completed(self) -> bool:
        return True


EXCHANGES = (
    "all_gather", "all_gather_into_tensor", "all_gather_single", "all_reduce", "all_to_all_single", "barrier", "broadcast",
    "irecv", "isend", "reduce_scatter_single", "reduce_scatter_tensor", "send",
)  # fmt: skip


def pretend_another_rank() -> None:
    """Make this process the first of two; no tensor comes from the second, which says of itself what this one says."""
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    distributed._world = distributed.World(0, 2, 0, CUDA)
    for name in EXCHANGES:
        setattr(dist, name, lambda *_, **__: Exchanged())
    distributed.gather = lambda value: [value, value]  # type: ignore[assignment]
    made = DeviceMesh.from_group

    def mesh(*args: Any, **kwargs: Any) -> DeviceMesh:
        with unset_fake_temporarily():  # it reads the numbers of its ranks
            return made(*args, **kwargs)

    DeviceMesh.from_group = mesh  # type: ignore[method-assign, assignment]
    lay_out(MeshShape())
    pretend_deepspeed()


def lay_out(shape: MeshShape) -> None:
    """Divide the two ranks. A mesh counts them, so it is made before tensors have no memory."""
    distributed._world = dataclasses.replace(distributed.world(), replica=shape.replica)
    Mesh.of(shape)


@contextmanager
def laid_out(shape: MeshShape) -> Iterator[None]:
    """Let the two ranks be divided for a while."""
    lay_out(shape)
    yield
    lay_out(MeshShape())


def divided(**axes: int) -> dict[str, Any]:
    """A step on two ranks that divide one model."""
    strategy = FSDP(**axes)
    with laid_out(strategy.mesh):
        return step(Pretrain(), rows, strategy=strategy)


def pretend_deepspeed() -> None:
    """Answer what DeepSpeed asks about its device."""
    os.environ["DS_ACCELERATOR"] = "cuda"
    from deepspeed.accelerator.cuda_accelerator import CUDA_Accelerator
    from deepspeed.runtime.zero import partitioned_param_coordinator

    answers = {
        "available_memory": 10**9, "device_count": 2, "is_available": True, "memory_stats": {}, "range_pop": None,
        "range_push": None, "reset_peak_memory_stats": None,
    }  # fmt: skip
    for name, answer in answers.items():
        setattr(CUDA_Accelerator, name, lambda *_, answer=answer, **__: answer)
    # What ranks compare while they learn in which order layers come, before the step that is counted.
    partitioned_param_coordinator.assert_ints_same_as_other_ranks = lambda _: None
    # DeepSpeed asks where its partitions begin.
    FakeTensor.data_ptr = lambda self: 0  # type: ignore[method-assign]


def main() -> None:
    pretend()
    distributed._world = distributed.World(0, 1, 0, CUDA)
    fp16 = Precision(compute=Compute.fp16)
    done: dict[str, Any] = {
        "decoded": {
            "greedy": decoded(temperature=0.0),
            "sampled": decoded(),
            "filtered": decoded(top_k=50, top_p=0.9, min_p=0.05),
        },
        "memory": {
            "none": used(Recompute.none), "selective": used(Recompute.selective), "full": used(Recompute.full),
            "fp16": used(Recompute.none, fp16), "qk_norm": used(Recompute.none, qk_norm="head"),
        },
    }  # fmt: skip
    pretend_another_rank()
    # Before DeepSpeed replaces torch's linear layer.
    done["sharded"] = {
        "fsdp_bf16": step(Pretrain(), rows, strategy=FSDP()),
        "fsdp_fp16": step(Pretrain(), rows, strategy=FSDP(), precision=fp16),
        "fsdp_whole": step(Pretrain(), rows, strategy=FSDP(reshard=False)),
        "fsdp_twin": step(DPO(), pairs, strategy=FSDP()),
        "fsdp_lora": step(SFT(), rows, lora, strategy=FSDP()),
        "fsdp_tensor": divided(tensor=2),
        "fsdp_sequence": divided(sequence=2),
    }
    done["offloaded"] = step(Pretrain(), rows, strategy=FSDP(offload=Offload.parameters))
    # Few rows, so that weights and their gradients are most of what lives there.
    done["memory"] |= {
        "fsdp": used(Recompute.none, strategy=FSDP(), size=2),
        "fsdp_full": used(Recompute.full, strategy=FSDP(), size=2),
        "fsdp_whole": used(Recompute.none, strategy=FSDP(reshard=False), size=2),
        "fsdp_autocast": used(Recompute.none, strategy=FSDP(autocast=True), size=2),
    }
    done["sharded"] |= {
        f"{kind.__name__.lower()}_{precision.compute}": step(Pretrain(), rows, strategy=kind(), precision=precision)
        for kind in (Zero1, Zero2, Zero3) for precision in (BF16, fp16)
    }  # fmt: skip
    print(json.dumps(done), flush=True)
    # The device's thread of autograd never ends.
    os._exit(0)


if __name__ == "__main__":
    main()
