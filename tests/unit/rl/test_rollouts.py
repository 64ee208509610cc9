"""Rollouts of policies that went wrong, groups that teach nothing, and scores that are missing: all of them go on."""

from functools import partial

import pytest
import torch

from tests.small_world import WORDS, overrides, write_world
from trainer.compose import compose
from trainer.diagnostics.guard import Guard
from trainer.generation.completion import Completion
from trainer.loop import train
from trainer.parallel import distributed
from trainer.pipelines.base import Plan
from trainer.tracking.throughput import Stopwatch

EOS, A, B = (WORDS.index(word) for word in ("<eos>", "a", "b"))


def learn(folder, sampler, *settings, steps=3, judge=None) -> tuple[list[dict], list]:
    """Metrics and texts of a few steps on what ``sampler`` gives."""
    cfg = compose(
        [*overrides(folder, "bandit"), "batch.size=8", "batch.micro=4", "pipeline.rollout.size=8", *settings], name="x"
    )
    with distributed.session() as world:
        tokenizer, _ = cfg.open_tokenizer_and_shape()
        corpus = cfg.data.open(tokenizer, 16, 0)
        models = cfg.pipeline.models(cfg.loader(tokenizer), tokenizer)
        engine = cfg.strategy.wrap(models.trained, cfg.optimizer, cfg.precision)
        models.trained = engine.model
        watch = Stopwatch(world.device)
        batches = cfg.pipeline.batches(models, engine, corpus, Plan(8, 4, 16, cfg.seed, watch))
        batches.actor.sampler = sampler
        batches.rewards = judge or batches.rewards
        steps_taken = train(
            cfg.pipeline, models, engine, batches, lambda n: 1.0, Guard(cfg.guard, world.device), watch,
            seed=0, first=1, last=steps, accumulate=2,
        )  # fmt: skip
        found = [({k: float(v) for k, v in step.metrics.items()}, step.texts) for step in steps_taken]
        batches.close()
    return [values for values, _ in found], [text for _, texts in found for text in texts]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_world(tmp_path_factory.mktemp("world"))


def always(ids, prompts, keys, ended=True):
    return [Completion(list(ids), [-1.0] * len(ids), ended) for _ in prompts]


@pytest.mark.parametrize("advantage", ["gae", "grpo"])
def test_a_policy_that_says_nothing_does_not_end_a_run(advantage, world):
    values, texts = learn(world, partial(always, [EOS]), f"pipeline.advantage={advantage}", "pipeline.ppo_epochs=1")
    assert all(torch.isfinite(torch.tensor(list(v.values()))).all() for v in values)
    assert values[0]["completion/length_mean"] == 1
    assert values[0]["completion/eos_fraction"] == 1
    assert texts[0]["completion"] == ""


def test_a_policy_that_never_ends_does_not_end_a_run_and_what_is_masked_is_a_step_not_taken(world):
    endless = partial(always, [A, A], ended=False)
    values, _ = learn(world, endless, "pipeline.ppo_epochs=1", "pipeline.missing_eos_penalty=1")
    assert values[0]["completion/eos_fraction"] == 0
    assert values[0]["skipped"] == 0
    values, _ = learn(world, endless, "pipeline.ppo_epochs=1", "pipeline.unfinished=mask")
    assert [v["skipped"] for v in values] == [1, 2, 3]
    assert all(v["loss"] == 0 for v in values)


def test_groups_of_equal_scores_are_drawn_again(world):
    """Prompts alternate in the data; the first draw's answers are all alike, later ones differ."""
    draws = []

    def sampler(prompts, keys):
        draws.append([key[2] for key in keys])
        return [Completion([A if len(draws) == 1 or key[3] % 2 else B], [-1.0], True) for key in keys]

    values, _ = learn(
        world,
        sampler,
        "pipeline.advantage=grpo",
        "pipeline.samples_per_prompt=4",
        "pipeline.rollout.max_resample=2",
        steps=1,
    )
    # Two prompts an iteration, numbered on through its draws; the third draw is not needed.
    assert draws == [[0] * 4 + [1] * 4, [2] * 4 + [3] * 4]
    assert values[0]["rollout/equal_groups"] == 0.5
    # A pull of a is worth 0.1, of b 0.6: only the groups that differ are learnt from.
    assert values[0]["objective/score"] == pytest.approx(0.35)
    assert values[0]["grad_norm"] > 0


def test_when_no_group_differs_the_iteration_is_taken_as_it_is(world):
    values, _ = learn(
        world,
        partial(always, [A]),
        "pipeline.advantage=grpo",
        "pipeline.samples_per_prompt=4",
        "pipeline.rollout.max_resample=1",
        steps=1,
    )
    assert values[0]["rollout/equal_groups"] == 1
    assert values[0]["objective/score"] == pytest.approx(0.1)
    assert values[0]["grad_norm"] == 0


def test_answers_without_a_score_are_not_learnt_from(world):
    def judge(answers):
        return {"score": [None if n % 2 else 1.0 for n in range(len(answers))]}

    values, _ = learn(world, partial(always, [A]), judge=judge, steps=1)
    assert values[0]["objective/missing"] == 0.5
    assert values[0]["objective/score"] == 1


def test_what_is_sampled_depends_on_seed_iteration_place_and_sample(world):
    seen = []

    def sampler(prompts, keys):
        seen.extend(keys)
        return always([A], prompts, keys)

    learn(world, sampler, "pipeline.advantage=rloo", "pipeline.samples_per_prompt=2", "seed=5", steps=2)
    assert seen[:3] == [(5, 0, 0, 0), (5, 0, 0, 1), (5, 0, 1, 0)]
    assert seen[8] == (5, 1, 0, 0)
    assert len(set(seen)) == 16
