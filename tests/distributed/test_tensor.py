"""Matrices divided among the ranks of a replica: the same curve, bitwise equal replicas, the same checkpoint."""

import hashlib
import os
import zlib
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.ranks import free_port, on_ranks
from tests.uneven_rows import uneven_rows
from trainer.checkpoint import Checkpointer, Checkpoints
from trainer.diagnostics.guard import Guard, GuardSettings
from trainer.loop import train_step
from trainer.models.adapter import Adapter, Full
from trainer.models.architecture import Architecture, Layer, Rope
from trainer.models.load import Model, ModelLoader
from trainer.models.lora import LoRA
from trainer.models.recompute import Recompute
from trainer.optim import AdamW, Muon
from trainer.parallel import distributed, sharding
from trainer.parallel.ddp import DDP
from trainer.parallel.fsdp import FSDP
from trainer.parallel.precision import Precision
from trainer.pipelines.base import Models
from trainer.pipelines.pretrain import Pretrain
from trainer.tracking.throughput import Stopwatch

ROWS, LENGTH, STEPS, STAGES = 8, 32, 20, 2
SHAPE: dict[str, Any] = {
    "vocab_size": 101, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 8, "num_key_value_heads": 4,
    "head_dim": 8, "max_position_embeddings": 64, "layers": (Layer(rope=Rope(10000.0)),) * 2, "initializer_range": 0.1,
}  # fmt: skip
CASES: dict[str, tuple[dict[str, Any], Adapter]] = {
    # 101 tokens divide by nothing; fewer key heads than ranks, whose weights all of them have.
    "tied, norms of heads, shared keys": (
        {"tie_word_embeddings": True, "qk_norm": "head", "num_key_value_heads": 1, "attention_bias": True}, Full()
    ),
    "norms over the width": ({"qk_norm": "width", "sinks": True, "attention_gate": True}, Full()),
    "layer norms of each head": (
        {"layer_norm": True, "norm_bias": True, "qk_norm": "heads", "gated": False, "activation": "relu2", "parallel": True,
         "attention_bias": True, "attention_output_bias": True, "mlp_bias": True}, Full()
    ),
    "experts": (
        {"layers": (Layer(rope=Rope(10000.0), sparse=True), Layer(rope=Rope(10000.0))), "experts": 4, "experts_per_token": 2,
         "expert_size": 16, "expert_bias": True, "shared_size": 16, "shared_gate": True}, Full()
    ),
    "adapters": (
        {"attention_bias": True, "attention_output_bias": True, "num_key_value_heads": 2},
        LoRA(rank=4, dropout=0.2, full=["lm_head", "embed_tokens"]),
    ),
}  # fmt: skip


rows_of = partial(uneven_rows, length=LENGTH, less=3, first=[20, 13])


class Loader(ModelLoader):
    """Of an architecture that no folder has."""

    architecture: Architecture  # type: ignore[assignment]


def loader(case: str, strategy: Any, recompute: Recompute = Recompute.none) -> Loader:
    features, adapter = CASES[case]
    load = Loader(Model(activation_checkpointing=recompute), strategy, 0, 101, adapter)
    load.architecture = Architecture(**{**SHAPE, **features})
    return load


def curve(case: str, strategy: Any, recompute: str = "none") -> tuple[list[list[float]], str]:
    """Loss and gradient norm of every step, and a digest of what tensor ranks must hold alike after the last."""
    load = loader(case, strategy, Recompute(recompute))
    engine = strategy.wrap(load.load(), AdamW(lr=3e-3, clip=1.0), Precision())
    models = Models(engine.model, None)  # type: ignore[arg-type]
    guard, watch, data = Guard(GuardSettings(), engine.device), Stopwatch(engine.device), distributed.world().data
    values = []
    for step in range(STEPS):
        mine = data.share(list(range(ROWS)))
        half = len(mine) // 2
        parts = [rows_of(step, mine[n : n + half]) for n in (0, half)]
        metrics = train_step(Pretrain(), models, engine, guard, watch, parts, (0, step))
        values.append([float(metrics["loss"]), float(metrics["grad_norm"])])
    alike = [
        p for n, p in engine.module.named_parameters() if isinstance(strategy, FSDP) and not sharding.cut_of(p).along
    ]
    digest = hashlib.sha256(b"".join(sharding.local(p).numpy().tobytes() for p in alike)).hexdigest()
    return values, digest


ORTHOGONALISED = [(case, "tensor") for case in ("tied, norms of heads, shared keys", "experts", "adapters")]
ORTHOGONALISED += [("layer norms of each head", "pipeline")]
"""Cases that take steps of Muon, and what divides them."""


def stepped(case: str, strategy: Any, folder: str) -> dict[str, np.ndarray]:
    """The weights two steps of Muon behind the folder's checkpoint, with gradients of their own; it then is theirs."""
    engine = strategy.wrap(loader(case, strategy).load(), Muon(lr=0.02, adamw_lr=0.01), Precision())
    checkpointer = Checkpointer(Checkpoints(), Path(folder), engine, {}, {"a": 1})
    first = checkpointer.restore() or 0
    for step in (first + 1, first + 2):
        for name, parameter in engine.module.named_parameters():
            draw = torch.Generator().manual_seed(zlib.crc32(f"{name} {step}".encode()))
            gradient = torch.randn(strategy.shape_of(parameter), generator=draw)
            if isinstance(strategy, FSDP) and parameter.requires_grad:
                engine.parts[parameter].grad = sharding.cut_of(parameter).own(gradient).clone()
            elif parameter.requires_grad:
                parameter.grad = gradient
        for optimizer in engine.optimizers:
            optimizer.step()
    checkpointer.save(first + 2)
    return {name: weight.numpy().copy() for name, weight in engine.weights()}


def curves(layouts: list[tuple[int, list[str]]], ports: list[int], folder: str) -> dict[tuple[str, int], Any]:
    """By case and number of tensor ranks, the curve; by that number, what `stepped` gives of the cases of Muon.

    ``layouts``: tensor ranks and what is recomputed in each case.
    """
    results = {}
    for (tensor, recomputed), port in zip(layouts, ports, strict=True):
        # A store of its own: a session must not meet the addresses of the one before.
        os.environ["MASTER_PORT"] = str(port)
        with distributed.session(timeout=120, replica=tensor):
            for case, recompute in zip(CASES, recomputed, strict=True):
                results[case, tensor] = curve(case, FSDP(tensor=tensor), recompute)
            results["muon", tensor] = [
                stepped(case, FSDP(**{axis: tensor}), f"{folder}/{case}")
                for case, axis in ORTHOGONALISED
                if axis == "tensor" or tensor == STAGES
            ]
    return results


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    return {case: curve(case, DDP())[0] for case in CASES}


LAYOUTS: dict[int, list[tuple[int, list[str]]]] = {
    2: [(2, ["none", "full", "selective", "full", "none"])],
    4: [(2, ["selective", "none", "full", "none", "none"]), (4, ["full", "selective", "none", "none", "full"])],
}
RANKS = [2, pytest.param(4, marks=pytest.mark.slow)]


@pytest.fixture(scope="module")
def together(tmp_path_factory) -> Callable[[int], tuple[Path, list[Any]]]:
    """By a number of ranks, a folder of checkpoints and what `curves` gives of the layouts of so many."""

    def run(ranks: int) -> tuple[Path, list[Any]]:
        folder, layouts = tmp_path_factory.mktemp("tensor"), LAYOUTS[ranks]
        ports = [free_port() for _ in layouts]
        return folder, on_ranks(ranks, curves, layouts, ports, str(folder), joined=False)

    return cache(run)


@pytest.mark.parametrize("ranks", RANKS)
def test_every_layout_follows_the_curve_of_one_rank(ranks, together, alone):
    every = together(ranks)[1]
    for (case, tensor), (values, _) in ((key, of) for key, of in every[0].items() if key[0] in CASES):
        # Float32 sums in another order.
        np.testing.assert_allclose(values, alone[case], rtol=1e-5, err_msg=f"{case}, tensor {tensor}")
        assert all(of_rank[case, tensor][0] == values for of_rank in every)
        digests = [of_rank[case, tensor][1] for of_rank in every]
        replicas = [set(digests[n : n + tensor]) for n in range(0, ranks, tensor)]
        assert all(len(replica) == 1 for replica in replicas), (case, tensor)


@pytest.mark.parametrize("ranks", RANKS)
def test_muons_matrices_are_those_of_one_rank_and_each_layout_goes_on(ranks, together, tmp_path):
    """A layout begins where the one before has saved; one rank goes on where the last has, and from nothing."""
    folder, every = together(ranks)
    for number, (case, axis) in enumerate(ORTHOGONALISED):
        layouts = [tensor for tensor, _ in LAYOUTS[ranks] if axis == "tensor" or tensor == STAGES]
        for tensor in layouts:
            expected = stepped(case, DDP(), f"{tmp_path}/{case}")
            for rank in every:
                same(rank["muon", tensor][number], expected)
        same(stepped(case, DDP(), f"{folder}/{case}"), stepped(case, DDP(), f"{tmp_path}/{case}"))


def same(weights: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    """Whether both are so, matrices bit for bit."""
    assert weights.keys() == expected.keys()
    for name, values in weights.items():
        # PyTorch's fused AdamW rounds what does not fill a CPU's vector otherwise, and shards end elsewhere.
        bound = {"rtol": 0} if "_proj" in name and values.ndim > 1 else {"rtol": 1e-6, "atol": 1e-9}
        np.testing.assert_allclose(values, expected[name], **bound, err_msg=name)
