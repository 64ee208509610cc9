"""Layers divided among ranks: the curve, the weights and the checkpoint are those of one rank, whatever the schedule."""

import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from tests.command import TINY, Command, metrics
from tests.mixtures import small
from tests.ranks import on_ranks
from trainer.checkpoint import Checkpointer, Checkpoints
from trainer.checkpoint.folder import folder_name
from trainer.compose import compose
from trainer.config import ConfigError, InputError
from trainer.data.rows import Segment, collate
from trainer.diagnostics.guard import Guard, GuardSettings
from trainer.loop import train_step
from trainer.models.adapter import Full
from trainer.models.division import mesh_remarks, validate_mesh
from trainer.models.load import Model, ModelLoader
from trainer.models.lora import LoRA
from trainer.models.recompute import Recompute
from trainer.models.shape import architecture_of
from trainer.optim import AdamW
from trainer.parallel import distributed
from trainer.parallel.ddp import DDP
from trainer.parallel.fsdp import FSDP
from trainer.parallel.mesh import MeshShape
from trainer.parallel.precision import Compute, Precision
from trainer.pipelines.base import Models
from trainer.pipelines.pretrain import Pretrain
from trainer.pipelines.sft import SFT
from trainer.tracking.throughput import Stopwatch

STEPS, VOCABULARY = 20, 101
SHAPE: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8,
}  # fmt: skip
CASES: dict[str, dict[str, Any]] = {
    "tied": {"rows": 8},
    # Layers do not divide by 2 and 4; blocks are computed again in the backward.
    "untied": {
        "shape": {"tie_word_embeddings": False, "num_hidden_layers": 5},
        "recompute": Recompute.full,
        "reshard": False,
    },
    # Dropout is drawn again in a backward that other micro-batches' forwards precede.
    "first": {"adapter": LoRA(rank=4, targets=["model.layers.0.*"])},
    "lora": {"adapter": LoRA(rank=4, dropout=0.2), "pipeline": SFT(), "recompute": Recompute.selective},
}


class Trained:
    """A small decoder under a strategy; every step is a function of its number and of the state."""

    def __init__(self, case: str, strategy: DDP | FSDP, compute: Compute = Compute.fp32) -> None:
        features = CASES[case]
        self.rows = range(features.get("rows", 4))
        model = Model(
            **{**SHAPE, **features.get("shape", {})}, activation_checkpointing=features.get("recompute", Recompute.none)
        )
        if isinstance(strategy, FSDP):
            strategy.reshard = features.get("reshard", True)
        precision, self.pipeline = Precision(compute), features.get("pipeline", Pretrain())
        load = ModelLoader(model, strategy, 0, VOCABULARY, features.get("adapter", Full()), precision=precision)
        self.engine = strategy.wrap(load.load(), AdamW(lr=3e-3), precision)
        self.models = Models(self.engine.model, None)  # type: ignore[arg-type]
        self.guard, self.watch = Guard(GuardSettings(), self.engine.device), Stopwatch(self.engine.device)

    def steps(self, first: int, last: int) -> list[tuple[float, float]]:
        """Loss and gradient norm of every step."""
        rows = []
        for step in range(first, last + 1):
            mine = distributed.world().data.share(self.rows)
            parts = [batch_of(step, number) for number in mine]
            metrics = train_step(self.pipeline, self.models, self.engine, self.guard, self.watch, parts, (0, step))
            rows.append((float(metrics["loss"]), float(metrics["grad_norm"])))
        return rows

    def measured(self) -> float:
        """The loss of other rows."""
        total = torch.zeros((), dtype=torch.float64)
        with self.engine.evaluating():
            batches = (batch_of(99, number) for number in distributed.world().data.share(self.rows))
            for metrics in self.engine.map_batches(partial(self.pipeline.loss, self.models), batches):
                total += metrics[0]
        return float(distributed.sum_over_data(total))

    def weights(self) -> dict[str, np.ndarray]:
        return {name: weight.float().numpy().copy() for name, weight in self.engine.weights()}

    def checkpointer(self, folder: str) -> Checkpointer:
        return Checkpointer(Checkpoints(), Path(folder), self.engine, {}, {"a": 1})


def batch_of(step: int, number: int) -> Any:
    """A micro-batch of one row: short and long ones, of which some have little to learn from."""
    draw, length = np.random.default_rng(100 * step + number), 16 + 8 * (number % 3)
    sizes = [length + 1 - 2 * number] if number else [9, 8]
    return collate(
        [[Segment(draw.integers(0, VOCABULARY, size).astype(np.int64)) for size in sizes]], [number], length, 0
    )


@contextmanager
def session(number: int, layout: dict[str, Any]) -> Iterator[FSDP]:
    """The ``number``-th one of this process, of ranks that are laid out so."""
    # Each needs names of its own among the addresses that ranks leave.
    os.environ["TORCHELASTIC_RESTART_COUNT"] = str(number)
    strategy = FSDP(**layout)
    with distributed.session(timeout=120, replica=strategy.mesh.replica):
        yield strategy


Layouts = list[tuple[dict[str, Any], list[str]]]


def curves(layouts: Layouts) -> dict[str, Any]:
    """By layout and case: losses and norms, the loss of other rows, all weights, and this rank's own embedding."""
    results = {}
    for number, (layout, cases) in enumerate(layouts):
        with session(number, layout) as strategy:
            for case in cases:
                run = Trained(case, strategy)
                rows = run.steps(1, STEPS)
                table = run.engine.parameters.get("model.embed_tokens.weight")
                own = None if table is None else table.to_local().detach().float().numpy().copy()
                results[f"{layout}-{case}"] = np.array(rows), run.measured(), run.weights(), own
    return results


@pytest.fixture(scope="module")
def alone():
    """What a case gives on one rank."""

    @cache
    def of(case: str) -> tuple[np.ndarray, float, dict[str, np.ndarray]]:
        run = Trained(case, DDP())
        return np.array(run.steps(1, STEPS)), run.measured(), run.weights()

    return of


@pytest.mark.parametrize(
    ("ranks", "layouts"),
    [
        (2, [({"pipeline": 2}, ["tied", "lora"])]),
        pytest.param(
            4,
            [
                ({"pipeline": 2, "tensor": 2}, ["tied", "lora"]),
                ({"pipeline": 2, "sequence": 2}, ["tied"]),
                ({"pipeline": 4}, ["untied"]),
            ],
            marks=pytest.mark.slow,
        ),
    ],
)
def test_every_stage_gives_the_curve_and_the_weights_of_one_rank(ranks, layouts, alone):
    every = on_ranks(ranks, curves, layouts, joined=False)
    for layout, case in ((layout, case) for layout, cases in layouts for case in cases):
        rows, measured, weights = alone(case)
        of_ranks = [here[f"{layout}-{case}"] for here in every]
        first, value, tensors, _ = of_ranks[0]
        # float32 sums in another order, through 20 steps of Adam; a norm is of gradients, losses hardly notice them.
        np.testing.assert_allclose(first[:, 0], rows[:, 0], rtol=1e-5, err_msg=f"{layout} {case}")
        np.testing.assert_allclose(first[:, 1], rows[:, 1], rtol=1e-4, err_msg=f"{layout} {case}")
        assert value == pytest.approx(measured, rel=1e-5)
        assert list(tensors) == list(weights)
        assert max(float(np.abs(tensors[name] - weights[name]).max()) for name in weights) < 2e-4
        # Bitwise the same on all ranks, of whom some compute no loss.
        assert all(np.array_equal(theirs, first) and loss == value for theirs, loss, _, _ in of_ranks)
        assert all(np.array_equal(theirs[name], tensors[name]) for _, _, theirs, _ in of_ranks for name in tensors)
        if case == "tied":
            # Ranks of the first and of the second half are counterparts, and each has its part of the table.
            for rank, other in enumerate(range(ranks // 2, ranks)):
                assert of_ranks[rank][3].any()
                assert np.array_equal(of_ranks[rank][3], of_ranks[other][3])


def continued(folder: str) -> list[list[tuple[float, float]]]:
    """Steps 4 to 6: uninterrupted, continued in stages, continued there from one rank, and continued without stages.

    Last, in bfloat16: uninterrupted, and continued.
    """
    curves, low = [], []
    with session(0, {"pipeline": 2}) as strategy:
        with pytest.raises(
            InputError, match=r"no weight of stage 1 \(counted from 0\) is trained; let adapter.targets"
        ):
            Trained("first", strategy)
        run = Trained("tied", strategy)
        run.steps(1, 3)
        run.checkpointer(f"{folder}/staged").save(3)
        curves.append(run.steps(4, 6))
        for source in ("staged", "one"):
            run = Trained("tied", strategy)
            assert run.checkpointer(f"{folder}/{source}").restore() == 3
            curves.append(run.steps(4, 6))
        strategy.autocast = False
        run = Trained("tied", strategy, Compute.bf16)
        run.steps(1, 3)
        run.checkpointer(f"{folder}/low").save(3)
        low.append(run.steps(4, 6))
        run = Trained("tied", strategy, Compute.bf16)
        assert run.checkpointer(f"{folder}/low").restore() == 3
        low.append(run.steps(4, 6))
    with session(1, {}) as strategy:
        run = Trained("tied", strategy)
        assert run.checkpointer(f"{folder}/staged").restore() == 3
        curves.append(run.steps(4, 6))
    return [*curves, *low]


def test_a_checkpoint_of_stages_continues_anywhere_and_any_continues_on_stages(tmp_path):
    one = Trained("tied", DDP())
    one.steps(1, 3)
    one.checkpointer(str(tmp_path / "one")).save(3)
    expected = one.steps(4, 6)
    for uninterrupted, same, of_one, on_fsdp, *low in on_ranks(2, continued, str(tmp_path), joined=False):
        assert same == uninterrupted
        assert low[0] == low[1]
        for curve in (uninterrupted, of_one, on_fsdp):
            np.testing.assert_allclose(curve, expected, rtol=1e-5)  # float32 sums in another order
    again = Trained("tied", DDP())
    assert again.checkpointer(str(tmp_path / "staged")).restore() == 3
    np.testing.assert_allclose(again.steps(4, 6), expected, rtol=1e-5)


RUN = [*TINY, "steps=8", "checkpoint.every=3", "optimizer.lr=0.003", "schedule=constant", "batch.micro=2"]
STAGED = ["strategy=fsdp", "strategy.pipeline=2"]
SAMPLED = ["evaluation.samples=2", "evaluation.sample_tokens=5", "evaluation.temperature=0"]


def curve(run: Path) -> list[list[float]]:
    names = ("loss", "grad_norm", "eval/loss", "eval/bits_per_byte", "tokens")
    return [[line[name] for name in names if name in line] for line in metrics(run)]


def same_export(a: Path, b: Path) -> bool:
    first, second = (load_file(run / "export" / "model.safetensors") for run in (a, b))
    assert list(first) == list(second)
    return all(np.array_equal(first[name], second[name]) for name in first)


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """The run on one rank."""
    folder = tmp_path_factory.mktemp("one")
    Command(folder, "run_dir=run", *RUN, *SAMPLED).finish()
    return folder / "run"


def test_a_run_in_stages_logs_samples_and_exports_what_one_rank_does(one, tmp_path):
    Command(tmp_path, "run_dir=two", *RUN, *SAMPLED, *STAGED, ranks=2).finish()
    for ours, theirs in zip(curve(tmp_path / "two"), curve(one), strict=True):
        assert ours == pytest.approx(theirs, rel=5e-5)  # float32 sums in another order, through 8 steps of Adam
    # What is likeliest does not change with the last bits.
    assert (tmp_path / "two" / "samples.jsonl").read_text() == (one / "samples.jsonl").read_text()
    ours, theirs = (load_file(run / "export" / "model.safetensors") for run in (tmp_path / "two", one))
    assert list(ours) == list(theirs)
    assert max(float(np.abs(ours[name] - theirs[name]).max()) for name in theirs) < 1e-4


@pytest.mark.slow
def test_a_run_goes_from_fsdp_onto_stages_is_killed_there_and_ends_on_one_rank(one, tmp_path):
    never, once = ([*RUN, f"run_dir={name}"] for name in ("never", "once"))
    Command(tmp_path, *never, "strategy=fsdp", "steps=2", ranks=2).finish()
    shutil.copytree(tmp_path / "never", tmp_path / "once")
    staged = [*STAGED, "strategy.tensor=2", "steps=7"]
    Command(tmp_path, *never, *staged, ranks=4).finish()
    command = Command(tmp_path, *once, *staged, ranks=4)
    while not (tmp_path / "once" / "checkpoints" / folder_name(3)).exists():
        assert command.processes[0].poll() is None
        time.sleep(0.005)
    command.kill()
    assert "continuing after step" in Command(tmp_path, *once, *staged, ranks=4).finish()
    assert same_export(tmp_path / "once", tmp_path / "never")
    assert curve(tmp_path / "once") == curve(tmp_path / "never")
    Command(tmp_path, *once).finish()
    steps = [
        [(line["loss"], line["grad_norm"]) for line in metrics(run) if "loss" in line]
        for run in (tmp_path / "once", one)
    ]
    # Float32 sums in another order, through 8 steps of Adam; a norm is of gradients.
    np.testing.assert_allclose(*steps, rtol=5e-5)


@pytest.mark.slow
def test_a_rank_that_dies_within_the_schedule_ends_the_others(tmp_path):
    command = Command(tmp_path, "run_dir=run", *RUN, *STAGED, "steps=100000", "checkpoint.every=0", ranks=2)
    command.kill_one(tmp_path / "run")


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["pipeline=dpo"], "strategy.pipeline=2 passes a micro-batch through the model once, and this pipeline calls it"),
        (["batch.micro=8"], "is 1 of batch.micro=8 a replica; use batch.size=16 or batch.micro=4"),
        (["strategy.offload=parameters"], "strategy.pipeline=2 is not built to go with strategy.offload=parameters"),
    ],
)  # fmt: skip
def test_what_stages_cannot_do_is_refused_with_the_remedy(overrides, sentence, monkeypatch):
    monkeypatch.setattr(distributed, "ranks", lambda: 2)
    with pytest.raises(ConfigError) as refused:
        compose([*TINY, *STAGED, *overrides])
    assert sentence in str(refused.value)


def test_more_stages_than_layers_are_refused():
    assert list(validate_mesh(MeshShape(pipeline=4), small(), 64)) == [
        "strategy.pipeline=4 gives some ranks none of the 2 layers; use at most 2"
    ]


def test_layers_that_do_not_divide_are_said():
    assert list(mesh_remarks(MeshShape(pipeline=2), small())) == []
    [uneven] = mesh_remarks(
        MeshShape(pipeline=4), architecture_of(Model(**{**SHAPE, "num_hidden_layers": 5}), VOCABULARY)
    )
    assert uneven.startswith("strategy.pipeline=4 divides 5 layers unevenly, 1 or 2 a stage")
