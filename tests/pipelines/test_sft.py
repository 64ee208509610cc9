"""Fine-tuning from the command line: the same curve on every layout, resumed anywhere, adapters included; answers end."""

import json
import re
import time

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.chats import write_jsonl
from tests.command import TINY, Command, metrics
from tests.layouts import covering, overrides
from tests.unit.data.test_turns import THINKING

QUIET = ["tracking.wandb.mode=disabled", "tracking.tensorboard=false", "data=chat", "data.template=chatml"]
PAINTERS = {"red": "Ada", "blue": "Ben", "green": "Cleo", "gold": "Dan", "black": "Eve", "white": "Finn"}
ASKED = ["Who paints {} drums?", "{} drums: who paints them?", "Who paints it, if it is {}?", "Say who paints {}."]
CHATS = [{"prompt": q.format(colour), "completion": f"{who} does."} for q in ASKED for colour, who in PAINTERS.items()]
SMALL = ["batch.size=8", "batch.micro=2", "batch.length=64", "steps=8", "checkpoint.every=4", "schedule=constant",
         "evaluation.answers=6", "evaluation.sample_tokens=6", "evaluation.temperature=0"]  # fmt: skip
LORA = ["adapter=lora", "adapter.rank=4", "adapter.dropout=0.2", "optimizer.lr=0.003"]
KINDS = {
    "full": ["optimizer.lr=0.003"],
    # Each conversation is two samples, whose common beginning is computed once.
    "qlora": ["adapter=qlora", *LORA[1:]],
    "lora": [*LORA, "data.train=[BASE/reasoned.jsonl]", "data.template=BASE/thinking.jinja", "batch.length=128"],
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A small pretrained model, and chats to tune it on."""
    folder = tmp_path_factory.mktemp("base")
    Command(folder, "run_dir=run", *TINY, "steps=30", "optimizer.lr=0.003").finish()
    write_jsonl(folder / "train.jsonl", CHATS)
    write_jsonl(folder / "held.jsonl", [{**c, "ideal": c["completion"]} for c in CHATS[::2]])
    write_jsonl(folder / "reasoned.jsonl", [{"messages": reasoned(c, d)} for c in PAINTERS for d in PAINTERS if c < d])
    (folder / "thinking.jinja").write_text(THINKING)
    return folder


def reasoned(*colours) -> list[dict]:
    """A turn for each colour, with reasoning."""
    asked = [{"role": "user", "content": f"{colour} drums: who?"} for colour in colours]
    answers = [
        {"role": "assistant", "content": f"{who} does.", "reasoning": f"It is {who}."}
        for who in map(PAINTERS.get, colours)
    ]
    return [message for turn in zip(asked, answers, strict=True) for message in turn]


def begun(base, folder, *overrides, ranks=1) -> Command:
    return Command(
        folder, "pipeline=sft", "run_dir=run", f"model.path={base / 'run' / 'export'}", f"data.train=[{base}/train.jsonl]",
        f"data.eval=[{base}/held.jsonl]", *QUIET, *SMALL,
        *(word.replace("BASE", str(base)) for word in overrides), ranks=ranks,
    )  # fmt: skip


def tuned(base, folder, *overrides, ranks=1) -> list[dict]:
    log = begun(base, folder, *overrides, ranks=ranks).finish()
    assert ("more in beginnings that are computed once" in log) == any("reasoned" in word for word in overrides)
    return metrics(folder / "run")


def weights(folder) -> dict[str, np.ndarray]:
    return load_file(folder / "run" / "export" / "model.safetensors")


@pytest.fixture(scope="module")
def reference(base, tmp_path_factory):
    made = {}

    def of(kind: str):
        if kind not in made:
            folder = tmp_path_factory.mktemp(kind)
            made[kind] = (tuned(base, folder, *KINDS[kind]), weights(folder), folder)
        return made[kind]

    return of


def compare(found, folder, reference) -> None:
    lines, whole, _ = reference
    for one, other in zip(lines, found, strict=True):
        for key in ("loss", "grad_norm", "eval/loss", "eval/token_accuracy"):
            if key in one:
                # G1: sums in another order, through 8 steps of Adam.
                rel = 1e-5 if key == "loss" else 5e-5
                assert other[key] == pytest.approx(one[key], rel=rel), (one["step"], key)
    assert found[-1]["eval/ended"] == lines[-1]["eval/ended"]
    answers = [(f / "run" / "samples.jsonl").read_text() for f in (folder, reference[2])]
    assert answers[0] == answers[1]
    ours = weights(folder)
    assert ours.keys() == whole.keys()
    assert max(float(np.abs(ours[n] - whole[n]).max()) for n in whole) < 1e-4


@pytest.mark.parametrize(
    ("kind", "ranks", "strategy"),
    covering(
        KINDS, [("full", (2, "ddp")), ("full", (2, "zero3")), ("lora", (2, "zero3"))], [("lora", (2, "fsdp tensor=2"))]
    ),
)
def test_every_layout_tunes_to_the_same_model(kind, ranks, strategy, base, reference, tmp_path):
    found = tuned(base, tmp_path, *KINDS[kind], *overrides(strategy), ranks=ranks)
    compare(found, tmp_path, reference(kind))


@pytest.mark.parametrize("kind", [pytest.param("full", marks=pytest.mark.slow), "lora"])
def test_a_run_that_changes_ranks_and_strategy_stays_the_run(kind, base, reference, tmp_path):
    for steps, strategy, ranks in ((3, "zero3", 2), (6, "ddp", 1), (8, "zero2", 2)):
        found = tuned(base, tmp_path, *KINDS[kind], f"steps={steps}", f"strategy={strategy}", ranks=ranks)
    losses = [line["loss"] for line in found if "loss" in line]
    np.testing.assert_allclose(losses, [line["loss"] for line in reference(kind)[0] if "loss" in line], rtol=1e-5)


@pytest.mark.parametrize("kind", ["lora", pytest.param("qlora", marks=pytest.mark.slow)])
def test_a_killed_run_with_dropout_is_bitwise_the_uninterrupted_one(kind, base, reference, tmp_path):
    going = begun(base, tmp_path, *KINDS[kind])
    while not (tmp_path / "run" / "checkpoints" / "latest").exists():  # after step 4 of 8
        assert going.processes[0].poll() is None, going.processes[0].communicate()[0]
        time.sleep(0.005)
    going.kill()
    assert not (tmp_path / "run" / "export").exists()
    found = tuned(base, tmp_path, *KINDS[kind])
    expected, whole, _ = reference(kind)
    assert [line.get("loss") for line in found] == [line.get("loss") for line in expected]
    again = weights(tmp_path)
    assert all(np.array_equal(again[n], whole[n]) for n in whole)


def test_the_checkpoint_of_an_adapter_holds_nothing_else(reference):
    folder = reference("lora")[2] / "run" / "checkpoints" / "step-00000008"
    body = json.loads((folder / "manifest.json").read_text())["body"]
    assert {name.rpartition(".")[0].rpartition(".")[2] for name in body["shapes"]} == {"lora_A", "lora_B"}
    # rank * (in + out), hidden 32, MLP 64, one key-value head of 16: q 64, k and v 48 each, o 64, MLP 96 each; two layers.
    elements = 4 * (64 + 48 + 48 + 64 + 3 * 96) * 2
    assert sum(int(np.prod(shape)) for shape in body["shapes"].values()) == elements
    size = sum(f.stat().st_size for f in folder.glob("*.safetensors"))
    assert 3 * 4 * elements <= size < 3 * 4 * elements + 40_000  # weights and two moments, and the files' headers


def test_the_base_of_a_begun_adapter_may_not_change(base, tmp_path):
    import shutil

    shutil.copytree(base, tmp_path / "copy")
    tuned(tmp_path / "copy", tmp_path, *LORA, "steps=2")
    file = tmp_path / "copy" / "run" / "export" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[len(data) // 256 * 128 + 10] ^= 1
    file.write_bytes(bytes(data))
    with pytest.raises(
        AssertionError, match=r"the model in model.path changed since run was begun; restore it, or start"
    ):
        tuned(tmp_path / "copy", tmp_path, *LORA, "steps=4")


def test_the_first_evaluation_of_an_adapter_is_that_of_its_base(base, tmp_path):
    for name, kind in (("full", KINDS["full"]), ("lora", LORA)):
        (tmp_path / name).mkdir()
        tuned(base, tmp_path / name, *kind, "steps=1", "evaluation.first=true", "evaluation.samples=0")
    full, lora = (metrics(tmp_path / name / "run")[0] for name in ("full", "lora"))
    assert full["step"] == lora["step"] == 0
    assert full["eval/loss"] == lora["eval/loss"]


def test_the_model_learns_to_end_its_answers_and_to_give_the_right_one(base, tmp_path):
    found = tuned(
        base, tmp_path, "steps=200", "optimizer.lr=0.01", "batch.length=32", "evaluation.first=true", "evaluation.answers=12",
        "evaluation.sample_tokens=20", "evaluation.temperature=0", "checkpoint.every=0",
    )  # fmt: skip
    before, after = found[0], found[-1]
    assert before["eval/ended"] < 0.5
    assert before["eval/exact_match"] == 0
    assert after["eval/ended"] == 1
    assert after["eval/exact_match"] > 0.8  # learnt by heart: these 12 are among the 24
    assert after["eval/token_accuracy"] > 0.9
    shown = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    assert shown[-1].keys() >= {"step", "prompt", "completion", "ended", "ideal"}


def test_new_special_tokens_are_added_trained_and_exported(base, tmp_path):
    added = "tokenizer.add=['<|start_header_id|>','<|end_header_id|>','<|eot_id|>']"
    tuned(base, tmp_path, added, "data.template=llama3", "adapter=lora", "optimizer.lr=0.01", "steps=20")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    export = tmp_path / "run" / "export"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(export), AutoTokenizer.from_pretrained(export)
    assert len(tokenizer) == model.get_input_embeddings().num_embeddings == 515
    end = tokenizer.convert_tokens_to_ids("<|eot_id|>")
    assert end in model.generation_config.eos_token_id
    before, after = load_file(base / "run" / "export" / "model.safetensors"), weights(tmp_path)
    table = "model.embed_tokens.weight"
    assert after[table].shape == (515, before[table].shape[1])
    moved = np.abs(after[table][512:] - before[table].mean(0)).max(1)
    assert (moved > 1e-3).all()


def test_without_the_tokens_of_the_template_the_run_is_refused_before_it_starts(base, tmp_path):
    with pytest.raises(AssertionError) as refused:
        tuned(base, tmp_path, "data.template=llama3")
    assert re.search(
        r"tokenizer.add=\['<\|start_header_id\|>','<\|end_header_id\|>','<\|eot_id\|>'\]", str(refused.value)
    )
    assert not (tmp_path / "run").exists()
