"""What preference training reaches, against starts and optima that are known."""

import math
import os
from pathlib import Path

import pytest

from tests.command import ROOT, Command, metrics
from trainer.cli import main

QUIET = ["tracking.wandb.mode=disabled", "tracking.tensorboard=false", "evaluation.samples=0", "checkpoint.every=0"]
DATA = Path(os.environ.get("ONECURVE_DATA", ROOT.parent / "shared" / "data")) / "preference"
needs_data = pytest.mark.skipif(not DATA.exists(), reason="needs real preferences (ONECURVE_DATA)")


@pytest.fixture(scope="module")
def quartz(tmp_path_factory):
    """Pairs to learn from and 500 held out, none of which has a near-equal prompt among the others."""
    folder = tmp_path_factory.mktemp("quartz")
    files = [folder / "train.jsonl", folder / "held.jsonl"]
    assert main(["split", *map(str, [DATA / "quartz_pairs.jsonl", *files, "--held", 500])]) == 0
    assert len(files[1].read_text().splitlines()) >= 500
    return [f"data.train=[{files[0]}]", f"data.eval=[{files[1]}]"]


@pytest.mark.slow
@needs_data
def test_a_run_on_real_chats_begins_at_the_logarithm_of_two_with_rewards_of_zero(smollm2, tmp_path):
    Command(
        tmp_path, "experiment=dpo", "run_dir=run", f"model.path={smollm2}", f"data.train=[{DATA}/dpo_en_demo.jsonl]",
        "pipeline.reference=model", "precision=fp32", "batch.size=4", "batch.micro=2", "batch.length=256", "steps=1",
        "epochs=null", "schedule.warmup=0", *QUIET,
    ).finish(timeout=500)  # fmt: skip
    [first] = [line for line in metrics(tmp_path / "run") if "loss" in line]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert [first[f"rewards/{name}"] for name in ("chosen", "rejected", "margin", "accuracy")] == [0, 0, 0, 0]


@pytest.mark.slow
@needs_data
@pytest.mark.timeout(1500)
def test_preference_optimisation_orders_ten_points_more_of_the_real_pairs_it_never_saw(smollm2, quartz, tmp_path):
    run = ["experiment=dpo_quartz", "run_dir=run", f"model.path={smollm2}", *quartz, "batch.micro=16", *QUIET]
    Command(tmp_path, *run, ranks=2).finish(timeout=1400)
    first, last = (metrics(tmp_path / "run")[n] for n in (0, -1))
    assert first["eval/loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert last["eval/logps/accuracy"] >= first["eval/logps/accuracy"] + 0.1


@pytest.mark.slow
@needs_data
@pytest.mark.skipif("ONECURVE_LONG" not in os.environ, reason="seven minutes; ONECURVE_LONG=1 runs it")
@pytest.mark.timeout(1500)
def test_a_reward_model_orders_ten_points_more_of_the_real_pairs_it_never_saw(smollm2, quartz, tmp_path):
    run = ["experiment=reward_quartz", "run_dir=run", f"model.path={smollm2}", *quartz, "batch.micro=16", *QUIET]
    Command(tmp_path, *run, ranks=2).finish(timeout=1400)
    # Before, 0.488 of the held-out pairs have the higher log-probability on the chosen side (the run above measures it).
    assert metrics(tmp_path / "run")[-1]["eval/accuracy"] >= 0.588
