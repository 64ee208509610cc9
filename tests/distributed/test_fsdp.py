"""What only FSDP does: birth in shards, blocks gathered one at a time, and what it must refuse."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from tests.ranks import on_ranks
from tests.small_run import Net, Run, same
from trainer.batch import Documents
from trainer.functional import logits
from trainer.models.actor_critic import ActorCritic, ValueHead, of_policy
from trainer.models.load import Model, ModelLoader
from trainer.optim import AdamW
from trainer.parallel import distributed
from trainer.parallel.fsdp import FSDP
from trainer.parallel.precision import Precision
from trainer.parallel.sharding import RowSums
from trainer.parallel.strategy import Offload

SHAPE = Model(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)


class Ordered(nn.Module):
    """Two matrices of one shape, registered in an order that a rank may get wrong: a set of names has one of its own."""

    def __init__(self, names: list[str]) -> None:
        super().__init__()
        for name in names:
            self.register_parameter(name, nn.Parameter(torch.zeros(4, 4)))


def placed_in_orders() -> str:
    strategy, names = FSDP(), ["first", "second"]
    try:
        strategy.place(Ordered(names if distributed.world().is_main else names[::-1]), (), Precision())
    except RuntimeError as error:
        return str(error)
    return "not refused"


def test_parameters_in_another_order_on_one_rank_are_refused_by_name():
    """PyTorch compares nothing, and trains on with the two matrices mixed up."""
    said = set(on_ranks(2, placed_in_orders))
    assert said == {
        "rank 1 has registered second (4, 4) where rank 0 has first (4, 4): build the model in the same order "
        "everywhere, and iterate over no set of names"
    }


def test_a_parameter_that_is_not_divided_is_refused_by_name():
    strategy, net = FSDP(), Net()
    with distributed.session():
        strategy.place(net, (), Precision())
        net.extra = nn.Linear(2, 2)  # it would train on each rank by itself
        with pytest.raises(ValueError, match=r"^extra.weight, extra.bias: not divided among the ranks"):
            strategy.wrap(net, AdamW(lr=0.1), Precision())


def without_deepspeed(folder: str) -> bool:
    sys.modules["deepspeed"] = None  # type: ignore[assignment]  # an import of it fails
    run = Run(Path(folder), strategy="fsdp")
    run.steps(1, 2)
    run.checkpointer.save(2)
    with run.engine.evaluating(), run.engine.gathered() as module:
        module(torch.arange(5))
    return Run(Path(folder), strategy="fsdp", seed=9).checkpointer.restore() == 2


def test_nothing_of_deepspeed_is_imported(tmp_path):
    assert on_ranks(2, without_deepspeed, str(tmp_path)) == [True, True]


def restored_behind_a_forward(folder: str) -> tuple[dict, dict]:
    """State restored after an evaluation, which leaves gathered weights behind, and that of a fresh run."""
    runs = Run(Path(folder), strategy="fsdp", seed=9), Run(Path(folder), strategy="fsdp", seed=9)
    with runs[0].engine.evaluating():
        runs[0].engine.model(torch.arange(5))
    for run in runs:
        run.checkpointer.restore()
        run.steps(3, 4)
    return runs[0].state(), runs[1].state()


def saved(folder: str) -> None:
    run = Run(Path(folder), strategy="fsdp")
    run.steps(1, 2)
    run.checkpointer.save(2)


def test_a_restore_behind_a_forward_reaches_the_weights_themselves(tmp_path):
    """What is written to gathered weights is lost at the next step."""
    on_ranks(2, saved, str(tmp_path))
    for behind, fresh in on_ranks(2, restored_behind_a_forward, str(tmp_path)):
        assert same(behind, fresh)


def gathered_parts() -> list[list[str]]:
    """Names of parameters that are whole inside `gathered`: of the policy alone, and of everything."""
    strategy = FSDP()
    load = ModelLoader(SHAPE, strategy, 0, 50, kind=ActorCritic)
    policy = load.load()
    with strategy.construction():
        policy.critic = ValueHead(32)
    strategy.place(policy.critic, (), Precision())
    strategy.fill(policy.critic.weight, torch.zeros(1, 32))
    engine = strategy.wrap(policy, AdamW(lr=0.1), Precision())
    parts = []
    for only in (of_policy, bool):
        with engine.evaluating(), engine.gathered(only=only) as module:
            parts.append([name for name, p in module.named_parameters() if type(p) is nn.Parameter])
    assert not any(type(p) is nn.Parameter for p in policy.parameters())  # in shards again
    return parts


def test_only_what_is_asked_for_is_gathered():
    for policy, everything in on_ranks(2, gathered_parts):
        assert [name for name in everything if name not in policy] == ["critic.weight"]
        assert "model.layers.1.mlp.up_proj.weight" in policy


class Gathers(TorchDispatchMode):
    """Notes when a gather begins, among what else happens."""

    def __init__(self, events: list[str]) -> None:
        super().__init__()
        self.events = events

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._opname == "_allgather_base_":
            self.events.append("gather")
        return func(*args, **(kwargs or {}))


def order_of_a_forward() -> list[str]:
    load = ModelLoader(replace(SHAPE, num_hidden_layers=3), FSDP(), 0, 50)
    model, events = load.load(), list[str]()
    for number, block in enumerate(model.model.layers):
        block.mlp.register_forward_hook(lambda *_, number=number: events.append(f"block {number}"))
    with Gathers(events):
        model(torch.arange(8)[None], Documents.from_lengths([8], 1), logits)
    return events


def test_a_block_is_gathered_while_the_one_before_it_computes():
    for events in on_ranks(2, order_of_a_forward):
        assert events == ["gather"] * 3 + ["block 0", "gather", "block 1", "block 2"]


def sums_of_rows() -> tuple[list[float], list[float]]:
    """What a rank sends, a million or a tenth, whose sum depends on the order; and what it gets."""
    rank, sums = distributed.world().rank, RowSums()
    sent = sums.allocate((6,), dtype=torch.float32, device=torch.device("cpu"))
    sent.copy_(torch.tensor([1e6, -1e6, 0.1])[rank] + torch.arange(6) // 2)
    received = sums.allocate((2,), dtype=torch.float32, device=sent.device)
    sums(received, sent, dist.group.WORLD, dist.ReduceOp.SUM)
    return sent.tolist(), received.tolist()


def test_rows_are_added_up_in_the_order_of_the_ranks():
    every = on_ranks(3, sums_of_rows)
    sent = [torch.tensor(values).view(3, 2) for values, _ in every]
    for rank, (_, received) in enumerate(every):
        assert received == (sent[0][rank] + sent[1][rank] + sent[2][rank]).tolist()


def test_offload_without_a_gpu_is_refused_before_any_rank_exists():
    strategy = FSDP(offload=Offload.parameters)
    assert list(strategy.validate_device(cuda=True)) == []
    assert list(strategy.validate_device(cuda=False)) == [
        "strategy.offload=parameters needs a GPU to compute on; use none"
    ]
    assert "use parameters" in next(FSDP(offload=Offload.optimizer).problems())
