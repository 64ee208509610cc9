"""The scripts around fine-tuning, as a user runs them."""

import json
import subprocess
import sys

import pytest

from tests.chats import write_jsonl
from tests.command import ROOT, TINY, Command, environment
from tests.endpoint import serving


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A small tuned model with a chat template."""
    folder = tmp_path_factory.mktemp("model")
    Command(folder, "run_dir=base", *TINY, "steps=2").finish()
    write_jsonl(folder / "chats.jsonl", [{"prompt": "Who paints?", "completion": "Ada does."}] * 4)
    Command(
        folder, "pipeline=sft", "model.path=base/export", "data=chat", "data.train=[chats.jsonl]", "data.template=chatml",
        "batch.length=64", "batch.size=1", "batch.micro=1", "steps=60", "optimizer.lr=0.01", "run_dir=run",
        "tracking.wandb.mode=disabled", "tracking.tensorboard=false",
    ).finish()  # fmt: skip
    return folder


def script(model, name: str, *arguments: str, said: str = "") -> str:
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / name, *arguments],
        cwd=model, env=environment(), input=said, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_tuned_model_answers_in_the_terminal_and_forgets_on_request(model):
    said = script(
        model,
        "chat.py",
        "run/export",
        "--temperature",
        "0",
        "--tokens",
        "20",
        said="Who paints?\n/clear\nWho paints?\n",
    )
    assert said.splitlines()[:2] == ["Ada does.", "Ada does."]


def test_a_preview_shows_what_is_learnt_and_where_documents_end(model):
    said = script(
        model, "preview.py", "pipeline=sft", "model.path=base/export", "data=chat", "data.train=[chats.jsonl]",
        "data.template=chatml", "batch.length=64", "--rows", "1",
    )  # fmt: skip
    assert "4 conversations (prompt and completion)" in said
    row = "<|im_start|> user\nWho paints?<|im_end|>\n<|im_start|> assistant\n⟦Ada does.<|im_end|>⟧\n┃"
    assert row.replace(" ", "") in said.replace(" ", "")


@pytest.fixture(scope="module")
def reward(model):
    """A small reward model that likes what ends in "does."."""
    rows = [{"prompt": f"Who {verb}?", "chosen": "Ada does.", "rejected": "Nobody"} for verb in ("paints", "sings")]
    write_jsonl(model / "pairs.jsonl", rows)
    Command(
        model, "pipeline=reward", "model.path=base/export", "data=preference", "data.train=[pairs.jsonl]",
        "data.template=chatml", "batch.length=64", "batch.size=2", "batch.micro=2", "steps=20", "optimizer.lr=0.01",
        "run_dir=reward", "tracking.wandb.mode=disabled", "tracking.tensorboard=false", "evaluation.samples=0",
    ).finish()  # fmt: skip
    return model / "reward" / "export"


LABEL = ["label_preferences.py", "run/export", "prompts.jsonl"]
PROMPTS = [{"prompt": f"Who {verb}?"} for verb in ("paints", "sings", "runs")]
SHORT = ["--tokens", "12", "--temperature", "3", "--seed", "1"]


def pairs_in(file) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_a_reward_model_labels_preferences_and_a_second_start_goes_on(model, reward):
    write_jsonl(model / "prompts.jsonl", PROMPTS[:2])
    script(model, *LABEL, "scored.jsonl", "--reward", str(reward), *SHORT)
    first = pairs_in(model / "scored.jsonl")
    assert [row["prompt"][0]["content"] for row in first] == ["Who paints?", "Who sings?"]
    assert all(row["score_chosen"] > row["score_rejected"] for row in first)
    write_jsonl(
        model / "again.jsonl",
        [{**row, "messages": row["prompt"] + row[side]} for row in first for side in ("chosen", "rejected")],
    )
    again = [json.loads(line)["score"] for line in script(model, "score.py", str(reward), "again.jsonl").splitlines()]
    # The labels are the scores that the model gives to the same answers alone.
    expected = [row[side] for row in first for side in ("score_chosen", "score_rejected")]
    assert again == pytest.approx(expected, abs=1e-4)
    write_jsonl(model / "prompts.jsonl", PROMPTS)
    script(model, *LABEL, "scored.jsonl", "--reward", str(reward), *SHORT, "--together", "1")
    second = pairs_in(model / "scored.jsonl")
    assert second[:2] == first
    assert [row["number"] for row in second] == [0, 1, 2]
    script(model, *LABEL, "whole.jsonl", "--reward", str(reward), *SHORT)
    # What is drawn depends on the prompt's number, not on what is answered together.
    assert [row["chosen"] for row in pairs_in(model / "whole.jsonl")] == [row["chosen"] for row in second]


def test_a_judge_labels_preferences(model):
    def reply(question, before):
        first, second = question.split("[Answer A]\n")[1].split("\n\n[Answer B]\n")
        return 200, "[[A]]" if (len(first), first) > (len(second), second) else "[[B]]"

    write_jsonl(model / "prompts.jsonl", PROMPTS)
    with serving(reply) as (url, seen):
        script(model, *LABEL, "judged.jsonl", "--judge", url, "--judge-model", "long", *SHORT)
    rows = pairs_in(model / "judged.jsonl")
    assert len(rows) == 3
    assert len(seen) == 6
    for row in rows:
        chosen, rejected = row["chosen"][0]["content"], row["rejected"][0]["content"]
        assert (len(chosen), chosen) > (len(rejected), rejected)
        assert row["judge"] == "long"


def test_a_split_keeps_prompts_that_are_nearly_equal_on_one_side(tmp_path):
    # Six twins that share five of nine words or more, one prompt apart, and a chain whose ends share two of six.
    twins = [
        f"Which {what} grows faster in {where} soil?" for what in ("oak", "fig", "elm") for where in ("wet", "dry")
    ]
    chain = ["red blue green gold", "green gold pink grey", "blue green gold pink"]
    rows = [{"prompt": p, "chosen": "a", "rejected": "b"} for p in [*twins, "Name a colour", *chain]]
    write_jsonl(tmp_path / "pairs.jsonl", rows)
    for seed in range(4):
        files = [f"train-{seed}.jsonl", f"held-{seed}.jsonl"]
        said = script(tmp_path, "split_preferences.py", "pairs.jsonl", *files, "--held", "2", "--seed", str(seed))
        train, held = ([json.loads(line) for line in (tmp_path / f).read_text().splitlines()] for f in files)
        assert said == f"{len(train)} rows to learn from, {len(held)} held out\n"
        assert len(held) >= 2
        assert [row for row in rows if row in train or row in held] == rows
        assert len(train) + len(held) == 10
        for alike in (twins, chain):
            assert len({row in held for row in rows if row["prompt"] in alike}) == 1
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "split_preferences.py", "pairs.jsonl", *files],
        cwd=tmp_path, env=environment(), capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 1
    assert "would be overwritten" in done.stderr
