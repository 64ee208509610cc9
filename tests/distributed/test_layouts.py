"""Every layout of ranks learns the same, and continues what every other has saved: one model on four ranks."""

import dataclasses
import gc
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.layouts import DIVIDES_EXPERTS
from tests.ranks import on_ranks
from trainer.batch import Documents, PackedRows
from trainer.checkpoint import Checkpointer, Checkpoints
from trainer.diagnostics.guard import Guard, GuardSettings
from trainer.loop import train_step
from trainer.models.load import Model, ModelLoader
from trainer.optim import AdamW
from trainer.parallel import distributed
from trainer.parallel.boxes import boxes_of, volume
from trainer.parallel.ddp import DDP
from trainer.parallel.engine import Fragment
from trainer.parallel.fsdp import FSDP
from trainer.parallel.zero import Zero1, Zero2, Zero3
from trainer.pipelines.base import Models
from trainer.pipelines.pretrain import Pretrain
from trainer.tracking.throughput import Stopwatch

NOTHING_PERSISTS = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
LAYOUTS: dict[str, Any] = {
    "ddp": DDP, "zero1": Zero1, "zero2": Zero2, "zero3": partial(Zero3, deepspeed=NOTHING_PERSISTS), "fsdp": FSDP,
    "tensor-2": partial(FSDP, tensor=2), "tensor-4": partial(FSDP, tensor=4), "sequence-2": partial(FSDP, sequence=2),
    "sequence-2-tensor-2": partial(FSDP, sequence=2, tensor=2, reshard=False), "expert-2": partial(FSDP, expert=2),
    "pipeline-2": partial(FSDP, pipeline=2), "pipeline-2-tensor-2": partial(FSDP, pipeline=2, tensor=2),
}  # fmt: skip
"""On four ranks: what is not divided is data."""
DENSE: dict[str, Any] = {
    "family": "qwen3", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8,
}  # fmt: skip
SHAPES = {"dense": DENSE, "mixture": {**DENSE, "family": "mixtral", "experts": 4}}
TRIED = {
    "dense": [name for name in LAYOUTS if "expert" not in name and name != "pipeline-2"],
    "mixture": ["ddp", "zero3", "fsdp", "tensor-2", "pipeline-2", *["expert-2"][:DIVIDES_EXPERTS]],
}
CASES = [
    pytest.param(shape, layout, marks=[pytest.mark.slow] if shape == "dense" else [])
    for shape, layouts in TRIED.items()
    for layout in layouts
]
VOCABULARY = 51
"""Which four ranks cannot divide evenly."""
LENGTH, ROWS, STEPS, SAVED = 16, 8, 4, 2


def rows(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens ``(ROWS, LENGTH + 1)`` of a step, and which of them are learnt from: of some rows few, of others most."""
    draw = torch.Generator().manual_seed(step)
    # Of a token the next one follows with few exceptions, so that there is something to learn.
    tokens = torch.randint(VOCABULARY, (ROWS, 1), generator=draw) + torch.arange(LENGTH + 1)
    noise = torch.rand(ROWS, LENGTH + 1, generator=draw) < 0.1
    mask = torch.rand(ROWS, LENGTH, generator=draw) < torch.linspace(0.1, 0.9, ROWS)[:, None]
    return (tokens + 7 * noise) % VOCABULARY, mask


class Trained:
    """A small decoder of a shape under a layout."""

    def __init__(self, shape: str, layout: str) -> None:
        self.strategy = LAYOUTS[layout]()
        self.take_places()
        load = ModelLoader(Model(**SHAPES[shape]), self.strategy, 0, VOCABULARY)
        self.engine = self.strategy.wrap(load.load(), AdamW(lr=0.01, clip=1.0), load.precision)
        self.models = Models(self.engine.model, None, "", {})
        self.guard, self.watch = Guard(GuardSettings(), self.engine.device), Stopwatch(self.engine.device)

    def take_places(self) -> None:
        """Divide the ranks of the session as this layout does; its group is that of all layouts."""
        distributed._world = dataclasses.replace(distributed.world(), replica=self.strategy.mesh.replica)

    def step(self, number: int) -> list[float]:
        """Loss and norm of a step of two micro-batches of uneven weights."""
        self.take_places()
        tokens, mask = rows(number)
        data = distributed.world().data
        own = torch.tensor(data.block(0, ROWS // data.size))
        batches = [self._batch(part, tokens[part], mask[part]) for part in own.chunk(2)]
        metrics = train_step(Pretrain(), self.models, self.engine, self.guard, self.watch, batches, (0, number))
        return [float(metrics["loss"]), float(metrics["grad_norm"])]

    @staticmethod
    def _batch(numbers: torch.Tensor, tokens: torch.Tensor, mask: torch.Tensor) -> PackedRows:
        documents = Documents.from_lengths([10, LENGTH - 10] * len(numbers), len(numbers))
        weight = mask.sum().double()
        return PackedRows(numbers, tokens[:, :-1], documents, weight, tokens[:, 1:], mask.float())

    def checkpointer(self, folder: str) -> Checkpointer:
        return Checkpointer(Checkpoints(keep=0), Path(folder), self.engine, {}, {"a": 1})

    def state(self) -> dict[str, torch.Tensor]:
        """Whole parameters and moments, out of what the ranks would write. Collective."""
        self.take_places()
        owned = [
            [f.name, f.state, f.shape, f.box, f.start, f.tensor.tolist()] for f in self.engine.fragments(owned=True)
        ]
        whole: dict[str, torch.Tensor] = {}
        for name, state, shape, box, start, values in (piece for part in distributed.gather(owned) for piece in part):
            tensor = whole.setdefault(f"{name}/{state}", torch.full(shape, torch.nan))
            fragment = Fragment(name, state, tuple(shape), tuple(map(tuple, box)), start, torch.tensor(values))
            for at, part in places(fragment):
                tensor[at] = part.view_as(tensor[at])
        return whole

    def holds(self, whole: dict[str, torch.Tensor]) -> bool:
        """Whether all that this rank has is, bit for bit, what it is in ``whole``."""
        pieces = [(f"{f.name}/{f.state}", *piece) for f in self.engine.fragments(owned=False) for piece in places(f)]
        return bool(pieces) and all(torch.equal(part, whole[key][at].flatten()) for key, at, part in pieces)


def places(f: Fragment) -> list[tuple[tuple[slice, ...], torch.Tensor]]:
    """Where in its logical tensor the parts of a fragment are."""
    found, at = [], 0
    for box in boxes_of(f.box, f.start, f.start + f.tensor.numel()):
        found.append((tuple(slice(*span) for span in box), f.tensor.detach()[at : at + volume(box)]))
        at += volume(box)
    return found


def tried(folder: str, shape: str) -> dict[str, Any]:
    """All layouts in turn: a few steps with a checkpoint in the middle; then each restores each one's, and goes on."""
    gc.freeze()  # DeepSpeed collects for every engine, and all that is imported would be looked through each time
    names, runs, curves, states, ends = TRIED[shape], {}, {}, {}, {}
    for name in names:
        run = runs[name] = Trained(shape, name)
        curve = curves[name] = [run.step(number) for number in range(1, SAVED + 1)]
        run.checkpointer(f"{folder}/{shape}/{name}").save(SAVED)
        states[name] = run.state()
        curve += [run.step(number) for number in range(SAVED + 1, STEPS + 1)]
        ends[name] = run.state()
    restored, continued, again = {}, {}, {}
    for number, (target, run) in enumerate(runs.items()):
        # The last is its own, from which it goes on to the end; from the one before it takes a step.
        sources = [*names[number + 1 :], *names[: number + 1]]
        for source in sources:
            run.take_places()
            assert run.checkpointer(f"{folder}/{shape}/{source}").restore() == SAVED
            restored[source, target] = run.holds(states[source])
            if source == sources[-2]:
                continued[target] = source, run.step(SAVED + 1)
        curve = [run.step(number) for number in range(SAVED + 1, STEPS + 1)]
        again[target] = curve == curves[target][SAVED:] and run.holds(ends[target])
    return {"curves": curves, "restored": restored, "continued": continued, "again": again}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> Callable[[str], list[dict[str, Any]]]:
    """Gives what `tried` gives of a shape on each of four ranks."""
    folder = str(tmp_path_factory.mktemp("layouts"))
    return cache(lambda shape: on_ranks(4, tried, folder, shape))


@cache
def alone(shape: str) -> np.ndarray:
    """Losses and norms ``(STEPS, 2)`` of one rank."""
    run = Trained(shape, "ddp")
    return np.array([run.step(number) for number in range(1, STEPS + 1)])


@pytest.mark.parametrize(("shape", "layout"), CASES)
def test_every_layout_has_the_curve_of_one_rank(shape, layout, ranks):
    losses, norms = alone(shape).T
    assert losses[-1] < losses[0]
    first = ranks(shape)[0]["curves"][layout]
    for rank in ranks(shape):
        curve = rank["curves"][layout]
        assert curve == first
        # Sums in another order, through steps of Adam (issue 21 states 1e-5 for the losses).
        np.testing.assert_allclose(np.array(curve)[:, 0], losses, rtol=1e-5)
        np.testing.assert_allclose(np.array(curve)[:, 1], norms, rtol=1e-4)


@pytest.mark.parametrize(("shape", "target"), CASES)
def test_every_layout_restores_what_every_other_saved_bit_for_bit(shape, target, ranks):
    for rank in ranks(shape):
        restored = {source: rank["restored"][source, target] for source in TRIED[shape]}
        assert restored == dict.fromkeys(TRIED[shape], True)


@pytest.mark.parametrize(("shape", "target"), CASES)
def test_a_layout_goes_on_where_another_would_have_gone_on(shape, target, ranks):
    for rank in ranks(shape):
        source, step = rank["continued"][target]
        # Sums in another order, in one step.
        assert step == pytest.approx(rank["curves"][source][SAVED], rel=1e-5), source


@pytest.mark.parametrize(("shape", "layout"), CASES)
def test_restored_on_the_same_layout_every_bit_is_that_of_the_run_that_went_on(shape, layout, ranks):
    assert [rank["again"][layout] for rank in ranks(shape)] == [True] * 4
