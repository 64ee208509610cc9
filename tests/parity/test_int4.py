"""What integers cost a real model: GPTQ beside rounding, on chats that neither has seen."""

import json
import os
from pathlib import Path

import pytest
import torch

from tests.command import ROOT
from trainer.batch import Documents
from trainer.data.templates import open_template
from trainer.data.tokenizer import open_tokenizer
from trainer.export.compressed_tensors import write_int
from trainer.functional import logits
from trainer.models.load import Model, ModelLoader
from trainer.parallel.ddp import DDP

CHATS = Path(os.environ.get("ONECURVE_DATA", ROOT.parent / "shared" / "data")) / "sft" / "instructions.jsonl"
LENGTH, CALIBRATION, HELDOUT = 96, 24, 8


def chats(folder: Path) -> list[list[int]]:
    """Rows of one length."""
    if not CHATS.exists():
        pytest.skip(f"needs {CHATS}")
    template = open_template(None, open_tokenizer(folder))
    rows = (template.prompt(json.loads(line)["messages"])[:LENGTH] for line in CHATS.read_text().splitlines())
    return [row for row in rows if len(row) == LENGTH][: CALIBRATION + HELDOUT]


@torch.no_grad()
def logprobs_of(folder: Path, rows: list[list[int]]) -> torch.Tensor:
    """Log-probabilities of every next token, ``(1, T, V)``."""
    model = ModelLoader(Model(path=str(folder)), DDP(), 0, open_tokenizer(folder).vocab_size).load().eval()
    return model(torch.tensor(rows).view(1, -1), Documents.from_lengths([LENGTH] * len(rows), 1), logits).log_softmax(
        -1
    )


@pytest.mark.slow
def test_gptq_costs_at_most_half_of_what_rounding_does(smollm2, tmp_path):
    rows = chats(smollm2)
    calibration, heldout = rows[:CALIBRATION], rows[CALIBRATION:]
    original, cost = logprobs_of(smollm2, heldout), {}
    for bits, method in ((4, "rtn"), (4, "gptq"), (8, "rtn")):
        out = tmp_path / f"int{bits}-{method}"
        write_int(bits, method, smollm2, out, calibration)
        quantised = logprobs_of(out, heldout)
        cost[out.name] = float((original.exp() * (original - quantised)).sum(-1).mean())
    assert cost["int4-gptq"] < 0.5 * cost["int4-rtn"], cost
    # 8 bits a weight: about what a forward in bfloat16 costs this model (0.002 nats a token).
    assert cost["int8-rtn"] < 0.01, cost
