"""Sampling by vLLM, really run: ``make test-vllm`` builds an environment with it. Elsewhere these are skipped."""

import os
from functools import partial

import pytest
import torch

from tests import small_world
from tests.command import Command, metrics
from trainer.batch import Documents
from trainer.functional import logprobs
from trainer.generation.generate import generate
from trainer.generation.sampling import Sampling
from trainer.models.load import Model, ModelLoader
from trainer.parallel.ddp import DDP

pytest.importorskip("vllm", reason="vLLM is not installed; make test-vllm")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # read when vLLM is first imported

from trainer.generation.vllm import VLLMSampler

SHAPE = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 64, "initializer_range": 0.3,
}  # fmt: skip
PROMPTS = [[3, 1, 4, 1, 5], [9, 2, 6], [5, 3, 5, 8, 9, 7, 9]] * 16
KEYS = [(0, n) for n in range(len(PROMPTS))]
STOPS = (7,)


def model(seed: int) -> torch.nn.Module:
    return ModelLoader(Model(**SHAPE), DDP(), seed, 200).load().eval()


@pytest.fixture(scope="module")
def policy():
    return model(1)


def sampler_of(policy, sampling: Sampling, stops=STOPS) -> VLLMSampler:
    return VLLMSampler(
        policy.architecture, policy.named_parameters, sampling, stops, length=64, memory=0.3, max_concurrent=64,
        dtype=torch.float32,
    )  # fmt: skip


@pytest.fixture(scope="module")
def greedy(policy):
    return sampler_of(policy, Sampling(40, temperature=0))


def test_greedy_decoding_in_float32_gives_our_tokens(policy, greedy):
    ours = generate(policy, PROMPTS[:3], greedy._sampling, stops=STOPS)
    theirs = greedy(PROMPTS[:3], KEYS[:3])
    assert [c.ids for c in theirs] == [c.ids for c in ours]
    assert [c.ended for c in theirs] == [c.ended for c in ours]
    for mine, other in zip(ours, theirs, strict=True):
        assert other.logprobs == pytest.approx(mine.logprobs, abs=1e-4)


def test_what_is_sampled_follows_the_weights_and_back(policy, greedy):
    before = [c.ids for c in greedy(PROMPTS[:3], KEYS[:3])]
    start = {name: p.detach().clone() for name, p in policy.named_parameters()}
    other = dict(model(2).named_parameters())
    with torch.no_grad():
        for name, p in policy.named_parameters():
            p.copy_(other[name])
    changed = [c.ids for c in greedy(PROMPTS[:3], KEYS[:3])]
    assert changed == [c.ids for c in generate(policy, PROMPTS[:3], greedy._sampling, stops=STOPS)]
    assert changed != before
    with torch.no_grad():
        for name, p in policy.named_parameters():
            p.copy_(start[name])
    assert [c.ids for c in greedy(PROMPTS[:3], KEYS[:3])] == before


def importance(policy, completions) -> torch.Tensor:
    """The trainer's probability of every sampled token, before filters, over what the sampler says."""
    weights = []
    for prompt, completion in zip(PROMPTS, completions, strict=True):
        row = torch.tensor([[*prompt, *completion.ids]])
        read = partial(logprobs, targets=row[:, 1:])
        with torch.no_grad():
            ours = policy(row[:, :-1], Documents.from_lengths([row.shape[1] - 1], 1), read)[0][0, len(prompt) - 1 :]
        weights.append((ours - torch.tensor(completion.logprobs)).exp())
    return torch.cat(weights)


@pytest.mark.parametrize("filters", [{}, {"top_k": 5}, {"top_p": 0.5}, {"min_p": 0.2}], ids=str)
def test_importance_weights_are_1_with_filters_too(filters, policy):
    sampler = sampler_of(policy, Sampling(20, temperature=1.0, **filters), stops=())
    first, again = sampler(PROMPTS, KEYS), sampler(PROMPTS, KEYS)
    assert [c.ids for c in first] == [c.ids for c in again]
    torch.testing.assert_close(importance(policy, first), torch.ones(20 * len(PROMPTS)), atol=1e-3, rtol=0)


def test_a_completion_of_the_longest_prompt_is_not_cut(policy):
    sampler = sampler_of(policy, Sampling(40, temperature=0), stops=())
    [completion] = sampler([[1] * 24], [(0, 0)])
    assert len(completion.ids) == 40


RUNS = {
    "ppo": ["pipeline.critic=policy"],
    "grpo": ["pipeline.advantage=grpo", "pipeline.samples_per_prompt=4"],
    "lora": ["pipeline.advantage=grpo", "pipeline.samples_per_prompt=4", "adapter=lora", "adapter.rank=4"],
}


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("run", RUNS)
def test_reinforcement_learning_samples_with_the_policy_as_it_is(run, ranks, tmp_path):
    world = small_world.write_world(tmp_path)
    Command(
        tmp_path, *small_world.overrides(world, "chain"), *RUNS[run], "model.hidden_size=64", "model.head_dim=64",
        "pipeline.rollout.engine=vllm", "pipeline.rollout.size=64", "batch.size=32", "batch.micro=16", "steps=8",
        "optimizer.lr=0.003", "pipeline.importance_cap=2", "run_dir=run", "tracking.every=1", ranks=ranks,
        fresh=True,
    ).finish(timeout=600)  # fmt: skip
    rows = [row for row in metrics(tmp_path / "run") if "rollout/mismatch" in row]
    assert len(rows) == 8
    # float32 on both sides: what differs after an update would be weights that were not handed over.
    assert max(row["rollout/mismatch"] for row in rows) < 1e-4
