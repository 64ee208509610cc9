"""What every engine does, on a model of one weight."""

import pytest
import torch
from torch import nn

from trainer.optim import AdamW
from trainer.parallel import distributed
from trainer.parallel.ddp import DDP
from trainer.parallel.precision import Compute, Precision
from trainer.parallel.zero import Zero2, Zero3


def test_what_is_due_before_an_update_runs_once_and_before_it():
    engine = DDP().wrap(nn.Linear(1, 1), AdamW(lr=0.1), Precision())
    seen = []
    for step in range(2):
        for parameter in engine.module.parameters():
            parameter.grad = torch.ones_like(parameter)
        before = engine.module.weight.item()
        if step == 0:
            engine.before_next_update(lambda: seen.append(engine.module.weight.item()))
        engine.step()
        assert engine.module.weight.item() != before
        assert len(seen) == 1
        assert step or seen == [before]


@pytest.mark.parametrize("strategy", [Zero2(), Zero3()])
def test_zero_on_cuda_overlaps_its_exchange_and_asks_for_no_overflow(strategy, monkeypatch):
    monkeypatch.setattr(distributed, "_world", distributed.World(0, 8, 0, torch.device("cuda", 0)))
    settings = strategy._settings(Precision(compute=Compute.bf16))
    assert settings["zero_optimization"]["overlap_comm"] is True
    assert settings["bf16"] == {"enabled": True, "check_grad_overflow": False}
    if strategy.stage == 3:
        # 32,000 x 4,096 of a 7B model's table, its widest matrix and DeepSpeed's next 50 million.
        assert (
            settings["zero_optimization"]["stage3_max_live_parameters"] > 32_000 * 4_096 + 11_008 * 4_096 + 50_000_000
        )
