"""Preference optimisation from the command line: ln 2 at first, the same run on every layout and with every reference."""

import itertools
import json
import math

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.chats import write_jsonl
from tests.command import TINY, Command, metrics
from tests.layouts import covering, overrides
from trainer.compose import compose
from trainer.config import ConfigError

QUIET = ["tracking.wandb.mode=disabled", "tracking.tensorboard=false", "data.template=chatml"]
COLOURS = ["red", "blue", "green", "gold", "black", "white"]
PAIRS = [
    {"prompt": f"Is it {a} or {b}?", "chosen": f"It is {a}.", "rejected": f"Sum: {b}."}
    for a, b in itertools.permutations(COLOURS, 2)
]
SMALL = ["batch.size=8", "batch.micro=2", "batch.length=48", "steps=8", "checkpoint.every=4", "schedule=constant",
         "optimizer.lr=0.001", "evaluation.first=true", "evaluation.samples=0"]  # fmt: skip
KTO = "pipeline=kto"
KINDS = {
    "precomputed": ["pipeline.reference=precomputed"],
    "adapters_off": ["pipeline.reference=adapters_off", "adapter=lora", "adapter.rank=4"],
    "kto": [KTO],
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A small pretrained model, and preferences."""
    folder = tmp_path_factory.mktemp("base")
    Command(folder, "run_dir=run", *TINY, "steps=30", "optimizer.lr=0.003").finish()
    for name, pairs in (("train", PAIRS[::2]), ("held", PAIRS[1::2])):
        write_jsonl(folder / f"preference_{name}.jsonl", pairs)
        write_jsonl(folder / f"labelled_{name}.jsonl", [row for pair in pairs for row in labelled(pair)])
    return folder


def run(base, folder, *overrides, ranks=1) -> list[dict]:
    data, pipeline = ("labelled", []) if KTO in overrides else ("preference", ["pipeline=dpo"])
    Command(
        folder, *pipeline, "run_dir=run", f"model.path={base / 'run' / 'export'}", f"data={data}",
        f"data.train=[{base}/{data}_train.jsonl]", f"data.eval=[{base}/{data}_held.jsonl]",
        f"data.cache={folder / 'cache'}", *QUIET, *SMALL, *overrides, ranks=ranks,
    ).finish()  # fmt: skip
    return metrics(folder / "run")


def labelled(pair: dict) -> list[dict]:
    sides = (("chosen", True), ("rejected", False))
    return [{"prompt": pair["prompt"], "completion": pair[side], "label": label} for side, label in sides]


def weights(folder) -> dict[str, np.ndarray]:
    return load_file(folder / "run" / "export" / "model.safetensors")


@pytest.fixture(scope="module")
def reference(base, tmp_path_factory):
    made = {}

    def of(kind: str):
        if kind not in made:
            folder = tmp_path_factory.mktemp(kind)
            made[kind] = (run(base, folder, *KINDS[kind]), weights(folder))
        return made[kind]

    return of


def compare(found, whole, expected, folder) -> None:
    for one, other in zip(expected, found, strict=True):
        for key in ("kl", "loss", "grad_norm", "logps/chosen", "rewards/margin", "eval/loss", "eval/rewards/margin"):
            if key in one:
                # G1: sums in another order through 8 steps of Adam; margins are differences of sums of some 30 nats.
                assert other[key] == pytest.approx(one[key], rel=1e-4, abs=2e-5), (one["step"], key)
    ours = weights(folder)
    assert max(float(np.abs(ours[n] - whole[n]).max()) for n in whole) < 2e-4


@pytest.mark.parametrize(
    ("kind", "ranks", "strategy"),
    covering(
        KINDS, [("adapters_off", (2, "zero3")), ("kto", (2, "zero3"))], meshes=[("adapters_off", (2, "fsdp tensor=2"))]
    ),
)
def test_every_layout_gives_the_same_run(kind, ranks, strategy, base, reference, tmp_path):
    found = run(base, tmp_path, *KINDS[kind], *overrides(strategy), ranks=ranks)
    compare(found, reference(kind)[1], reference(kind)[0], tmp_path)


def test_a_run_that_changes_ranks_and_strategy_stays_the_run(base, reference, tmp_path):
    for steps, strategy, ranks in ((3, "zero3", 2), (6, "ddp", 1), (8, "zero2", 2)):
        found = run(base, tmp_path, *KINDS["precomputed"], f"steps={steps}", f"strategy={strategy}", ranks=ranks)
    losses = [line["loss"] for line in found if "loss" in line]
    np.testing.assert_allclose(
        losses, [line["loss"] for line in reference("precomputed")[0] if "loss" in line], rtol=1e-4
    )


def test_the_loss_over_labelled_answers_does_not_depend_on_the_split(base, reference, tmp_path):
    # z0 is one for the step: were it taken by micro-batch, the loss would change from the second step on.
    found = run(base, tmp_path, KTO, "batch.micro=8", "checkpoint.every=0")
    compare(found, reference("kto")[1], reference("kto")[0], tmp_path)
    assert max(line.get("kl", 0) for line in found) > 1e-3


def test_an_evaluation_keeps_margins_and_shows_the_largest_errors(base, reference, tmp_path):
    found = run(base, tmp_path, "evaluation.errors=2")
    histogram = [json.loads(line) for line in (tmp_path / "run" / "histograms.jsonl").read_text().splitlines()][-1]
    assert histogram["name"] == "eval/rewards/margin"
    assert sum(histogram["counts"]) == len(PAIRS[1::2])
    assert histogram["edges"][0] <= found[-1]["eval/rewards/margin"] <= histogram["edges"][-1]
    errors = [json.loads(line) for line in (tmp_path / "run" / "errors.jsonl").read_text().splitlines()][-2:]
    for error in errors:
        pair = PAIRS[1::2][error["row"]]
        assert pair["prompt"] in error["prompt"]
        assert (error["completion"], error["rejected"]) == (pair["chosen"], pair["rejected"])
    assert errors[0]["rewards/margin"] <= errors[1]["rewards/margin"]
    assert errors[0]["rewards/margin"] == pytest.approx(histogram["edges"][0])


@pytest.mark.parametrize("live", ["model", "adapters_off"])
def test_at_the_first_step_a_live_reference_costs_the_logarithm_of_two_and_rewards_are_zero(live, base, tmp_path):
    adapter = ["adapter=lora"] if live == "adapters_off" else []
    lines = run(base, tmp_path, f"pipeline.reference={live}", *adapter, "steps=1")
    for first, prefix in ((lines[0], "eval/"), (lines[1], "")):
        assert first[f"{prefix}loss"] == pytest.approx(math.log(2), abs=1e-6)
        for name in ("chosen", "rejected", "margin", "accuracy"):
            assert first[f"{prefix}rewards/{name}"] == 0


@pytest.mark.slow
def test_a_precomputed_reference_gives_the_run_of_a_live_one(base, reference, tmp_path):
    found = run(base, tmp_path, "pipeline.reference=model")
    compare(found, reference("precomputed")[1], reference("precomputed")[0], tmp_path)


@pytest.mark.slow
def test_separate_prompts_give_the_run_of_shared_ones(base, reference, tmp_path):
    found = run(base, tmp_path, *KINDS["precomputed"], "data.share_prompt=false")
    compare(found, reference("precomputed")[1], reference("precomputed")[0], tmp_path)


@pytest.mark.parametrize(
    "loss_type",
    ["kto", *(pytest.param(name, marks=pytest.mark.slow) for name in ("orpo", "robust", "hinge", "ipo", "simpo"))],
)
def test_every_loss_raises_the_margin_of_what_was_chosen(loss_type, base, tmp_path):
    smoothing = ["pipeline.label_smoothing=0.1"] if loss_type == "robust" else []
    loss = KTO if loss_type == "kto" else f"pipeline.loss_type={loss_type}"
    found = run(base, tmp_path, loss, *smoothing, "steps=30", "checkpoint.every=0")
    margins = [line["rewards/margin"] for line in found if "rewards/margin" in line]
    assert np.mean(margins[-5:]) > np.mean(margins[:3])


def test_preferences_that_hold_for_all_are_learnt(base, tmp_path):
    found = run(base, tmp_path, "pipeline.reference=model", "steps=60", "optimizer.lr=0.003", "checkpoint.every=0")
    assert found[0]["eval/rewards/accuracy"] == 0  # equal rewards count as wrong
    assert (
        found[-1]["eval/rewards/accuracy"] >= 0.8
    )  # which colour came first, on 15 pairs of colours not seen together


def test_the_reference_is_computed_once(base, tmp_path):
    run(base, tmp_path, *KINDS["precomputed"], "steps=2")
    kept = {file: file.stat().st_mtime_ns for file in (tmp_path / "cache" / "references").iterdir()}
    assert len(kept) == 2
    run(base, tmp_path, *KINDS["precomputed"], "steps=4")
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "cache" / "references").iterdir()} == kept


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (["pipeline.loss_type=dpo"], "pipeline.loss_type=dpo is not one of sigmoid, robust"),
        (["pipeline.loss_type=ipo", "pipeline.label_smoothing=0.1"], "pipeline.label_smoothing is not used by"),
        (["pipeline.reference=adapters_off"], "pipeline.reference=adapters_off needs adapter=lora"),
        (["data=tinyworld"], "the pipeline learns from preference pairs and the data holds packed rows"),
    ],
)
def test_what_cannot_work_is_refused(overrides, problem, tmp_path):
    write_jsonl(tmp_path / "pairs.jsonl", PAIRS)
    data = [] if overrides == ["data=tinyworld"] else ["data=preference", f"data.train=[{tmp_path / 'pairs.jsonl'}]"]
    with pytest.raises(ConfigError) as refused:
        compose(["pipeline=dpo", *data, "steps=1", *overrides])
    assert problem in str(refused.value)
