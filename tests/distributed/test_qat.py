"""Rounded weights on ranks: a weight is whole where it is rounded, whatever the strategy, and adapters are, too."""

import time
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

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


FULL, LORA = [], ["adapter=lora", "adapter.rank=4"]


def case(kind: str, overrides: list[str], strategy: str, *strategy_overrides: str, slow: bool = True) -> Any:
    marks = [pytest.mark.slow] if slow else []
    return pytest.param(overrides, [f"strategy={strategy}", *strategy_overrides], id=f"{kind}-{strategy}", marks=marks)


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """Losses of a run on one rank by its adapter, made once."""
    made = {}

    def losses_with(adapter: list[str]) -> np.ndarray:
        if tuple(adapter) not in made:
            folder = tmp_path_factory.mktemp("one")
            Command(folder, "run_dir=one", *RUN, *adapter).finish()
            made[tuple(adapter)] = losses(folder / "one")
        return made[tuple(adapter)]

    return losses_with


@pytest.mark.parametrize(
    ("adapter", "strategy"),
    [
        case("full", FULL, "zero3", SHARDS, slow=False), case("lora", LORA, "zero3", SHARDS, slow=False),
        case("full", FULL, "fsdp", slow=False), case("lora", LORA, "fsdp"),
        case("full", FULL, "zero1"), case("lora", LORA, "zero2"),
    ],
)  # fmt: skip
def test_the_curve_of_rounded_weights_does_not_depend_on_how_they_are_sharded(adapter, strategy, one, tmp_path):
    Command(tmp_path, "run_dir=two", *RUN, *adapter, *strategy, ranks=2).finish()
    expected, two = one(adapter), losses(tmp_path / "two")
    assert len(expected) == 10
    # Gradients of fp32 sums in another order: a weight that lies between two steps of the grid may go to the other one.
    np.testing.assert_allclose(two, expected, rtol=1e-3)
    np.testing.assert_allclose(two[:2], expected[:2], rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["zero2", "fsdp"])
def test_rounded_weights_killed_on_two_ranks_end_with_the_same_bytes(strategy, tmp_path):
    run = [*RUN, "checkpoint.every=1", f"strategy={strategy}"]
    Command(tmp_path, "run_dir=whole", *run, ranks=2).finish()
    cut = Command(tmp_path, "run_dir=cut", *run, ranks=2)
    # Behind the step from which weights are rounded.
    while not list((tmp_path / "cut" / "checkpoints").glob("step-00000003")) and cut.processes[0].poll() is None:
        time.sleep(0.01)
    cut.kill()
    assert "continuing after step" in Command(tmp_path, "run_dir=cut", *run, ranks=2).finish()
    whole, continued = (load_file(tmp_path / name / "export" / "model.safetensors") for name in ("whole", "cut"))
    assert all(np.array_equal(whole[name], continued[name]) for name in whole)
