"""Whole runs whose experts two ranks divide, beside the same runs on one: adapters of experts, frozen twins, rollouts."""

import os
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.chats import write_jsonl
from tests.command import TINY, metrics
from tests.layouts import needs_divided_experts
from tests.pipelines import test_dpo, test_ppo, test_sft
from tests.ranks import on_ranks, to_another_port
from trainer.compose import compose
from trainer.run import run

pytestmark = needs_divided_experts
EXPERTS = ["model.family=mixtral", "model.experts=4", "model.intermediate_size=32"]
QUIET = ["tracking.report=false", "schedule=constant"]
ON_TWO = ["strategy=fsdp", "strategy.expert=2"]
RUNS = {
    "sft": [
        "pipeline=sft", "data=chat", "data.train=[../chats.jsonl]", "data.eval=[../chats.jsonl]", *test_sft.QUIET,
        *test_sft.SMALL, "adapter=lora", "adapter.rank=4", "optimizer.lr=0.003", "steps=20",
    ],
    "dpo": [
        "pipeline=dpo", "data=preference", "data.train=[../pairs.jsonl]", "data.eval=[../pairs.jsonl]", *test_dpo.QUIET,
        *test_dpo.SMALL, "pipeline.reference=model",
    ],
    "reward": [
        "pipeline=reward", "data=preference", "data.train=[../pairs.jsonl]", "data.eval=[../pairs.jsonl]", *test_dpo.QUIET,
        *test_dpo.SMALL,
    ],
    "ppo": [
        "data.train=[../prompts.jsonl]", "data.eval=[../prompts.jsonl]", *test_ppo.SMALL, *test_ppo.VOWELS, "steps=8",
    ],
    "grpo": [
        "data.train=[../prompts.jsonl]", "data.eval=[../prompts.jsonl]", *test_ppo.SMALL, *test_ppo.VOWELS[:2],
        *test_ppo.KINDS["grpo"], "steps=4",
    ],
}  # fmt: skip


def all_of(folder: str, strategy: list[str]) -> None:
    """Each of `RUNS` in turn, in the folder of its ranks."""
    os.chdir(folder)
    sys.path.insert(0, str(Path(folder).parent))
    for name, own in RUNS.items():
        to_another_port()
        run(compose([f"run_dir={name}", "model.path=../base/export", "data.cache=cache", *own, *QUIET, *strategy]))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The runs on one rank and on two, and the model that all begin with."""
    folder = tmp_path_factory.mktemp("experts")
    write_jsonl(folder / "chats.jsonl", test_sft.CHATS)
    write_jsonl(folder / "pairs.jsonl", test_dpo.PAIRS[::2])
    write_jsonl(folder / "prompts.jsonl", test_ppo.PROMPTS)
    (folder / "worth.py").write_text(test_ppo.WORTH)
    run(compose([f"run_dir={folder / 'base'}", *TINY, *EXPERTS, *QUIET, "steps=10", "optimizer.lr=0.003"]))
    for ranks, strategy in ((1, ["strategy=ddp"]), (2, ON_TWO)):
        (folder / str(ranks)).mkdir()
        on_ranks(ranks, all_of, str(folder / str(ranks)), strategy, joined=False)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_divided_experts_give_the_run_of_one_rank(name, folder):
    one, two = (metrics(folder / ranks / name) for ranks in "12")
    for key in ("loss", "grad_norm", "eval/loss", "router/load_max", "objective/score", "policy/approx_kl"):
        expected, found = ([line[key] for line in lines if key in line] for lines in (one, two))
        # Float32 sums in another order; Adam amplifies the last bits over the steps.
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5, err_msg=key)
    weights, others = (load_file(folder / ranks / name / "export" / "model.safetensors") for ranks in "12")
    assert weights.keys() == others.keys()
    assert max(float(np.abs(weights[n] - others[n]).max()) for n in weights) < 1e-3
