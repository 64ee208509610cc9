"""What pretraining reaches, against optima that are known."""

import gzip
import json
import lzma
import math
import os
from pathlib import Path

import pytest
import yaml

from tests.command import ROOT, Command, metrics, onecurve

QUIET = ["tracking.wandb.mode=disabled", "tracking.tensorboard=false", "evaluation.samples=0"]
AUSTEN = Path(os.environ.get("ONECURVE_DATA", ROOT.parent / "shared" / "data")) / "pretrain" / "austen.jsonl.gz"


def excess(run: Path) -> float:
    """How far the held-out loss is above the entropy of the language, as a part of it."""
    floor = yaml.safe_load((run / "config.yaml").read_text())["facts"]["floors"]["eval/loss"]
    return metrics(run)[-1]["eval/loss"] / floor - 1


def test_a_hundred_and_twenty_steps_bring_tiny_world_within_a_fifth_of_its_entropy(tmp_path):
    Command(tmp_path, "experiment=tinyworld", "run_dir=run", "steps=120", "evaluation.every=0", *QUIET).finish()
    # A 4-gram model stays a quarter above; an untrained model is at log 512 = 6.2 nats, seven times the floor.
    assert 0 < excess(tmp_path / "run") < 0.2


@pytest.mark.slow
@pytest.mark.skipif(not AUSTEN.exists(), reason="needs Jane Austen's novels (ONECURVE_DATA)")
@pytest.mark.timeout(1800)
def test_a_novel_costs_fewer_bits_than_xz_needs_for_it(tmp_path):
    novels = [json.loads(line) for line in gzip.decompress(AUSTEN.read_bytes()).splitlines()]
    held = next(n for n in novels if n["id"] == "pride-and-prejudice")
    rest = [n for n in novels if n is not held]
    for name, rows in (("train", rest), ("heldout", [held])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": n["text"]}) + "\n" for n in rows))
    code, _, errors = onecurve(tmp_path, "tokenize", "tokenizer", "train.jsonl", "--vocab-size", "2048")
    assert code == 0, errors
    data = ["data.train=[train.jsonl]", "data.eval=[heldout.jsonl]", "tokenizer.path=tokenizer"]
    # A quarter of the experiment's steps, without an evaluation on the way.
    short = ["steps=150", "evaluation.every=0"]
    Command(tmp_path, "experiment=text", "run_dir=run", *data, *short, *QUIET, ranks=2).finish(timeout=1500)
    text = held["text"].encode()
    compressed = 8 * len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)) / len(text)
    assert metrics(tmp_path / "run")[-1]["eval/bits_per_byte"] < compressed
    assert math.isfinite(metrics(tmp_path / "run")[-1]["eval/loss"])
