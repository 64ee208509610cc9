"""The benchmarks run on this code: our side of each, on a model of a few hundred weights."""

import argparse
import importlib
import json
import sys

import pytest

from tests.chats import write_jsonl
from tests.command import ROOT
from tests.small_folder import write_folder

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CHATS = [
    {"messages": [{"role": "user", "content": f"Count to {n}."}, {"role": "assistant", "content": "One, two."}]}
    for n in range(16)
]
PAIRS = [
    {
        "prompt": chat["messages"][:1],
        "chosen": chat["messages"][1:],
        "rejected": [{"role": "assistant", "content": "No."}],
    }
    for chat in CHATS
]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("benchmark")
    write_folder(folder / "model", template=CHATML)
    write_jsonl(folder / "chats.jsonl", CHATS)
    write_jsonl(folder / "pairs.jsonl", PAIRS)
    return folder


@pytest.mark.parametrize(
    ("name", "arguments", "figure"),
    [
        ("pretrain", "--model tiny --length 32 --size 2 --steps 1", "tokens_per_second"),
        ("sft", "{0}/model {0}/chats.jsonl --length 64 --steps 1", "tokens_per_second"),
        ("dpo", "{0}/model {0}/pairs.jsonl --length 64 --pairs 4 --size 2", "pairs_per_second"),
        ("generation", "{0}/model {0}/chats.jsonl --prompts 4 --tokens 4 --ends none", "tokens_per_second"),
    ],
)
def test_our_side_of_a_benchmark_gives_its_rate(inputs, name, arguments, figure, monkeypatch, capsys):
    result = result_of(name, [*arguments.format(inputs).split(), "--side", "onecurve"], monkeypatch, capsys)
    assert result[figure] > 0


@pytest.mark.parametrize("side", ["lora", "qlora"])
def test_our_adapters_are_sides_of_the_fine_tuning_benchmark(inputs, side, monkeypatch, capsys):
    if side == "qlora":
        pytest.importorskip("bitsandbytes", reason="needs bitsandbytes (extra: quant)")
    arguments = [f"{inputs}/model", f"{inputs}/chats.jsonl", "--length", "64", "--steps", "1", "--side", side]
    result = result_of("sft", arguments, monkeypatch, capsys)
    assert result["tokens_per_second"] > 0 < result["estimate_gb"]
    assert 4 < result["loss"] < 7  # a new model's: log 265 = 5.6


def test_our_side_of_the_ppo_benchmark_counts_what_was_asked(inputs, monkeypatch, capsys):
    """It writes models of its own: 4 episodes of at most 64 tokens, four epochs of four mini-batches."""
    monkeypatch.chdir(inputs)
    prepare(inputs / "runs", monkeypatch)
    arguments = ["update", "--episodes", "4", "--work", f"{inputs}/runs", "--side", "onecurve"]
    result = result_of("ppo", arguments, monkeypatch, capsys)
    assert (result["updates"], result["prompt_tokens"] > 0, result["longest"] <= 64) == (16, True, True)


def prepare(work, monkeypatch):
    """What both sides of the PPO benchmark start from."""
    arguments = argparse.Namespace(work=work / "update", setting="update", model=None, prompts=None)
    module("ppo", monkeypatch).prepare(arguments)


def result_of(name, arguments, monkeypatch, capsys):
    benchmark = module(name, monkeypatch)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
    benchmark.main()
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("RESULT ")]
    return json.loads(lines[-1].removeprefix("RESULT "))


def module(name, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts" / "benchmarks"))
    return importlib.import_module(name)
