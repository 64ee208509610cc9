"""Experts that ranks divide among them: the curve of one rank, idle ranks, whole experts to sample with, checkpoints."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.distributed.test_experts import ADAMW, ROWS, begun, compare, curve, steps
from tests.layouts import needs_divided_experts
from tests.mixtures import mixture
from tests.ranks import on_ranks, session_of
from trainer.batch import Documents
from trainer.checkpoint import Checkpointer, Checkpoints
from trainer.functional import logits
from trainer.optim import Muon
from trainer.parallel import distributed
from trainer.parallel.engine import Engine
from trainer.parallel.mesh import Mesh, MeshShape
from trainer.pipelines.base import Models

pytestmark = needs_divided_experts
STEPS = 20
TOKENS = torch.arange(24).view(2, 12) * 7 % 101
PACKED = Documents.from_lengths([12, 12], 2)
CHOICES = {
    "idle experts": [[[0, 1], [1, 0], [0, 1]], [[0, 1]]],
    "a rank without tokens": [[[0, 3], [2, 1], [3, 2]], []],
    "all go elsewhere": [[[2, 3]], [[1, 0], [0, 1]]],
}
"""Of the tokens of each of two ranks the experts; 0 and 1 are on the first rank, 2 and 3 on the second."""


def passed(choices: list[list[list[int]]], *, divided: bool) -> dict[str, np.ndarray]:
    """Results and gradients of a layer: of this rank's tokens and experts, or of all of them where it is not ``divided``."""
    rank, layer, draw = distributed.world().rank, mixture(expert_bias=True).experts, torch.Generator().manual_seed(1)
    chosen = torch.tensor([experts for of_rank in choices for experts in of_rank])
    inputs = torch.randn(len(chosen), 16, generator=draw), torch.rand(len(chosen), 2, generator=draw), chosen
    if divided:
        values = {name: p.detach() for name, p in layer.named_parameters()}
        layer.divide(Mesh.of(MeshShape(expert=2)))
        for name, parameter in layer.named_parameters():
            parameter.data = values[name].chunk(2)[rank].clone()
        inputs = tuple(t.split(list(map(len, choices)))[rank] for t in inputs)
    x, weights, chosen = inputs
    x.requires_grad_()
    out = layer(x, chosen, weights)
    out.square().sum().backward()
    gradients = {name: p.grad for name, p in layer.named_parameters()}
    return {name: t.detach().numpy().copy() for name, t in {"out": out, "x": x.grad, **gradients}.items()}


def on_two() -> dict[str, Any]:
    """What tests compare that needs two ranks."""
    inside, outside = list[np.ndarray](), list[np.ndarray]()

    def alone(step: int, engine: Engine) -> None:
        """Another number of forwards on every rank."""
        with engine.evaluating(), engine.gathered() as module:
            inside.extend(seen(module) for _ in range(1 + 3 * distributed.world().rank))

    def together(step: int, engine: Engine) -> None:
        with engine.evaluating():
            outside.append(seen(engine.model))

    return {
        "layers": {name: passed(choices, divided=True) for name, choices in CHOICES.items()},
        "curve": curve("softmax", "expert 2", 2, "none", STEPS),
        "muon": curve("softmax", "expert 2", 4, "none", 4, Muon(lr=0.02)),
        "curves": [curve("sigmoid", "expert 2", 4, "full", 3, after=look) for look in (alone, together)],
        "inside": inside,
        "outside": outside,
    }


def seen(module: torch.nn.Module) -> np.ndarray:
    return module(TOKENS, PACKED, logits).numpy().copy()  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def pair():
    return on_ranks(2, on_two)


@pytest.mark.parametrize("name", CHOICES)
def test_a_divided_layer_is_the_layer_whoever_has_no_tokens(name, pair):
    expected, sizes = passed(CHOICES[name], divided=False), list(map(len, CHOICES[name]))
    for rank, here in enumerate(pair):
        for key, values in expected.items():
            of_tokens = np.split(values, sizes[:1]) if key in ("out", "x") else np.split(values, 2)
            # Float32: the same sums over 16 numbers or a few tokens, in another order.
            np.testing.assert_allclose(here["layers"][name][key], of_tokens[rank], rtol=1e-5, atol=1e-5)


def test_divided_experts_give_the_curve_of_one_rank(pair):
    expected = curve("softmax", "ddp", ROWS, "none", STEPS)
    for here in pair:
        compare(here["curve"], expected)


def test_muon_takes_the_matrix_of_each_expert_wherever_it_is(pair):
    losses, _ = curve("softmax", "ddp", ROWS, "none", 4, Muon(lr=0.02))
    for here in pair:
        # Orthogonalised in bfloat16, whose last bit (2**-8) a sum in another order may turn, in updates of 2% a step.
        np.testing.assert_allclose(here["muon"][0][:, 0], losses[:, 0], rtol=2e-4)


def test_whole_experts_are_there_to_sample_with_and_training_goes_on_unchanged(pair):
    for rank, here in enumerate(pair):
        times = 1 + 3 * rank
        assert len(here["inside"]) == 3 * times
        for number, logits_inside in enumerate(here["inside"]):
            np.testing.assert_allclose(logits_inside, here["outside"][number // times], rtol=1e-5, atol=1e-6)
        for looked, undisturbed in zip(*here["curves"], strict=True):
            np.testing.assert_array_equal(looked, undisturbed)


DIVIDED = {
    1: [
        ("softmax", "expert 2", 1, "full", STEPS), ("sigmoid", "expert 2", 2, "selective", 6),
        ("softmax", "expert 2 kept", 1, "none", 4), ("softmax", "expert 4", 2, "selective", 4),
        ("few", "expert 2", 2, "none", 4), ("few", "fsdp", 2, "none", 4),
    ],
    2: [
        ("sigmoid", "expert 2 x sequence 2", 2, "full", 4), ("sigmoid", "expert 2 x tensor 2", 4, "selective", 4),
        ("softmax", "pipeline 2", 1, "full", 6), ("sigmoid", "pipeline 2 x expert 2", 2, "none", 4),
    ],
}  # fmt: skip
"""By ranks of a replica. With few experts there are fewer than ranks that have their rows."""
CASES = [case for cases in DIVIDED.values() for case in cases]


def on_four() -> list[tuple[np.ndarray, np.ndarray]]:
    curves = []
    for replica, cases in DIVIDED.items():
        with session_of(replica):
            curves += [curve(*case) for case in cases]
    with session_of():
        return [*curves, curve("few", "expert 2", 2, "none", 3, Muon(lr=0.02))]


@pytest.mark.slow
def test_four_ranks_divide_experts_and_the_rows_of_each():
    expected = [curve(kind, "ddp", ROWS, "none", last) for kind, *_, last in CASES]
    muon, _ = curve("few", "ddp", ROWS, "none", 3, Muon(lr=0.02))
    for here in on_ranks(4, on_four, joined=False):
        for found, one in zip(here[:-1], expected, strict=True):
            compare(found, one)
        np.testing.assert_allclose(here[-1][0][:, 0], muon[:, 0], rtol=2e-4)


def opened(folder: str, strategy: str, seed: int) -> tuple[Engine, Models, Checkpointer]:
    """A model with an adaptive bias, whose buffers a checkpoint has, too."""
    engine, models = begun("few", strategy, "none", ADAMW, seed)
    assert models.balancer is not None
    checkpoints = Checkpointer(Checkpoints(keep=0), Path(folder), engine, {"balancer": models.balancer}, {"a": 1})
    return engine, models, checkpoints


def saved(folder: str, strategy: str, last: int) -> dict[str, np.ndarray]:
    """The state after ``last`` steps, which is saved."""
    engine, models, checkpoints = opened(folder, strategy, 0)
    steps(engine, models, 2, 0, last)
    checkpoints.save(last)
    checkpoints.close()
    return state(engine)


def restored(source: str, strategy: str, target: str, last: int) -> tuple[dict, dict, np.ndarray, dict]:
    """State as restored, whole weights, the following losses up to ``last``, and the state then; saved to ``target``."""
    engine, models, checkpoints = opened(source, strategy, 9)
    first = checkpoints.restore()
    assert first is not None
    before, weights = state(engine), {name: w.numpy().copy() for name, w in engine.weights()}
    if target != source:
        again = Checkpointer(Checkpoints(keep=0), Path(target), engine, {"balancer": models.balancer}, {"a": 1})
        again.save(first)
        again.close()
    rows = steps(engine, models, 2, first, last)
    return before, weights, rows[:, 0], state(engine)


def state(engine: Engine) -> dict[str, np.ndarray]:
    """Whole parameters, buffers and moments. Collective."""
    pieces = [[f.name, f.state, f.shape, f.box, f.start, f.tensor.tolist()] for f in engine.fragments(owned=True)]
    whole: dict[str, np.ndarray] = {}
    for name, kind, shape, box, start, values in (p for part in distributed.gather(pieces) for p in part):
        tensor = whole.setdefault(f"{name}/{kind}", np.full(shape, np.nan, dtype=np.float32))
        block = tensor[tuple(slice(*span) for span in box)]
        flat = block.flatten()
        flat[start : start + len(values)] = values
        block[...] = flat.reshape(block.shape)
    return whole


LAYOUTS = [(2, "expert 2"), (1, "ddp"), (4, "expert 2"), (2, "zero3"), (2, "expert 2"), (4, "fsdp"), (2, "fsdp")]
"""Each saves what the next one restores."""


@pytest.mark.parametrize("layouts", [LAYOUTS[:3], pytest.param(LAYOUTS[2:], marks=pytest.mark.slow)])
def test_a_checkpoint_goes_on_wherever_its_experts_are(layouts, tmp_path):
    ranks, strategy = layouts[0]
    [expected, *_] = on_ranks(ranks, saved, str(tmp_path / "0"), strategy, 2)
    [(_, _, losses, _), *_] = on_ranks(1, restored, str(tmp_path / "0"), "ddp", str(tmp_path / "0"), 4)
    for number, (ranks, strategy) in enumerate(layouts[1:], start=1):
        folders = str(tmp_path / str(number - 1)), strategy, str(tmp_path / str(number))
        for here, weights, own, _ in on_ranks(ranks, restored, *folders, 4):
            assert here.keys() == expected.keys()
            for name, values in expected.items():
                np.testing.assert_array_equal(here[name], values, name)
            assert all(np.array_equal(w, expected[f"{name}/param"]) for name, w in weights.items())
            np.testing.assert_allclose(own, losses, rtol=1e-5)


def test_continued_on_the_same_ranks_it_is_bitwise_the_run_that_never_ended(tmp_path):
    first, second = str(tmp_path / "a"), str(tmp_path / "b")
    on_ranks(2, saved, first, "expert 2", 2)
    [(*_, continued), *_] = on_ranks(2, restored, first, "expert 2", first, 5)
    [never_ended, *_] = on_ranks(2, saved, second, "expert 2", 5)
    assert all(np.array_equal(continued[name], values) for name, values in never_ended.items())
