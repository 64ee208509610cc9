"""Generation against transformers' own."""

import pytest
import torch

from tests.parity.test_transformers import built, perturbed, theirs_of, write
from trainer.generation.generate import generate
from trainer.generation.sampling import Sampling
from trainer.models.load import Model, ModelLoader
from trainer.parallel.ddp import DDP

transformers = pytest.importorskip("transformers")

QUESTIONS = [
    "What is the capital of France?",
    "Name three fruits.",
    "Write a short story about a lighthouse keeper who finds a bottle with a letter in it, and say what the letter said.",
    "2 + 2 =",
    "Why is the sky blue? Answer in one sentence, please, and without formulas.",
    "Translate to Spanish: good morning",
    "List the planets of the solar system in order of their distance from the sun, one a line.",
    "Hi",
]


def greedy_of(theirs, prompts: list[list[int]], tokens: int, stop: int) -> list[list[int]]:
    """Each prompt alone, so that no padding has a say."""
    found = []
    for prompt in prompts:
        row = torch.tensor([prompt])
        with torch.no_grad():
            out = theirs.generate(
                row, attention_mask=torch.ones_like(row), max_new_tokens=tokens, do_sample=False, eos_token_id=stop,
                pad_token_id=0,
            )  # fmt: skip
        found.append(out[0, len(prompt) :].tolist())
    return found


@pytest.mark.parametrize("name", ["llama3", "mistral", "qwen3"])
def test_greedy_equals_that_of_transformers(name, tmp_path):
    ours = perturbed(built(name)).eval()
    write(ours.architecture, ours, tmp_path / "export")
    draw = torch.Generator().manual_seed(4)
    prompts = [torch.randint(3, 101, (n,), generator=draw).tolist() for n in (1, 30, 70)]
    found = generate(ours, prompts, Sampling(16, temperature=0), stops=[2], max_concurrent=2)
    assert [c.ids for c in found] == greedy_of(theirs_of(tmp_path / "export"), prompts, 16, 2)


@pytest.mark.slow
def test_smollm2_answers_as_it_does_in_transformers(smollm2):
    tokenizer = transformers.AutoTokenizer.from_pretrained(smollm2)
    prompts = [
        tokenizer.apply_chat_template([{"role": "user", "content": q}], add_generation_prompt=True)["input_ids"]
        for q in QUESTIONS
    ]
    assert max(map(len, prompts)) > min(map(len, prompts)) + 20
    ours = ModelLoader(Model(path=str(smollm2)), DDP(), 0, 1).load().eval()
    stop = tokenizer.convert_tokens_to_ids("<|im_end|>")
    found = generate(ours, prompts, Sampling(48, temperature=0), stops=[stop], max_concurrent=5)
    assert [c.ids for c in found] == greedy_of(theirs_of(smollm2), prompts, 48, stop)
    assert {c.ended for c in found} == {True, False}
