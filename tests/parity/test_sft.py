"""Fine-tuning on chats against a plain reference: transformers' forward, full logits, a chat at a time, no packing."""

import json
import os
from functools import partial
from pathlib import Path

import pytest
import torch

from tests.chats import write_jsonl
from tests.command import ROOT
from trainer.data.chats import ChatData
from trainer.data.tokenizer import open_tokenizer
from trainer.functional import cross_entropy
from trainer.models.load import Model, ModelLoader
from trainer.parallel.ddp import DDP

transformers = pytest.importorskip("transformers")
CHATS = Path(os.environ.get("ONECURVE_DATA", ROOT.parent / "shared" / "data")) / "sft" / "instructions.jsonl"
WRITTEN = [
    {"messages": [{"role": "user", "content": "Name a prime."}, {"role": "assistant", "content": "Seven is one."}]},
    {
        "messages": [
            {"role": "system", "content": "Answer in one word."},
            {"role": "user", "content": "Capital of Norway?"},
            {"role": "assistant", "content": "Oslo."},
            {"role": "user", "content": "And of Peru?"},
            {"role": "assistant", "content": "Lima."},
        ]
    },
]


def real() -> list[dict]:
    """Short real conversations, and those written above."""
    if not CHATS.exists():
        return WRITTEN
    rows = [json.loads(line) for line in CHATS.read_text().splitlines()]
    return WRITTEN + [r for r in rows if sum(len(m["content"]) for m in r["messages"]) < 400][:6]


def plain_loss(model, tokenizer, messages) -> tuple[torch.Tensor, int]:
    """(sum of -log p of the assistant's tokens, their number), with spans found by rendering prefixes."""
    ids = tokenizer.apply_chat_template(messages, return_tensors="pt")["input_ids"]
    learnt = torch.zeros_like(ids, dtype=torch.bool)
    for n, message in enumerate(messages):
        if message["role"] == "assistant":
            before = tokenizer.apply_chat_template(messages[:n], add_generation_prompt=True)["input_ids"]
            after = tokenizer.apply_chat_template(messages[: n + 1])["input_ids"]
            learnt[0, len(before) : len(after) - 1] = True  # without the newline behind <|im_end|>
    scores = model(ids).logits[0, :-1].log_softmax(-1)
    kept = learnt[0, 1:]
    return -scores[torch.arange(len(kept)), ids[0, 1:]][kept].sum(), int(kept.sum())


@pytest.mark.slow
def test_loss_and_gradients_are_those_of_transformers_without_packing(smollm2, tmp_path):
    rows = real()
    # In float64, since transformers' own float32 gradients are off by up to 1.7e-3 on these chats (ours: 5e-5).
    theirs = transformers.AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float64)
    # The pad id is <|im_end|> here, and transformers drops the gradient of the pad token's embedding.
    theirs.get_input_embeddings().padding_idx = None
    tokenizer = transformers.AutoTokenizer.from_pretrained(smollm2)
    parts = [plain_loss(theirs, tokenizer, row["messages"]) for row in rows]
    expected, count = sum(loss for loss, _ in parts), sum(n for _, n in parts)
    (expected / count).backward()

    data = ChatData(train=[str(write_jsonl(tmp_path / "chats.jsonl", rows))], cache=str(tmp_path / "cache"))
    packed = data.open(open_tokenizer(smollm2), 512, 0).train.parts[0]
    assert len(packed) < len(rows)
    ours = ModelLoader(Model(path=str(smollm2)), DDP(), 0, 1).load().train()
    batch = packed.collate(range(len(packed)))
    assert float(batch.weight) == count
    read = partial(cross_entropy, targets=batch.targets, mask=batch.mask)
    loss, _, _ = ours(batch.tokens, batch.documents, read)
    (loss / count).backward()

    assert loss.item() / count == pytest.approx(expected.item() / count, rel=1e-4)
    found = dict(ours.named_parameters())
    for name, p in theirs.named_parameters():
        if p.grad is not None:
            # Relative to the largest entry of each gradient.
            difference = (found[name].grad.double() - p.grad).abs().max() / p.grad.abs().max()
            assert difference < 1e-4, (name, float(difference))
