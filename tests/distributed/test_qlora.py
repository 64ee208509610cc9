"""A packed base on several ranks: the same losses under every strategy, bytes in shards, and one reference everywhere."""

import dataclasses
import gc
from functools import cache, partial

import pytest
import torch

from tests.layouts import PACKS_UNDER_FSDP
from tests.ranks import on_ranks
from tests.shards import held
from tests.small_folder import SHAPE
from trainer.batch import Documents
from trainer.export.peft import merged_policy
from trainer.functional import cross_entropy, logprobs
from trainer.generation.generate import generate
from trainer.generation.sampling import Sampling
from trainer.metrics import Metrics
from trainer.models.load import ModelLoader
from trainer.models.lora import adapters_off
from trainer.models.packed import PackedBase, packed_weights
from trainer.models.qlora import QLoRA
from trainer.optim import AdamW
from trainer.parallel import distributed
from trainer.parallel.ddp import DDP
from trainer.parallel.fsdp import FSDP
from trainer.parallel.precision import Compute, Precision
from trainer.parallel.zero import Zero1, Zero2, Zero3

pytest.importorskip("bitsandbytes")
TOKENS = torch.arange(48).view(2, 24) * 7 % 50
SHARDS = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
STRATEGIES = {
    "ddp": (DDP(), Compute.fp32),
    "zero1": (Zero1(), Compute.fp32),
    "zero2": (Zero2(), Compute.fp32),
    "zero3": (Zero3(deepspeed=SHARDS), Compute.fp32),
    "fsdp": (FSDP(), Compute.fp32),
    "fsdp bf16": (FSDP(autocast=False), Compute.bf16),
    "fsdp bf16 autocast": (FSDP(autocast=True, reshard=False), Compute.bf16),
    "zero2 bf16": (Zero2(autocast=False), Compute.bf16),
    "zero3 bf16": (Zero3(autocast=False, deepspeed=SHARDS), Compute.bf16),
    "tensor": (FSDP(tensor=2), Compute.fp32),
    "tensor mixture": (FSDP(tensor=2), Compute.fp32),
    "expert mixture": (FSDP(expert=2), Compute.fp32),
}
WIDE = dataclasses.replace(SHAPE, num_key_value_heads=2, head_dim=64, intermediate_size=128)
"""Of whose matrices each of two ranks has blocks as a whole."""
MIXTURE = dataclasses.replace(WIDE, family="qwen3_moe", experts=4, expert_size=16)
SHAPES = {"tensor": WIDE, "tensor mixture": MIXTURE, "expert mixture": MIXTURE} if PACKS_UNDER_FSDP else {}
STRATEGIES = {name: each for name, each in STRATEGIES.items() if PACKS_UNDER_FSDP or not isinstance(each[0], FSDP)}
QUICK = ("ddp", "zero2", "zero3", *["fsdp"][:PACKS_UNDER_FSDP], *SHAPES)


class Row:
    """A batch that knows nothing but its tokens."""

    def __init__(self, tokens: torch.Tensor) -> None:
        self.tokens = tokens

    def to(self, device: torch.device) -> "Row":
        return self


def learnt(name: str) -> dict:
    """Three steps on a row a replica, and what else reads the base."""
    strategy, compute = STRATEGIES[name]
    # Ranks that start without a mesh take the places of this one.
    world = distributed.world()
    distributed._world = dataclasses.replace(world, replica=strategy.mesh.replica if world.size > 1 else 1)
    if world.size == 1:
        strategy = DDP()
    load = ModelLoader(SHAPES.get(name, SHAPE), strategy, 0, 50, QLoRA(rank=4), precision=Precision(compute))
    engine = strategy.wrap(load.load(), AdamW(lr=0.02), load.precision)
    documents, row = Documents.from_lengths([24], 1), TOKENS[distributed.world().data.share([0, 1])]
    losses: list[float] = []

    def loss_of(batch: Row) -> tuple[torch.Tensor, Metrics]:
        documents = Documents.from_lengths([24] * len(batch.tokens), len(batch.tokens))
        read = partial(cross_entropy, targets=batch.tokens.roll(-1, 1), mask=torch.ones(batch.tokens.shape))
        loss = engine.model(batch.tokens, documents, read)[0]
        losses.append(float(distributed.sum_over_data(loss.double())))
        return loss, Metrics()

    with engine.evaluating():
        first = engine.model(TOKENS[:1], documents, partial(logprobs, targets=TOKENS[:1].roll(-1, 1)))[0]
    for _ in range(3):
        engine.accumulate(loss_of, [Row(row)], torch.tensor(48.0))
        engine.step()
    reference = load.frozen()
    with engine.evaluating():
        read = partial(logprobs, targets=TOKENS[:1].roll(-1, 1))
        with adapters_off(engine.model):
            off = engine.model(TOKENS[:1], documents, read)[0]
        frozen = reference(TOKENS[:1], documents, read)[0]
        with engine.gathered() as module:
            [answer] = generate(module, [[3, 4]], Sampling(4, 0.0), stops=[])
    policy = {n: t.float().sum().item() for n, t in merged_policy(engine, load.adapter)}
    weights = packed_weights(engine.module).values()
    parts = [part for weight in weights for part in weight.packed]
    return {
        "losses": losses,
        "reference": [first.tolist() == off.tolist() == frozen.tolist()],
        "answer": answer.ids,
        "policy": policy,
        "bytes": sum(held(part).numel() for part in parts),
        "kinds": sorted({str(held(part).dtype) for part in parts}),
        "base": dict(PackedBase.of(engine.model).digests),
    }


def every(names: list[str]) -> dict[str, dict]:
    gc.freeze()  # DeepSpeed collects for every engine, and all that is imported would be looked through each time
    return {name: learnt(name) for name in names}


@pytest.fixture(scope="module")
def alone_with():
    """What one rank learns of the model of a strategy."""
    return cache(learnt)


@pytest.fixture(scope="module")
def alone(alone_with):
    return alone_with("ddp")


@pytest.fixture(scope="module")
def together():
    return on_ranks(2, every, list(QUICK))


@pytest.fixture(scope="module")
def others():
    return on_ranks(2, every, [name for name in STRATEGIES if name not in QUICK])


@pytest.mark.parametrize("name", QUICK)
def test_every_strategy_learns_the_same_over_a_packed_base(name, together, alone_with):
    alone = alone_with(name if name in SHAPES else "ddp")
    for rank in together:
        found = rank[name]
        # Sums in another order, through three steps of Adam.
        assert found["losses"] == pytest.approx(alone["losses"], rel=1e-5)
        assert found["answer"] == alone["answer"]
        assert found["policy"] == pytest.approx(alone["policy"], rel=1e-3, abs=1e-3)
        assert found["base"] == alone["base"]
    assert alone["losses"][-1] < alone["losses"][0]


@pytest.mark.parametrize("name", QUICK)
def test_the_base_is_its_own_reference_and_bytes_under_every_strategy(name, together):
    for rank in together:
        assert rank[name]["reference"] == [True]
        assert rank[name]["kinds"] == ["torch.uint8"]


def test_shards_hold_half_of_the_bytes_on_each_of_two_ranks(together, alone, alone_with):
    for rank in together:
        parts = 3 * len(alone["base"])
        assert alone["bytes"] / 2 <= rank["zero3"]["bytes"] <= alone["bytes"] / 2 + parts  # padding to an even split
        if PACKS_UNDER_FSDP:
            # Every tensor rank has the 8 bytes of each matrix's scales.
            wide = alone_with("tensor")
            assert rank["tensor"]["bytes"] == wide["bytes"] / 2 + 4 * len(wide["base"])
            assert alone["bytes"] / 2 - parts <= rank["fsdp"]["bytes"] <= alone["bytes"] / 2 + parts
        assert rank["zero2"]["bytes"] == alone["bytes"]


@pytest.mark.slow
def test_the_other_strategies_and_weights_of_16_bits_learn_over_it_too(others, alone):
    for rank in others:
        for name, found in rank.items():
            # bfloat16 has three significant digits.
            assert found["losses"] == pytest.approx(alone["losses"], rel=2e-2 if "bf16" in name else 1e-5)
            assert found["losses"][-1] < found["losses"][0]
            assert found["reference"] == [True]
            assert found["kinds"] == ["torch.uint8"]
