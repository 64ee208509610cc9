"""On fake CUDA, along the axes of a mesh: a step's memory beside the estimate, and what experts and stages ask of a device.

Prints all of it as JSON. Run by `test_mesh_steps.py`.
"""

from __future__ import annotations

import json
import os
from typing import Any

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from tests.cuda import fake_cuda
from tests.cuda.fake_cuda import CUDA, pretend
from tests.cuda.other_steps import laid_out, pretend_another_rank, used
from tests.cuda.steps import BF16, LENGTH, rows, shape, step
from tests.shapes import architecture
from trainer.models.architecture import Architecture
from trainer.models.recompute import Recompute
from trainer.models.stage import keep_stage
from trainer.models.transformer import Transformer
from trainer.parallel import distributed
from trainer.parallel.fsdp import FSDP
from trainer.parallel.mesh import Axis, Mesh
from trainer.parallel.precision import Compute, Precision
from trainer.parallel.stages import STREAMS, StageLinks
from trainer.parallel.zero import Zero2, Zero3
from trainer.pipelines.pretrain import Pretrain

FP16 = Precision(compute=Compute.fp16)
LARGE: dict[str, Any] = {"vocab_size": 32768, "num_hidden_layers": 2, "size": 2}
"""Few tokens of a large vocabulary, whose tables are most of a small model."""
MANY = {"num_hidden_layers": 2, "size": 8}
"""Enough tokens for activations to be most."""
MODEL: dict[str, Any] = {
    "num_hidden_layers": 4, "hidden_size": 512, "intermediate_size": 1536, "num_attention_heads": 8,
    "num_key_value_heads": 4, "head_dim": 64, "vocab_size": 1024, "tie_word_embeddings": False,
}  # fmt: skip
SPARSE: dict[str, Any] = {
    "family": "qwen3_moe", "experts": 8, "experts_per_token": 2, "expert_size": 256, "tie_word_embeddings": False,
}  # fmt: skip


def along(recompute: Recompute, tensor: int = 1, sequence: int = 1, expert: int = 1, **how: Any) -> dict[str, float]:
    """The memory of the first of two ranks that divide a model, and the estimate."""
    strategy = FSDP(tensor=tensor, sequence=sequence, expert=expert)
    with laid_out(strategy.mesh):
        return used(recompute, strategy=strategy, **how)


class Stages:
    """One stage of two in this process, of which the other is not there; the last one goes first.

    What it gives of a micro-batch is what the first one then gets.
    """

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.parameters: list[Any] = []
        self.groups = distributed.group_of
        distributed.gather = self.gather  # type: ignore[assignment]
        distributed.group_of = self.group_of  # type: ignore[assignment]
        StageLinks._text = self.text  # type: ignore[method-assign, assignment]
        dist.recv = lambda number, **_: number.fill_(STREAMS.index(torch.bfloat16))  # type: ignore[assignment]

    def gather(self, value: Any) -> list[Any]:
        """Digests of stages that are in order, or the parameters of both."""
        return [[0, ""], [1, ""]] if isinstance(value[1], str) else self.parameters

    def group_of(self, members: Any, *, on_host: bool = False) -> Any:
        return dist.group.WORLD if on_host or len(members) == 2 else self.groups(members)

    def text(self, text: str) -> str:
        if text:
            self.texts.append(text)
        return text or self.texts.pop(0)

    def place(self, rank: int, a: Architecture) -> None:
        """Be the stage of a number from now on."""
        dist.destroy_process_group()
        dist.init_process_group("fake", rank=rank, world_size=2, store=FakeStore())
        distributed._world = distributed.World(rank, 2, 0, CUDA)
        self.parameters = []
        for stage in range(2):
            with torch.device("meta"):
                model = Transformer(a)
            keep_stage(model, Axis(stage, 2))
            own = [[n, list(p.shape), str(p.dtype), True] for n, p in model.named_parameters()]
            self.parameters.append([own, []])  # and its buffers


def built(a: Architecture, recompute: Recompute = Recompute.none) -> Transformer:
    """This rank's stage."""
    model = Transformer(a, recompute)
    keep_stage(model, Mesh.of(FSDP(pipeline=2).mesh).pipeline)
    return model


def staged() -> dict[str, Any]:
    """The last and the first of two stages: what a step asks of the device, and its memory beside the estimate.

    The estimate is of the stage that needs more.
    """
    stages, strategy = Stages(), FSDP(pipeline=2)
    counts: dict[str, Any] = {}
    for rank, name in ((1, "last"), (0, "first")):
        stages.place(rank, shape())
        with laid_out(strategy.mesh):
            counts[name] = step(Pretrain(), rows, lambda: built(shape()), strategy=strategy)
    memory: dict[str, Any] = {}
    a = architecture(**MODEL)
    for rank, name in ((1, "last"), (0, "first")):
        stages.place(rank, a)
        with laid_out(strategy.mesh):
            memory[name] = used(
                Recompute.full, strategy=strategy, size=4, module=lambda a: built(a, Recompute.full),
                tie_word_embeddings=False,
            )  # fmt: skip
    return {"asked": counts, "memory": memory}


def main() -> None:
    pretend()
    distributed._world = distributed.World(0, 1, 0, CUDA)
    of_memory = {"large ddp fp16": used(Recompute.none, FP16, **LARGE)}
    pretend_another_rank()
    of_memory |= {
        "large fsdp": used(Recompute.none, strategy=FSDP(), **LARGE),
        "large fsdp fp16": used(Recompute.none, FP16, strategy=FSDP(), **LARGE),
        "tensor": along(Recompute.none, **MANY, tensor=2),
        "tensor full": along(Recompute.full, **MANY, tensor=2),
        "sequence": along(Recompute.full, **MANY, sequence=2),
    }
    # Half of the choices go to each of two ranks.
    fake_cuda.answers.append(MANY["size"] * 512)
    of_memory["expert"] = along(Recompute.none, **MANY, **SPARSE, expert=2)
    fake_cuda.answers.pop()
    asked: dict[str, Any] = {}
    mixture = architecture(
        num_hidden_layers=2, hidden_size=64, intermediate_size=128, num_attention_heads=4, num_key_value_heads=2,
        head_dim=16, vocab_size=512, **{**SPARSE, "expert_size": 32},
    )  # fmt: skip
    fake_cuda.answers.append(2 * LENGTH)  # half of the choices of two rows
    for axis in ("expert", "tensor"):
        strategy = FSDP(**{axis: 2})
        with laid_out(strategy.mesh):
            asked[f"experts by {axis}"] = step(Pretrain(), rows, lambda: Transformer(mixture), strategy=strategy)
    fake_cuda.answers.pop()
    for kind in (Zero2, Zero3):
        of_memory[f"large {kind.__name__.lower()}"] = used(Recompute.none, BF16, strategy=kind(), **LARGE)
    of_stages = staged()
    done = {
        "memory": of_memory,
        "asked": asked,
        "stages": of_stages["asked"],
        "stages' memory": of_stages["memory"],
    }
    print(json.dumps(done), flush=True)
    # The device's thread of autograd never ends.
    os._exit(0)


if __name__ == "__main__":
    main()
