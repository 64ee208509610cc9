"""A strategy that lives outside the package: a Strategy and an Engine, in one file, chosen by name."""

import sys
from pathlib import Path

import pytest
import torch

from tests.ranks import on_ranks
from tests.small_run import Net, Nothing
from trainer.optim import AdamW
from trainer.parallel import distributed
from trainer.parallel.ddp import DDP
from trainer.parallel.precision import Precision

MINE = '''
"""Gradients that are summed tensor by tensor, without buckets."""

from dataclasses import dataclass

from torch import Tensor, nn

from trainer.config import schema
from trainer.optim import Optimizer
from trainer.parallel import distributed
from trainer.parallel.ddp import ReplicatedEngine
from trainer.parallel.engine import Engine, Outcome
from trainer.parallel.precision import Precision
from trainer.parallel.strategy import Strategy


@schema("strategy/plain")
@dataclass
class Plain(Strategy):
    """Every rank holds the whole model; gradients meet when all of them are there."""

    def wrap(self, module: nn.Module, optimizer: Optimizer, precision: Precision) -> Engine:
        return PlainEngine(module, optimizer, precision, bucket_mb=None)


class PlainEngine(ReplicatedEngine):
    def step(self, limit: Tensor | None = None) -> Outcome:
        for parameter in self.module.parameters():
            if parameter.grad is not None:
                parameter.grad.copy_(distributed.sum_over_data(parameter.grad) / self.ranks)
        return super().step(limit)
'''


def stepped(strategy) -> dict:
    """Weights after two steps on this rank's share of four rows."""
    net = Net()
    for number, parameter in enumerate(net.parameters()):
        strategy.fill(parameter, torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)) / 3)
    engine = strategy.wrap(net, AdamW(lr=0.05), Precision())
    ids = distributed.world().data.share(torch.arange(4))
    for _ in range(2):
        engine.accumulate(lambda _: (engine.model(ids), None), [Nothing()], torch.tensor(4.0))
        assert bool(engine.step().applied)
    return {name: weight.numpy().copy() for name, weight in engine.weights()}


def both(folder: str) -> tuple[dict, dict]:
    sys.path.insert(0, folder)
    from plain_strategy import Plain  # type: ignore[import-not-found]

    return stepped(Plain()), stepped(DDP())


@pytest.fixture
def mine(clean_registries, tmp_path, monkeypatch) -> Path:
    (tmp_path / "plain_strategy.py").write_text(MINE)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def test_a_strategy_from_outside_trains_as_ddp_does_on_two_ranks(mine):
    for own, ddp in on_ranks(2, both, str(mine)):
        assert own.keys() == ddp.keys()
        for name in own:
            assert own[name] == pytest.approx(ddp[name], abs=1e-6), name
