"""Rounded weights on ranks: a weight is whole where it is rounded, whatever the strategy, and adapters are, too."""

import numpy as np
import pytest

from tests.command import TINY, Command, metrics

RUN = [
    *TINY,
    "steps=8",
    "optimizer.lr=0.003",
    "qat.bits=4",
    "qat.start=2",
    "evaluation.every=4",
    "tracking.report=false",
]
SHARDS = "+strategy.deepspeed={zero_optimization: {stage3_param_persistence_threshold: 0}}"


def losses(run) -> np.ndarray:
    return np.array([line[key] for line in metrics(run) for key in ("loss", "eval/loss") if key in line])


@pytest.mark.parametrize("adapter", [[], ["adapter=lora", "adapter.rank=4"]], ids=["full", "lora"])
def test_the_curve_of_rounded_weights_does_not_depend_on_how_they_are_sharded(adapter, tmp_path):
    Command(tmp_path, "run_dir=one", *RUN, *adapter).finish()
    Command(tmp_path, "run_dir=two", *RUN, *adapter, "strategy=zero3", SHARDS, ranks=2).finish()
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert len(one) == 10
    # Gradients of fp32 sums in another order: a weight that lies between two steps of the grid may go to the other one.
    np.testing.assert_allclose(two, one, rtol=1e-3)
    np.testing.assert_allclose(two[:2], one[:2], rtol=1e-5)
