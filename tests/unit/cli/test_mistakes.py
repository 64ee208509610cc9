"""What people get wrong at first: one sentence each with its remedy, exit code 2, and nothing is left behind."""

import importlib
import json
import re
from pathlib import Path

import pytest

from tests.chats import write_jsonl
from tests.command import ROOT, onecurve
from tests.small_folder import write_folder
from trainer.cli import VERBS

CHAT = {"messages": [{"role": "user", "content": "Who paints?"}, {"role": "assistant", "content": "Ada."}]}
PAIR = {"prompt": "Who paints?", "chosen": "Ada.", "rejected": "Nobody."}
FILES = {
    "chats.jsonl": [CHAT] * 8,
    "pairs.jsonl": [PAIR] * 16,
    "tasks.jsonl": [{"prompt": f"{n} + 1?", "ideal": f"{n + 1}"} for n in range(64)],
    "labels.jsonl": [{"prompt": "Who?", "completion": "Ada.", "label": n % 2 == 0} for n in range(16)],
    "equal.jsonl": [{**PAIR, "rejected": "Ada."}] * 16,
    "verdicts.jsonl": [{"prompt": "Who?", "completion": "Ada.", "label": "perhaps"}] * 16,
    "columns.jsonl": [{"question": "Who?", "answer": "Ada."}] * 8,
    "corrupt.jsonl": [CHAT, b'{"messages": [', CHAT],
    "roles.jsonl": [{"messages": [{"role": "robot", "content": "Beep."}]}],
    "questions.jsonl": [{"messages": [{"role": "user", "content": "Who?"}]}],
    "numbers.jsonl": [{"messages": [{"role": "user", "content": 7}, {"role": "assistant", "content": "Ada."}]}],
    "latin.jsonl": [json.dumps({"text": "Blåbær"}, ensure_ascii=False).encode("latin-1")],
    "empty.jsonl": [],
    "rows.csv": [],
}


@pytest.fixture(scope="module")
def desk(tmp_path_factory) -> Path:
    """A folder with a small model, a reward model, data of every kind, and what is wrong with it in a file each."""
    folder = tmp_path_factory.mktemp("desk")
    write_folder(folder / "model")
    write_folder(folder / "judge", scores=True, template="{% for m in messages %}{{ m.content }}{% endfor %}")
    for name, rows in FILES.items():
        write_jsonl(folder / name, rows)
    (folder / "plain.txt").write_text("Ada paints.\n" * 40)
    (folder / "rewards.py").write_text(
        "def backwards(rows):\n    return []\nnumber = 3\n"
        "def silent(prompts, completions, rows):\n    return [None] * len(rows)\n"
    )
    (folder / "runs").mkdir()
    (folder / "runs" / "notes.txt").write_text("no run")
    return folder


CHATML = ["data.template=chatml", "batch.length=128", "epochs=null", "steps=1", "schedule.warmup=0"]
SFT = ["experiment=sft", "model.path=model", "data.train=[chats.jsonl]", *CHATML]
DPO = ["experiment=dpo", "model.path=model", "data.train=[pairs.jsonl]", *CHATML]
KTO = ["experiment=dpo", "model.path=model", "data=labelled", "pipeline=kto", "data.train=[labels.jsonl]", *CHATML]
GRPO = ["experiment=grpo", "model.path=model", "data.train=[tasks.jsonl]", *CHATML]
PPO = ["experiment=ppo", "model.path=model", "data.train=[tasks.jsonl]", "pipeline.reward.main.path=judge", *CHATML]
TEXT = ["experiment=text", "data.train=[plain.txt]", "tokenizer.path=model", "batch.length=64"]

MISTAKES: list[tuple[str, list[str], str]] = [
    # ---- what Hydra refuses
    (
        "a model's name as a choice",
        [*TEXT, "model=smollm2"],
        "model=smollm2 is not a choice; did you mean model=smollm2-135m",
    ),
    (
        "a precision of another framework",
        [*TEXT, "precision=bfloat16"],
        "precision=bfloat16 is not a choice; did you mean precision=bf16",
    ),
    (
        "a strategy of another framework",
        [*TEXT, "strategy=deepspeed"],
        "strategy=deepspeed is not a choice; it has ddp, fsdp, zero1, zero2, zero3",
    ),
    (
        "an optimizer of another framework",
        [*TEXT, "optimizer=adamw8bit"],
        "optimizer=adamw8bit is not a choice; did you mean optimizer=adamw",
    ),
    ("a misspelt experiment", ["experiment=sftt"], "experiment=sftt is not a choice; did you mean experiment=sft"),
    ("a configuration file", ["config.yaml"], "config.yaml is a file, not an override; "),
    (
        "spaces around the sign",
        ["experiment", "=", "sft"],
        "write setting=value, without spaces around the equals sign",
    ),
    ("a path with a bracket", [*SFT, "model.path=runs/a(1"], "quote the value: model.path='runs/a(1'"),
    ("a path with an equals sign", [*SFT, "model.path=runs/lr=3"], "quote the value: model.path='runs/lr=3'"),
    ("a path with a comma", [*SFT, "model.path=runs/a,b"], "quote the value: model.path='runs/a,b'"),
    ("a list without its end", [*SFT, "data.train=[chats.jsonl"], "close the bracket"),
    ("a folder of configurations that is absent", ["--config-dir", "conf", "experiment=sft"], "--config-dir conf"),
    ("a module that is absent", [*SFT, "imports=[nowhere]"], "imports=nowhere cannot be imported"),
    # ---- settings
    (
        "a misspelt setting",
        [*SFT, "optimizer.lrr=1"],
        "AdamW has no setting 'optimizer.lrr'; did you mean 'optimizer.lr'",
    ),
    ("a setting without its group", [*SFT, "lr=1e-4"], "did you mean 'optimizer.lr'"),
    ("words for a number", [*SFT, "steps=many"], "steps='many' is not an integer"),
    ("a file that is not in a list", [*SFT, "data.train=chats.jsonl"], "write data.train=[chats.jsonl]"),
    ("a batch that does not divide", [*SFT, "batch.size=7"], "batch.size=7 is not a multiple of"),
    ("rows longer than the model", [*SFT, "batch.length=100000"], "use at most 2048"),
    ("a template's name", [*SFT, "data.template=chatlm"], "data.template=chatlm is not known"),
    ("LoRA's rank without LoRA", [*SFT, "adapter.rank=8"], "adapter=lora"),
    ("peft's word for all layers", [*SFT, "adapter=lora", "adapter.targets=all-linear"], "write adapter.targets=["),
    ("a target that is no layer", [*SFT, "adapter=lora", "adapter.targets=[query]"], "query"),
    ("a rank beyond all", [*SFT, "adapter=lora", "adapter.rank=99999"], "adapter.rank=99999 is more than any side"),
    ("both biases and a family without", ["model.qk_norm=true"], "cannot be written as family llama"),
    ("heads that do not divide", ["model.num_attention_heads=5"], "num_attention_heads=5 is not a multiple of"),
    ("an unknown rope", ["model.rope_scaling={rope_type: ntk}"], "rope_type=ntk is not known"),
    (
        "a router of a folder without experts",
        [*SFT, "model.router_z_loss=0.1"],
        "on a model without experts; leave it out",
    ),
    ("layers beside a folder", [*SFT, "model.num_hidden_layers=2"], "has no effect beside model.path=model"),
    ("muon under ZeRO-3", [*TEXT, "strategy=zero3"], "muon"),
    (
        "half a step of warm-up",
        [*SFT, "schedule.warmup=5.5"],
        "schedule.warmup=5.5 is neither a number of steps nor a part",
    ),
    ("neither steps nor epochs", [*SFT, "steps=null"], "both null: give one of them, such as epochs=1"),
    ("a run_dir that is something else", [*SFT, "run_dir=runs"], "run_dir=runs is not a run directory"),
    ("a run_dir that is a file", [*SFT, "run_dir=plain.txt"], "run_dir=plain.txt is not a run directory"),
    ("a run_dir below a file", [*SFT, "run_dir=plain.txt/run"], "run_dir=plain.txt/run lies below plain.txt"),
    ("a run_dir without end", [*SFT, f"run_dir={'r' * 300}"], "cannot be used (File name too long); use another"),
    # ---- models and tokenizers
    ("a hub id as a model", [*SFT, "model.path=HuggingFaceTB/SmolLM2-none"], "hf download HuggingFaceTB/SmolLM2-none"),
    ("a folder that is absent", [*SFT, "model.path=nowhere"], "model.path=nowhere: "),
    ("no model", [w for w in SFT if "model.path" not in w], "model.path is required"),
    (
        "a reward model as a policy's tokenizer",
        [*SFT, "tokenizer.path=plain.txt"],
        "tokenizer.path=plain.txt holds no tokenizer",
    ),
    ("no template", [w for w in SFT if "template" not in w], "data.template="),
    ("a model without head as a judge", [*PPO, "pipeline.reward.main.path=model"], "scores nothing"),
    # ---- data
    ("a file that is absent", [*SFT, "data.train=[chat.jsonl]"], "data.train: chat.jsonl does not exist"),
    ("a file of another kind", [*SFT, "data.train=[rows.csv]"], "rows.csv is of no kind that is read"),
    ("an empty file", [*SFT, "data.train=[empty.jsonl]"], "empty.jsonl"),
    ("a line that is cut", [*SFT, "data.train=[corrupt.jsonl]"], "corrupt.jsonl, line 2: not JSON"),
    ("another encoding", [*TEXT, "data.train=[latin.jsonl]"], "latin.jsonl, line 1: not UTF-8"),
    (
        "a role that nobody has",
        [*SFT, "data.train=[roles.jsonl]"],
        "roles.jsonl, line 1: message 1 of messages has the role 'robot'",
    ),
    ("questions alone", [*SFT, "data.train=[questions.jsonl]"], "questions.jsonl, line 1: no turn is the assistant's"),
    ("a number as a content", [*SFT, "data.train=[numbers.jsonl]"], "numbers.jsonl, line 1: the content of message 1"),
    ("columns of other names", [*SFT, "data.train=[columns.jsonl]"], "name the columns in data.columns"),
    ("a column that is not read", [*SFT, "data.columns={promt: question}"], "data.columns.promt is not used"),
    ("the weight of no source", [*SFT, "data.weights={chat: 2}"], "data.weights.chat is the weight of no source"),
    ("chats as preferences", [*DPO, "data.train=[chats.jsonl]"], "chats.jsonl, line 1: "),
    (
        "two equal answers",
        [*DPO, "data.train=[equal.jsonl]"],
        "equal.jsonl has no pair left to learn from (16 dropped: equal answers)",
    ),
    ("a verdict in words", [*KTO, "data.train=[verdicts.jsonl]"], "verdicts.jsonl, line 1: "),
    ("data of another pipeline", [*SFT, "pipeline=dpo"], "choose another data="),
    # ---- rewards
    ("a reward that is absent", [*GRPO, "pipeline.reward.main.function=rewards.brevity"], "has none called brevity"),
    ("a reward of a module that is absent", [*GRPO, "pipeline.reward.main.function=my.brevity"], "cannot be imported"),
    ("a reward that takes something else", [*GRPO, "pipeline.reward.main.function=rewards.backwards"], "does not take"),
    ("a prompt longer than the model", [*GRPO, "pipeline.rollout.tokens=100000"], "pipeline.rollout.tokens"),
    (
        "a reward in a file that is absent",
        [*GRPO, "pipeline.reward.main.function=my.py:brevity"],
        "my.py does not exist",
    ),
    (
        "a judge without its address",
        [*GRPO, "reward@pipeline.reward.main=judge"],
        "pipeline.reward.main.url is required",
    ),
    # ---- other verbs
    ("a verb that is absent", ["finetune"], "finetune is not a verb"),
    ("a recipe that is absent", ["recipe", "nowhere"], "nowhere"),
    ("an evaluation of nothing", ["evaluate", *SFT], "data.eval=[]"),
    ("a chat with nothing", ["chat", "nowhere"], "nowhere does not exist"),
    ("completions of a folder that is no model", ["generate", "runs", "--prompt", "Who?"], "runs has no config.json"),
    (
        "no tokens at all",
        ["generate", "model", "--template", "chatml", "--prompt", "Who?", "--tokens", "0"],
        "tokens=0 must be at least 1",
    ),
    ("scores of a model without head", ["score", "model", "chats.jsonl"], "scores nothing"),
    ("a GGUF that is none", ["convert", "plain.txt", "models/x"], "plain.txt is not a GGUF file"),
    ("an export of a folder that is no run", ["export", "runs"], "runs is not a run directory"),
    ("a tokenizer over another", ["tokenize", "model", "plain.txt"], "model exists already"),
    ("a report of nothing", ["report", "runs"], "no run is there"),
    ("checkpoints of nothing", ["verify", "runs"], "holds no checkpoint"),
    (
        "a comparison by no function",
        ["compare", "out", "tasks.jsonl", "a=model", "--template", "chatml", "--function", "rewards.no"],
        "rewards has none called no, it has backwards",
    ),
    ("Slurm's time in words", ["submit", "time=soon", "--", *SFT], "time=soon"),
]


@pytest.mark.parametrize(("words", "sentence"), [m[1:] for m in MISTAKES], ids=[m[0] for m in MISTAKES])
def test_a_mistake_is_one_sentence_with_its_remedy(words, sentence, desk, monkeypatch, clean_registries):
    monkeypatch.syspath_prepend(desk)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # a hub that does not answer is none
    before = sorted(path for path in desk.rglob("*") if "__pycache__" not in str(path))
    command = words if words[0] in VERBS or words == ["finetune"] else ["train", *words]
    cache = [f"data.cache={desk}-cache"] if command[0] in ("train", "evaluate") else []
    code, _, errors = onecurve(desk, *command, *cache)
    assert code == 2, errors
    assert sentence in errors
    assert "Traceback" not in errors
    assert sorted(path for path in desk.rglob("*") if "__pycache__" not in str(path)) == before


def test_a_first_step_without_any_score_is_one_sentence(desk, monkeypatch, tmp_path, clean_registries):
    monkeypatch.syspath_prepend(desk)
    silent = [*GRPO, "pipeline.reward.main.function=rewards.silent", "batch.size=8", "batch.micro=8"]
    silent += ["pipeline.rollout.size=8", "pipeline.rollout.tokens=2", "evaluation.first=false"]
    code, _, errors = onecurve(desk, "train", *silent, f"run_dir={tmp_path / 'r'}", f"data.cache={tmp_path / 'cache'}")
    assert code == 2, errors
    assert errors.count("\n") == 1
    assert "guard.first_step=warn" in errors


def test_a_run_whose_checkpoints_are_all_damaged_is_one_sentence(desk, tmp_path, clean_registries):
    words = ["train", *SFT, f"run_dir={tmp_path / 'r'}", f"data.cache={tmp_path / 'cache'}"]
    assert onecurve(desk, *words)[0] == 0
    (tmp_path / "r" / "checkpoints" / "step-00000001" / "manifest.json").write_text("{}")
    code, _, errors = onecurve(desk, *words)
    assert code == 2, errors
    assert "is whole" in errors
    assert "start afresh with resume=new" in errors
    assert "Traceback" not in errors


def test_a_full_disk_is_one_sentence_and_no_mistake(desk, room, tmp_path, clean_registries):
    words = ["train", *SFT, f"data.cache={tmp_path / 'cache'}"]
    assert onecurve(desk, *words, f"run_dir={tmp_path / 'r'}")[0] == 0  # and the data is prepared
    for size, sentence in ((100, "new/config.yaml could not be written"), (20_000, "the checkpoint of step 1 was not")):
        room(size)
        code, _, errors = onecurve(desk, *words, f"run_dir={tmp_path / 'new'}")
        assert (code, errors.count("\n")) == (1, 1), errors
        assert sentence in errors
        assert "(File too large); free space there, then run again" in errors


TRACED = {"RankError", "OutOfLanguageError", "WorkLimitError", "MalformedError", "LeftStageError"}
"""What a fault of the program raises, or what is always caught."""


def test_an_error_that_users_can_mend_or_wait_out_has_no_traceback():
    from trainer.config import InputError, RunError

    for file in sorted((ROOT / "trainer").rglob("*.py")):
        for name in re.findall(r"^class (\w+Error)\(", file.read_text(), re.MULTILINE):
            module = ".".join(file.relative_to(ROOT).with_suffix("").parts)
            assert name in TRACED or issubclass(getattr(importlib.import_module(module), name), InputError | RunError)


def test_a_run_that_diverges_ends_in_one_sentence_with_exit_1(desk, tmp_path, clean_registries):
    words = [*SFT[:-2], "steps=3", "schedule.warmup=0", "optimizer.lr=1e30", "guard.max_bad_steps=1"]
    code, _, errors = onecurve(desk, "train", *words, f"run_dir={tmp_path / 'r'}", f"data.cache={tmp_path / 'cache'}")
    assert (code, errors.count("\n")) == (1, 1), errors
    assert "guard.max_bad_steps=1" in errors
