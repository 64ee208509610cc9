"""Reward models: learnt on every layout, opened by transformers with equal scores, normalised."""

import json

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from tests.chats import write_jsonl
from tests.command import Command, metrics, onecurve
from tests.layouts import covering, overrides
from tests.pipelines.test_dpo import PAIRS, QUIET, SMALL
from tests.pipelines.test_dpo import base as base

KINDS = {"full": [], "lora": ["adapter=lora", "adapter.rank=4"], "qlora": ["adapter=qlora", "adapter.rank=4"]}


def run(base, folder, *overrides, ranks=1) -> list[dict]:
    Command(
        folder, "pipeline=reward", "run_dir=run", f"model.path={base / 'run' / 'export'}", "data=preference",
        f"data.train=[{base}/preference_train.jsonl]", f"data.eval=[{base}/preference_held.jsonl]",
        f"data.cache={folder / 'cache'}", *QUIET, *SMALL, *overrides, ranks=ranks,
    ).finish()  # fmt: skip
    return metrics(folder / "run")


def weights(folder) -> dict[str, np.ndarray]:
    return load_file(folder / "run" / "export" / "model.safetensors")


@pytest.fixture(scope="module")
def reference(base, tmp_path_factory):
    made = {}

    def of(kind: str):
        if kind not in made:
            folder = tmp_path_factory.mktemp(kind)
            made[kind] = (run(base, folder, *KINDS[kind]), weights(folder), folder)
        return made[kind]

    return of


@pytest.mark.parametrize(
    ("kind", "ranks", "strategy"),
    covering(KINDS, [("full", (2, "zero3")), ("lora", (2, "zero3"))], meshes=[("full", (2, "fsdp tensor=2"))]),
)
def test_every_layout_gives_the_same_reward_model(kind, ranks, strategy, base, reference, tmp_path):
    found = run(base, tmp_path, *KINDS[kind], *overrides(strategy), ranks=ranks)
    lines, whole, folder = reference(kind)
    for one, other in zip(lines, found, strict=True):
        for key in ("loss", "grad_norm", "margin", "score/std", "score/min", "eval/loss", "eval/score/max"):
            if key in one:
                # G1: sums in another order through 8 steps of Adam.
                assert other[key] == pytest.approx(one[key], rel=1e-4, abs=2e-5), (one["step"], key)
    ours = weights(tmp_path)
    assert max(float(np.abs(ours[n] - whole[n]).max()) for n in whole) < 2e-4
    stored = [json.loads((f / "run" / "export" / "onecurve.json").read_text())["reward"] for f in (tmp_path, folder)]
    assert stored[0] == pytest.approx(stored[1], rel=1e-4, abs=1e-5)


@pytest.mark.slow
def test_a_reward_run_that_changes_ranks_and_strategy_stays_the_run(base, reference, tmp_path):
    for steps, strategy, ranks in ((3, "zero3", 2), (6, "ddp", 1), (8, "zero1", 2)):
        found = run(base, tmp_path, f"steps={steps}", f"strategy={strategy}", ranks=ranks)
    losses = [line["loss"] for line in found if "loss" in line]
    np.testing.assert_allclose(losses, [line["loss"] for line in reference("full")[0] if "loss" in line], rtol=1e-4)


def test_preferences_that_hold_for_all_are_learnt_by_a_reward_model(base, tmp_path):
    found = run(base, tmp_path, "steps=60", "optimizer.lr=0.003", "checkpoint.every=0", "pipeline.centering=0.01")
    assert found[-1]["eval/accuracy"] >= 0.97
    assert abs(found[-1]["eval/score/mean"]) < 1


def test_a_margin_in_the_data_is_asked_for(base, tmp_path):
    file = write_jsonl(tmp_path / "margins.jsonl", [{**p, "margin": 2.0} for p in PAIRS])
    losses = []
    for name in ("false", "true"):
        (tmp_path / name).mkdir()
        lines = run(base, tmp_path / name, "steps=1", f"data.train=[{file}]", f"pipeline.margin={name}")
        losses.append(lines[1]["loss"])
    # At nearly equal scores: log(1 + e^0) = 0.69 and log(1 + e^2) = 2.13.
    assert losses[1] - losses[0] == pytest.approx(np.log1p(np.exp(2)) - np.log(2), abs=0.2)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", ["full", pytest.param("lora", marks=pytest.mark.slow)])
def test_the_export_scores_equally_in_transformers_whatever_the_padding(kind, side, reference):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folder = reference(kind)[2] / "run" / "export"
    model, loading = AutoModelForSequenceClassification.from_pretrained(folder, output_loading_info=True)
    assert not any(loading[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side=side)
    rows = [{"prompt": p["prompt"], "completion": p[name]} for p in PAIRS[:3] for name in ("chosen", "rejected")]
    chats = [
        [{"role": "user", "content": r["prompt"]}, {"role": "assistant", "content": r["completion"]}] for r in rows
    ]
    texts = [tokenizer.apply_chat_template(c, tokenize=False).rstrip("\n") for c in chats]
    inputs = tokenizer([*texts, texts[0] * 3], return_tensors="pt", padding=True, add_special_tokens=False)
    with torch.no_grad():
        theirs = model(**inputs).logits[: len(rows), 0].tolist()
    write_jsonl(folder.parent / "answers.jsonl", rows)
    for raw in (True, False):
        code, out, errors = onecurve(folder.parent, "score", str(folder), "answers.jsonl", *["--raw"] * raw)
        assert code == 0, errors
        ours = [json.loads(line)["score"] for line in out.splitlines()]
        usual = {"mean": 0.0, "std": 1.0} if raw else json.loads((folder / "onecurve.json").read_text())["reward"]
        assert ours == pytest.approx([(t - usual["mean"]) / usual["std"] for t in theirs], abs=1e-4)


def test_a_model_without_a_score_is_refused_as_a_scorer(base):
    code, _, errors = onecurve(base, "score", "run/export", "train.jsonl")
    assert code == 2
    assert "has no score.weight, so it scores nothing; give an export of pipeline=reward" in errors
