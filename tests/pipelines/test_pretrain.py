"""Pretraining from the command line: the same curve again, on other ranks, and after being killed."""

import json
import random
import time

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.command import TINY, Command, metrics
from tests.layouts import needs_divided_experts

RUN = [*TINY, "steps=30", "checkpoint.every=4", "checkpoint.keep=3", "evaluation.every=10", "optimizer.lr=0.003"]
VOLATILE = ("tokens_per_second", "mfu", "memory_gb")


def curve(folder) -> list[dict]:
    """Metrics that depend on nothing but the computation."""
    return [
        {k: v for k, v in line.items() if k not in VOLATILE and not k.startswith(("time/", "straggler/"))}
        for line in metrics(folder)
    ]


def weights(folder) -> dict[str, np.ndarray]:
    return load_file(folder / "export" / "model.safetensors")


def same_bits(a, b) -> bool:
    first, second = weights(a), weights(b)
    assert first.keys() == second.keys()
    return all(np.array_equal(first[n], second[n]) for n in first)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run on one rank, as a user starts it."""
    folder = tmp_path_factory.mktemp("whole")
    Command(folder, "run_dir=run", *RUN, fresh=True).finish()
    return folder / "run"


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """The same run on two ranks."""
    folder = tmp_path_factory.mktemp("pair")
    Command(folder, "run_dir=run", *RUN, ranks=2).finish()
    return folder / "run"


def test_a_run_leaves_behind_what_the_documentation_says(whole):
    there = {p.name for p in whole.iterdir()}
    assert {"config.yaml", "metrics.jsonl", "checkpoints", "export"} <= there
    assert (whole / "checkpoints" / "latest").exists()
    lines = metrics(whole)
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 31))
    assert {"step", "loss", "lr", "grad_norm", "tokens", "tokens_per_second", "memory_gb"} <= set(lines[0])
    assert [line["step"] for line in lines if "eval/loss" in line] == [10, 20, 30]
    assert lines[-1]["eval/loss"] < lines[0]["loss"] - 1


def test_two_ranks_give_the_curve_of_one(whole, pair):
    for one, two in zip(curve(whole), curve(pair), strict=True):
        assert one.keys() == two.keys()
        for key in one:
            # fp32 sums in another order; 30 steps of Adam amplify the last bits (G1 states 1e-5 for a step).
            assert one[key] == pytest.approx(two[key], rel=2e-5, abs=1e-7), (one["step"], key)
    first, second = weights(whole), weights(pair)
    assert max(float(np.abs(first[n] - second[n]).max()) for n in first) < 1e-4


@pytest.mark.parametrize("ranks", [1, 2])
def test_killed_at_random_moments_and_run_again_ends_with_the_same_bits(ranks, whole, pair, tmp_path):
    draw = random.Random(ranks)
    kills = 0
    for _ in range(3):
        command = Command(tmp_path, "run_dir=run", *RUN, ranks=ranks)
        _wait_for_step(tmp_path / "run", draw.randint(3, 28), command)
        time.sleep(draw.random() * 0.05)
        if all(p.poll() is None for p in command.processes):
            kills += 1
        command.kill()
    Command(tmp_path, "run_dir=run", *RUN, ranks=ranks).finish()
    reference = whole if ranks == 1 else pair
    assert kills >= 1
    assert same_bits(tmp_path / "run", reference)
    assert curve(tmp_path / "run") == curve(reference)


def _wait_for_step(run, step: int, command: Command) -> None:
    """Until the run has logged ``step`` (of any attempt), or ended."""
    end = time.monotonic() + 120
    while time.monotonic() < end and all(p.poll() is None for p in command.processes):
        if (run / "metrics.jsonl").exists():
            lines = (run / "metrics.jsonl").read_text().splitlines()[-1:]
            if lines and lines[0].endswith("}") and json.loads(lines[0])["step"] >= step:
                return
        time.sleep(0.005)


@pytest.mark.parametrize(
    "strategy",
    [
        ["strategy=zero3"],
        pytest.param(["strategy=fsdp", "strategy.expert=2"], marks=[pytest.mark.slow, needs_divided_experts]),
    ],
    ids=["zero3", "divided"],
)
def test_experts_killed_on_two_ranks_end_with_the_same_bits_and_go_on_on_one(strategy, tmp_path):
    run = [*RUN, "model.family=mixtral", "model.experts=4", "schedule=constant", "run_dir=run"]
    pair, again = tmp_path / "pair", tmp_path / "again"
    for folder in (pair, again, tmp_path / "one"):
        folder.mkdir()
    Command(pair, *run, "steps=12", *strategy, ranks=2).finish()
    command = Command(again, *run, "steps=12", *strategy, ranks=2)
    _wait_for_step(again / "run", 6, command)
    assert all(p.poll() is None for p in command.processes)
    command.kill()
    Command(again, *run, "steps=12", *strategy, ranks=2).finish()
    assert same_bits(again / "run", pair / "run")
    assert curve(again / "run") == curve(pair / "run")
    # Begun on two ranks and in shards, killed there, finished on one: the run that never was anywhere else.
    Command(again, *run, "steps=24").finish()
    Command(tmp_path / "one", *run, "steps=24").finish()
    mixed, one = (metrics(folder / "run") for folder in (again, tmp_path / "one"))
    for key in ("loss", "router/load_max", "router/entropy"):
        values = [[line[key] for line in lines if key in line] for lines in (mixed, one)]
        assert len(values[0]) == len(values[1]) == 24
        np.testing.assert_allclose(values[0], values[1], rtol=1e-5)


def test_a_finished_run_started_again_changes_nothing(whole, tmp_path):
    before = {p: p.stat().st_mtime_ns for p in sorted((whole / "export").rglob("*"))}
    Command(whole.parent, "run_dir=run", *RUN).finish()
    assert {p: p.stat().st_mtime_ns for p in sorted((whole / "export").rglob("*"))} == before


def test_resume_never_and_new(whole):
    code, output = Command(whole.parent, "run_dir=run", *RUN, "resume=never").fail()
    assert code == 2
    assert "run_dir=run holds a run already and resume=never" in output
    Command(whole.parent, "run_dir=run", *RUN, "resume=new", "steps=2").finish()
    assert metrics(whole.parent / "run-2")[-1]["step"] == 2
    assert metrics(whole)[-1]["step"] == 30


def test_the_export_opens_in_transformers_with_nothing_missing_or_unexpected(whole):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, loading = AutoModelForCausalLM.from_pretrained(whole / "export", output_loading_info=True)
    assert not any(loading[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tokenizer = AutoTokenizer.from_pretrained(whole / "export")
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    prompt = tokenizer("Two friends.", return_tensors="pt")
    assert prompt["input_ids"][0, 0] == tokenizer.bos_token_id  # documents were trained behind it
    text = tokenizer.decode(model.generate(**prompt, max_new_tokens=4)[0], skip_special_tokens=True)
    assert text.startswith("Two friends.")


def test_an_export_is_continued_from(whole, tmp_path):
    shape = [o for o in RUN if o.startswith("model.")]
    run = [o for o in RUN if o not in shape]
    Command(tmp_path, f"model.path={whole / 'export'}", *run, "run_dir=next", "steps=1").finish()
    # The first loss of the next run is near the last of this one, not near log 512 = 6.2.
    assert metrics(tmp_path / "next")[0]["loss"] < metrics(whole)[-1]["eval/loss"] + 0.3
    code, said = Command(tmp_path, f"model.path={whole / 'export'}", *RUN, "run_dir=other").fail()
    assert code == 2
    assert "model.hidden_size has no effect beside model.path=" in said
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_low_precision_follows_the_curve_of_float32(precision, whole, tmp_path):
    if precision == "fp16":
        pytest.skip("float16 matrix products on CPU are too slow to train with; tests/distributed covers the scaler")
    Command(tmp_path, "run_dir=run", *RUN, f"precision={precision}").finish()
    for full, low in zip(metrics(whole), metrics(tmp_path / "run"), strict=True):
        if "loss" in full:
            # bf16 keeps 8 bits: products are off by 2**-9 each and errors average out over tokens.
            assert low["loss"] == pytest.approx(full["loss"], rel=1e-2)


def test_a_profile_is_written_for_the_steps_asked_for(tmp_path):
    Command(tmp_path, "run_dir=run", *TINY, "steps=3", "profile.steps=2-3").finish()
    there = sorted(p.name for p in (tmp_path / "run" / "profile").iterdir())
    assert there == ["rank-00000-steps-2-3.operations.txt", "rank-00000-steps-2-3.trace.json.gz"]
    assert "aten::mm" in (tmp_path / "run" / "profile" / there[0]).read_text()


def test_every_source_is_measured_by_itself_and_together(tmp_path):
    rows = {"a": ["Ada paints red drums."] * 3, "b": ["Ben sells blue kites in Rome and Oslo."] * 2}
    for name, texts in rows.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    text = [o for o in TINY if not o.startswith("data.")]
    export = tmp_path / "first" / "export"
    Command(tmp_path, "run_dir=first", *TINY, "steps=1").finish()
    Command(
        tmp_path, "run_dir=run", *text, "data=text", "data.train=[a.jsonl]", "data.eval=[a.jsonl,b.jsonl]",
        f"tokenizer.path={export}", "steps=2",
    ).finish()  # fmt: skip
    found = metrics(tmp_path / "run")[-1]
    sizes = {name: sum(len(t.encode()) for t in texts) for name, texts in rows.items()}
    bits = {name: found[f"eval/{name}/bits_per_byte"] * sizes[name] for name in rows}
    assert found["eval/bits_per_byte"] == pytest.approx(sum(bits.values()) / sum(sizes.values()), rel=1e-6)
