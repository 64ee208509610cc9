"""What no test here runs, on CUDA alone or with a torch that is not installed, exists there and takes what it is given."""

import json
import re

import pytest
import torch
from torch.torch_version import TorchVersion

from tests.command import ROOT
from tests.cuda.signatures import FILE, bind, calls, installed
from trainer.compose import compose
from trainer.parallel.fsdp import FSDP

VERSIONS = json.loads(FILE.read_text())
CALLS = [(file, *call) for file in sorted((ROOT / "trainer").rglob("*.py")) for call in calls(file)]
ABSENT = {"2.11.0": {"torch.distributed.fsdp._fully_shard._fsdp_common.ShardPlacementResult"}}
"""What only strategy.expert calls, which is refused with that torch."""


def test_the_oldest_torch_that_is_allowed_is_among_them():
    floor = re.search(r'"torch>=([\d.]+)"', (ROOT / "setup.py").read_text())
    assert floor is not None
    assert sorted(VERSIONS, key=lambda v: [int(n) for n in v.split(".")])[0].startswith(floor[1])


def test_the_installed_torch_is_as_the_file_says():
    version = torch.__version__.partition("+")[0]
    if version not in VERSIONS:
        pytest.skip(f"python -m tests.cuda.signatures would add torch {version}")
    # Of what is called: a build with CUDA has more names than one without.
    here = installed()
    assert {name: here.get(name) for _, name, _, _ in CALLS} == {
        name: VERSIONS[version].get(name) for _, name, _, _ in CALLS
    }


@pytest.mark.parametrize("version", VERSIONS)
def test_every_call_exists_and_takes_what_it_is_given(version):
    assert {
        "torch.nn.attention.varlen.varlen_attn", "torch.cuda.Event", "torch.distributed.isend",
        "torch.distributed.fsdp.FSDPModule.set_force_sum_reduction_for_comms",
    } <= {name for _, name, _, _ in CALLS}  # fmt: skip
    wrong = []
    for file, name, positional, keywords in CALLS:
        try:
            if name not in ABSENT.get(version, ()) and VERSIONS[version][name] is not None:
                bind(VERSIONS[version][name], positional, keywords)
        except (KeyError, TypeError) as error:
            wrong.append(f"{file.relative_to(ROOT)}: {name}: {error}")
    assert wrong == []


@pytest.mark.parametrize("version", VERSIONS)
def test_what_a_torch_lacks_is_refused_with_it(version, monkeypatch):
    monkeypatch.setattr(torch, "__version__", TorchVersion(version))
    lack = f"needs torch 2.12 or later, and this is {version}"
    refused = [f"strategy.expert=2 {lack}; use 1"]
    assert list(FSDP(expert=2).problems()) == (refused if version in ABSENT else [])
    refused = [f"adapter=qlora under strategy=fsdp {lack}; use strategy=zero3, or adapter=lora"]
    run = compose(["data=tinyworld", "adapter=qlora", "strategy=fsdp", "steps=1"])
    problems = list(run.validate_division(run.model.architecture(64)))
    assert problems == (refused if version in ABSENT else [])


def test_an_argument_that_only_a_newer_torch_has_is_seen():
    name, (old, *_, new) = "torch.nn.attention.varlen.varlen_attn", sorted(VERSIONS)
    bind(VERSIONS[new][name], 3, ["cu_seq_q", "cu_seq_k", "max_q", "max_k", "enable_gqa"])
    with pytest.raises(TypeError, match="enable_gqa"):
        bind(VERSIONS[old][name], 3, ["cu_seq_q", "cu_seq_k", "max_q", "max_k", "enable_gqa"])
