"""Every family in shards: its parameters are gathered wherever a feature of its own reads them."""

import gc
from functools import partial
from pathlib import Path

import pytest
import torch

from tests.ranks import on_ranks
from tests.unit.models.test_families import LENGTHS, OWN, TOKENS, built
from trainer.batch import Documents
from trainer.functional import cross_entropy
from trainer.metrics import Metrics
from trainer.models.load import Model, ModelLoader
from trainer.optim import AdamW
from trainer.parallel import distributed
from trainer.parallel.ddp import DDP
from trainer.parallel.fsdp import FSDP
from trainer.parallel.precision import Precision
from trainer.parallel.strategy import Strategy
from trainer.parallel.zero import Zero1, Zero2, Zero3


class Row:
    """A batch that knows nothing but its tokens."""

    def __init__(self, tokens: torch.Tensor) -> None:
        self.tokens = tokens

    def to(self, device: torch.device) -> "Row":
        return self


def losses_of(folder: Path, strategy: Strategy) -> list[float]:
    """The sum of losses before and after a step, a row of packed documents a rank."""
    engine = strategy.wrap(
        ModelLoader(Model(path=str(folder)), strategy, 0, 96, longest=30).load(), AdamW(lr=0.01), Precision()
    )
    row = TOKENS[distributed.world().data.share([0, 1])]
    documents = Documents.from_lengths(LENGTHS * len(row), len(row))
    sums: list[torch.Tensor] = []

    def loss_of(batch: Row) -> tuple[torch.Tensor, Metrics]:
        targets = batch.tokens.roll(-1, 1)
        read = partial(cross_entropy, targets=targets, mask=torch.ones(targets.shape))
        loss = engine.model(batch.tokens, documents, read)[0]
        sums.append(loss.detach())
        return loss, Metrics()

    engine.accumulate(loss_of, [Row(row)], torch.tensor(60.0))
    engine.step()
    with torch.no_grad():
        loss_of(Row(row))
    return [float(distributed.sum_over_data(loss.double())) for loss in sums]


def in_all(folders: Path) -> dict[str, list[list[float]]]:
    """By family what a whole copy learns on each rank, and what shards of every kind do."""
    gc.freeze()  # DeepSpeed collects for every engine, and all that is imported would be looked through each time
    shards = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
    strategies: list[Strategy] = [DDP(), Zero3(deepspeed=shards), FSDP()]
    # A delta rule's parameters are of more shapes than matrices and norms; stages 1 and 2 lay them end to end.
    more = {"qwen3_5_text": [Zero1(), Zero2()]}
    return {
        kind: [losses_of(folders / kind, strategy) for strategy in (*strategies, *more.get(kind, []))]
        for kind in sorted(OWN)
    }


def divided(folders: Path) -> dict[str, list[float]]:
    """By family what two ranks learn that divide each matrix."""
    with distributed.session(timeout=120, replica=2):
        kinds = sorted(OWN.keys() - UNDIVIDED)
        return {kind: losses_of(folders / kind, FSDP(tensor=2)) for kind in kinds}


UNDIVIDED = {"qwen3_5_text"}
"""Families that ranks cannot divide the matrices of: gated delta rules."""


@pytest.mark.slow
def test_every_family_learns_the_same_in_shards_as_in_copies(tmp_path):
    for kind in OWN:
        built(kind, tmp_path / kind)
    [losses, _] = on_ranks(2, in_all, tmp_path)
    for kind, (copies, *others) in losses.items():
        assert others == [pytest.approx(copies, rel=1e-5)] * len(others), kind
        assert copies[1] < copies[0], kind
    # Of two ranks the same, of one replica the sum of what two copies read.
    for of_rank in on_ranks(2, divided, tmp_path, joined=False):
        for kind, found in of_rank.items():
            assert found == pytest.approx(losses[kind][0], rel=1e-5), kind
