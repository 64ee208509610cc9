"""What ZeRO must not change: generation between steps, frozen and tied weights, precision, construction, watching."""

import shutil
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.command import ROOT, TINY, Command, environment, metrics
from tests.ranks import free_port, on_ranks
from tests.shards import held
from tests.small_run import Net, Run, same
from trainer.batch import Documents
from trainer.functional import logprobs
from trainer.metrics import Metrics
from trainer.models.load import Model, ModelLoader
from trainer.optim import AdamW
from trainer.parallel import distributed
from trainer.parallel.ddp import DDP
from trainer.parallel.fsdp import FSDP
from trainer.parallel.precision import Compute, Precision
from trainer.parallel.watchdog import EXIT_CODE, DivergenceError, Watchdog, WatchdogSettings
from trainer.parallel.zero import Zero1, Zero2, Zero3

KINDS = {"ddp": DDP, "zero1": Zero1, "zero2": Zero2, "zero3": Zero3, "fsdp": FSDP}
STRATEGIES = list(KINDS)


NOTHING_PERSISTS = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}


def gathering(folder: str, strategy: str, gather: bool) -> tuple[dict, float]:
    """Train, look at whole weights with a different number of forwards on every rank, train on."""
    run = Run(Path(folder) / ("a" if gather else "b"), strategy=strategy)
    run.steps(1, 2)
    value = 0.0
    if gather:
        with run.engine.evaluating(), run.engine.gathered() as module:
            for _ in range(1 + 3 * distributed.world().rank):
                value = float(module(torch.arange(5)))
    run.steps(3, 4)
    return run.state(), value


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_whole_weights_are_there_for_unequal_numbers_of_forwards_and_training_goes_on_unchanged(strategy, tmp_path):
    both = on_ranks(2, gathering, str(tmp_path), strategy, True)
    plain = on_ranks(2, gathering, str(tmp_path), strategy, False)
    assert same(both[0][0], plain[0][0])
    assert both[0][1] == both[1][1]
    [(_, alone), *_] = on_ranks(1, gathering, str(tmp_path / "one"), "ddp", True)
    assert both[0][1] == pytest.approx(alone, rel=1e-5)


def shards(strategy_name: str) -> tuple[int, int]:
    """(elements of parameters that this rank holds, elements of the model)."""
    strategy = KINDS[strategy_name]()
    if isinstance(strategy, Zero3):
        strategy.deepspeed = NOTHING_PERSISTS
    with strategy.construction():
        net = Net(32)
        assert strategy_name == "zero2" or not any(p.numel() and not p.is_meta for p in net.parameters())
    strategy.place(net, (), Precision())
    return sum(held(p).numel() for p in net.parameters()), sum(
        getattr(p, "ds_numel", p.numel()) for p in net.parameters()
    )


def test_parameters_are_born_sharded_where_they_are_sharded():
    for strategy in ("zero3", "fsdp"):
        for here, whole in on_ranks(2, shards, strategy):
            assert (
                whole / 2 - 32 <= here <= whole / 2 + 32
            )  # a row of 32 more or less, of five tokens and three outputs
    for here, whole in on_ranks(2, shards, "zero2"):
        assert here == whole


def separate_rates(strategy_name: str) -> dict[str, np.ndarray]:
    """Two groups with base rates of their own: one of them 0, so its weights must stay."""

    class Two(AdamW):
        def build(self, module, shape_of=None):
            named = dict(module.named_parameters())
            rates = {"hidden.weight": 0.0}
            sets = [[named["hidden.weight"]], [p for n, p in named.items() if n not in rates and p.requires_grad]]
            made = [
                {"params": s, "lr": lr, "base_lr": lr, "weight_decay": 0.0}
                for s, lr in zip(sets, (0.0, 0.1), strict=True)
            ]
            return [torch.optim.AdamW(made, lr=0.1, fused=True)]

    strategy = KINDS[strategy_name]()
    with strategy.construction():
        net = Net()
    strategy.place(net, (), Precision())
    for number, p in enumerate(net.parameters()):
        strategy.fill(p, torch.randn(strategy.shape_of(p), generator=torch.Generator().manual_seed(number)))
    engine = strategy.wrap(net, Two(lr=0.1), Precision())
    before = {n: w.clone() for n, w in engine.weights()}
    for factor in (1.0, 0.5):
        engine.set_lr(factor)
        ids = distributed.world().data.share(torch.arange(4))
        engine.accumulate(lambda b, ids=ids: (engine.model(ids), Metrics()), [Unread()], torch.tensor(4.0))
        engine.step()
    return {n: (w - before[n]).numpy().copy() for n, w in engine.weights()}


def frozen(strategy_name: str) -> tuple[float, int]:
    """(what a frozen model computes, elements that this rank holds of it)."""
    strategy = KINDS[strategy_name]()
    if isinstance(strategy, Zero3):
        strategy.deepspeed = NOTHING_PERSISTS
    with strategy.construction():
        net = Net(32)
    strategy.place(net, (), Precision())
    for number, p in enumerate(net.parameters()):
        strategy.fill(p, torch.randn(strategy.shape_of(p), generator=torch.Generator().manual_seed(number)) / 6)
    model = strategy.freeze(net, Precision())
    with torch.no_grad():
        value = float(model(torch.arange(5)))
    assert not any(p.requires_grad for p in net.parameters())
    return value, sum(held(p).numel() for p in net.parameters())


@pytest.mark.parametrize("strategy", ["zero3", "fsdp"])
def test_a_frozen_model_computes_the_same_from_shards(strategy):
    [(expected, whole)] = on_ranks(1, frozen, "ddp")
    for value, here in on_ranks(2, frozen, strategy):
        assert value == pytest.approx(expected, rel=1e-6)
        assert here <= whole / 2 + 32


class Unread:
    def to(self, device: torch.device) -> "Unread":
        return self


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_parameter_groups_keep_their_own_rates_and_frozen_weights_stay(strategy):
    moved = on_ranks(2, separate_rates, strategy)[0]
    expected = separate_rates("ddp")
    assert not moved["hidden.weight"].any()
    assert not moved["frozen.weight"].any()
    for name, change in expected.items():
        np.testing.assert_allclose(moved[name], change, atol=1e-5)  # fp32 sums in another order, Adam's first steps


def low_precision(strategy_name: str, autocast: bool, compute: str) -> list[float]:
    precision = Precision(Compute(compute), initial_scale=256.0)
    strategy = DDP() if strategy_name == "ddp" else KINDS[strategy_name](autocast=autocast)
    with strategy.construction():
        net = Net(16)
    strategy.place(net, (net.hidden,), precision)
    for number, p in enumerate(net.parameters()):
        strategy.fill(p, torch.randn(strategy.shape_of(p), generator=torch.Generator().manual_seed(number)) / 4)
    engine = strategy.wrap(net, AdamW(lr=0.01), precision)
    losses = []
    for _ in range(15):
        metrics = Metrics()
        ids = distributed.world().data.share(torch.arange(4))

        def loss_of(_, ids=ids, metrics=metrics):
            loss = engine.model(ids).float()
            metrics.total("loss", loss)
            return loss, Metrics()

        engine.accumulate(loss_of, [Unread()], torch.tensor(4.0))
        assert bool(engine.step().applied)
        losses.append(float(metrics.reduced(distributed.stack_over_data)["loss"]))
    assert all(w.dtype is torch.float32 for _, w in engine.weights())
    return losses


@pytest.mark.parametrize(
    "strategy",
    [pytest.param("zero1", marks=pytest.mark.slow), "zero2", pytest.param("zero3", marks=pytest.mark.slow), "fsdp"],
)
@pytest.mark.parametrize(("autocast", "compute"), [(True, "bf16"), (False, "bf16"), (True, "fp16")])
def test_both_forms_of_low_precision_follow_ddp(strategy, autocast, compute):
    found = on_ranks(2, low_precision, strategy, autocast, compute)[0]
    reference = on_ranks(1, low_precision, "ddp", autocast, compute)[0]
    assert found[-1] < found[0]
    # bf16 weights round to 8 bits; under autocast only products do, and only the order of sums differs.
    np.testing.assert_allclose(found, reference, rtol=2e-3 if autocast else 5e-2, atol=2e-2)


RUN = [*TINY, "steps=12", "checkpoint.every=5", "optimizer.lr=0.003"]


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reference")
    Command(folder, "run_dir=run", *RUN).finish()
    return folder / "run"


def export_of(run: Path) -> dict[str, np.ndarray]:
    from safetensors.numpy import load_file

    return load_file(run / "export" / "model.safetensors")


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("strategy", ["zero1", "zero2", "zero3", "fsdp"])
def test_a_run_under_every_strategy_gives_the_same_curve_and_model(strategy, ranks, reference, tmp_path):
    Command(tmp_path, "run_dir=run", *RUN, f"strategy={strategy}", ranks=ranks).finish()
    for one, other in zip(metrics(reference), metrics(tmp_path / "run"), strict=True):
        for key in ("loss", "grad_norm", "eval/loss"):
            if key in one:
                assert other[key] == pytest.approx(one[key], rel=2e-5), (one["step"], key)  # G1, 12 steps of Adam
    ours, theirs = export_of(tmp_path / "run"), export_of(reference)
    assert ours.keys() == theirs.keys()
    assert max(float(np.abs(ours[n] - theirs[n]).max()) for n in theirs) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "offload"), [("zero2", "optimizer"), ("zero3", "parameters")])
def test_offloading_changes_neither_a_run_nor_its_continuation(strategy, offload, reference, tmp_path):
    run = [*RUN, f"strategy={strategy}", f"strategy.offload={offload}"]
    Command(tmp_path, "run_dir=run", *run, ranks=2).finish()
    (tmp_path / "run" / "checkpoints" / "latest").unlink()
    again = tmp_path / "again"
    shutil.copytree(tmp_path / "run", again, ignore=shutil.ignore_patterns("export", "step-00000012"))
    assert "continuing after step 10" in Command(tmp_path, "run_dir=again", *run, ranks=2).finish()
    for run_dir in (tmp_path / "run", again):
        ours, theirs = export_of(run_dir), export_of(reference)
        assert max(float(np.abs(ours[n] - theirs[n]).max()) for n in theirs) < 1e-4


def test_a_run_changes_ranks_and_strategy_thrice_and_stays_the_run(reference, tmp_path):
    constant = [*RUN, "schedule=constant"]
    Command(tmp_path, "run_dir=whole", *constant).finish()
    for steps, strategy, ranks in ((3, "zero3", 2), (6, "ddp", 1), (9, "zero3", 2), (12, "zero1", 2)):
        Command(tmp_path, "run_dir=run", *constant, f"steps={steps}", f"strategy={strategy}", ranks=ranks).finish()
    losses = [[line["loss"] for line in metrics(tmp_path / name) if "loss" in line] for name in ("whole", "run")]
    assert len(losses[1]) == 12
    np.testing.assert_allclose(losses[1], losses[0], rtol=2e-5)


def exported(folder: str, strategy: str) -> dict[str, bytes]:
    run = Run(Path(folder), strategy=strategy, seed=5)
    run.checkpointer.restore()
    return {name: w.detach().float().numpy().tobytes() for name, w in run.engine.weights()}


def first_save(folder: str) -> None:
    run = Run(Path(folder))
    run.steps(1, 2)
    run.checkpointer.save(2)


def test_of_one_checkpoint_every_strategy_exports_the_same_bytes(tmp_path):
    on_ranks(1, first_save, str(tmp_path))
    results = [on_ranks(2, exported, str(tmp_path), strategy)[0] for strategy in STRATEGIES]
    assert all(result == results[0] for result in results)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["strategy=zero2", "optimizer=muon"], "optimizer=muon needs whole matrices, and strategy=zero2 flattens them"),
        (["strategy=zero1", "strategy.offload=parameters"], "strategy.offload=parameters needs strategy=zero3"),
        (
            ["strategy=zero3", "+strategy.deepspeed={zero_optimization: {stage: 1}}"],
            "strategy.deepspeed.zero_optimization.stage contradicts Onecurve's own settings",
        ),
        (["strategy=zero2", "+strategy.deepspeed={gradient_clipping: 1}"], "deepspeed.gradient_clipping contradicts"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused_by_name(overrides, said, tmp_path):
    code, output = Command(tmp_path, "run_dir=run", *TINY, "steps=1", *overrides).fail()
    assert code == 2
    assert said in output


HANG = """
import torch, time
from trainer.parallel import distributed
from trainer.parallel.mesh import Mesh, MeshShape
from trainer.parallel.stages import StageLinks
from trainer.parallel.watchdog import Watchdog, WatchdogSettings
with distributed.session() as world, Watchdog(WatchdogSettings(seconds=3 + world.rank)) as watchdog:
    watchdog.step, links = 7, StageLinks(Mesh.of(MeshShape(pipeline=2)).pipeline)
    with watchdog.phase("forward_backward"):
        if world.rank == 0:
            links.receive_gradient(torch.ones(1))
        else:
            time.sleep(60)
"""


def test_an_exchange_that_hangs_ends_the_run_with_ranks_phase_step_and_stack():
    port, started = free_port(), time.monotonic()
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", HANG], env=environment(rank, 2, port), cwd=ROOT, stderr=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    said = [p.communicate(timeout=60)[1] for p in processes]
    assert [p.returncode for p in processes] == [EXIT_CODE, EXIT_CODE]
    assert time.monotonic() - started < 40
    where = "after step 7, phase forward_backward"
    assert f"rank 0, {where}, waiting for rank 1: no progress in 3 s (watchdog.seconds)" in said[0]
    assert "in receive_gradient" in said[0]
    assert f"rank 1, {where}: no progress in 4 s (watchdog.seconds)" in said[1]
    assert 'File "<string>", line 13' in said[1]


def test_a_rank_that_dies_ends_the_others_within_seconds(tmp_path):
    command = Command(tmp_path, "run_dir=run", *TINY, "steps=100000", "checkpoint.every=0", ranks=2)
    command.kill_one(tmp_path / "run")


def compared(folder: str, flip: bool) -> str:
    run = Run(Path(folder))
    run.steps(1, 1)
    if flip and distributed.world().rank == 1:
        parameter = next(run.engine.model.parameters()).detach()
        bits = parameter.view(torch.int32)
        bits[0, 0] ^= 1  # the last bit of one weight
    try:
        Watchdog(WatchdogSettings(digest_every=1)).done(1, run.engine)
    except DivergenceError as error:
        return str(error)
    return "equal"


def test_one_flipped_bit_on_one_rank_is_found(tmp_path):
    assert on_ranks(2, compared, str(tmp_path), False) == ["equal", "equal"]
    for said in on_ranks(2, compared, str(tmp_path), True):
        assert "after step 1 the weights of ranks 1 differ from those of rank 0" in said


def twins(strategy_name: str, compute: str, autocast: bool) -> tuple[list[float], list[float], int, int]:
    """Log-probabilities under a new model that is trained, and under its frozen twin; bytes of both on this rank."""
    strategy = DDP() if strategy_name == "ddp" else KINDS[strategy_name](autocast=autocast)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    precision = Precision(Compute(compute))
    load = ModelLoader(Model(**shape, num_key_value_heads=2, head_dim=8), strategy, 0, 50, precision=precision)
    engine = strategy.wrap(load.load(), AdamW(lr=0.01), precision)
    tokens = torch.arange(24)[None]
    read, documents = partial(logprobs, targets=tokens.roll(-1)), Documents.from_lengths((24,), 1)
    twin = load.frozen()
    with engine.evaluating():
        both = [model(tokens, documents, read)[0][0].tolist() for model in (engine.model, twin)]
    return both[0], both[1], *(sum(held(p).nbytes for p in m.parameters()) for m in (engine.module, twin))


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(("compute", "autocast"), [("fp32", True), ("bf16", True), ("bf16", False)])
def test_a_frozen_twin_of_a_new_policy_says_bit_for_bit_the_same_and_takes_no_more_memory(strategy, compute, autocast):
    for policy, twin, own, beside in on_ranks(2, twins, strategy, compute, autocast):
        assert policy == twin
        assert beside <= own


def test_bf16_weights_are_held_in_bf16_where_parameters_are_sharded():
    [(_, _, wide, _), _] = on_ranks(2, twins, "zero3", "bf16", True)
    [(_, _, narrow, _), _] = on_ranks(2, twins, "zero3", "bf16", False)
    assert narrow == wide / 2


BF16 = ["precision=bf16", "strategy.autocast=false"]
EIGHT_BIT = ["optimizer.state=8bit", "model.hidden_size=64", "model.intermediate_size=96"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "ranks", "narrow"),
    [(strategy, 2, BF16) for strategy in ("zero1", "zero2", "zero3", "fsdp")]
    + [("ddp", 1, EIGHT_BIT), ("zero2", 2, EIGHT_BIT), ("fsdp", 2, EIGHT_BIT)],
)
def test_a_killed_run_with_narrow_weights_or_moments_ends_with_the_same_bytes(strategy, ranks, narrow, tmp_path):
    if narrow == EIGHT_BIT:
        pytest.importorskip("bitsandbytes")
    low = [*RUN, *narrow, f"strategy={strategy}"]
    Command(tmp_path, "run_dir=whole", *low, ranks=ranks).finish()
    cut = Command(tmp_path, "run_dir=cut", *low, ranks=ranks)
    latest = tmp_path / "cut" / "checkpoints" / "latest"
    while not latest.exists() and cut.processes[0].poll() is None:
        time.sleep(0.01)
    cut.kill()
    again = Command(tmp_path, "run_dir=cut", *low, ranks=ranks).finish()
    assert "continuing after step" in again
    assert "untested optimizer" not in again
    whole, continued = export_of(tmp_path / "whole"), export_of(tmp_path / "cut")
    assert all(np.array_equal(whole[name], continued[name]) for name in whole)
