"""Takes a step of every pipeline on fake CUDA and prints, as JSON, what each asked of the device. Run by `test_steps.py`."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from typing import Any

import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily

from tests.cuda.fake_cuda import CUDA, Asked, fake, pretend
from tests.shapes import architecture
from trainer.batch import Batch, Documents
from trainer.checkpoint.saving import Copies
from trainer.data.corpus import Prompt
from trainer.data.labelled import LabelledBatch
from trainer.data.pairs import AnswerBatch, Pair, collate, collate_shared_prefix
from trainer.data.rows import Encoded, Segment
from trainer.data.rows import collate as collate_rows
from trainer.diagnostics.guard import Guard, GuardSettings
from trainer.functional import Head, cross_entropy, logprobs
from trainer.generation.completion import Completion
from trainer.loop import train_step
from trainer.models.actor_critic import ActorCritic
from trainer.models.architecture import Architecture
from trainer.models.context import PackedContext
from trainer.models.lora import LoRA
from trainer.models.rope import angles
from trainer.models.transformer import Transformer
from trainer.optim import AdamW, Muon
from trainer.parallel import distributed
from trainer.parallel.ddp import DDP
from trainer.parallel.engine import Fragment
from trainer.parallel.precision import Compute, Precision
from trainer.pipelines.base import Models
from trainer.pipelines.dpo import DPO
from trainer.pipelines.kto import KTO
from trainer.pipelines.ppo import PPO
from trainer.pipelines.pretrain import Pretrain
from trainer.pipelines.reward import RewardModelling
from trainer.pipelines.sft import SFT
from trainer.rl.actor import Actor
from trainer.rl.experience import Experience
from trainer.rl.scoring import PromptGroup
from trainer.tracking.throughput import Stopwatch

VOCABULARY, LENGTH = 512, 64
BF16 = Precision(compute=Compute.bf16)
DRAW = random.Random(0)


def shape(*, scores: bool = False) -> Architecture:
    return architecture(
        num_hidden_layers=2, hidden_size=64, intermediate_size=128, num_attention_heads=4, num_key_value_heads=2,
        head_dim=16, vocab_size=VOCABULARY, scores=scores,
    )  # fmt: skip


def ids(count: int) -> list[int]:
    return [DRAW.randrange(VOCABULARY) for _ in range(count)]


def rows(*, masked: bool = False) -> Batch:
    import numpy as np

    sizes = [20, 30]
    trained = np.array([n % 2 == 0 for n in range(51)]) if masked else None
    segments = [Segment(np.array(ids(size + 1)), None if trained is None else trained[: size + 1]) for size in sizes]
    return collate_rows([segments, segments], [0, 1], LENGTH, 0)


def answer(prompt: list[int], size: int) -> Encoded:
    return Encoded([*prompt, *ids(size)], [False] * len(prompt) + [True] * size)


def pairs() -> Batch:
    prompts = [ids(5), ids(7)]
    return collate([Pair(answer(p, 6), answer(p, 9), len(p), 0.5, (-1.0, -2.0)) for p in prompts], [0, 1])


def labelled() -> Batch:
    def side() -> AnswerBatch:
        fields = collate_shared_prefix([(0, [answer(ids(5), 6)]), (0, [answer(ids(3), 4)])], [0, 1])
        return AnswerBatch(**fields, reference=torch.zeros(2))

    return LabelledBatch(**vars(side()), labels=torch.tensor([1.0, -1.0]), mismatched=side())


def rollout() -> Batch:
    lengths = torch.tensor([6, 4, 5, 3])
    count = int(lengths.sum())
    columns = {
        name: torch.rand(count) for name in ("sampled", "logprobs", "reference", "values", "advantages", "returns")
    }
    experience = Experience(
        rows=torch.arange(2), prompt_lengths=torch.tensor([5, 5]), prompts=torch.tensor(ids(10)), lengths=lengths,
        ids=torch.tensor(ids(count)), weights=torch.ones(count), units=torch.ones(4), **columns,
    )  # fmt: skip
    batch = experience.batch([0, 1])
    batch.rollout_metrics = {f"rollout/{n}": float(n) for n in range(8)}
    return batch


def actor_critic() -> ActorCritic:
    module = ActorCritic(shape())
    module.critic = Transformer(shape(scores=True))
    module.rates = {"critic.": 5e-6}
    return module


def lora() -> Transformer:
    module = Transformer(shape())
    LoRA(rank=4).install(module, grown=False)
    return module


def step(
    pipeline: Any,
    batch: Callable[[], Batch],
    module: Callable[[], Any] = lambda: Transformer(shape()),
    optimizer: Any = None,
    strategy: Any = None,
    precision: Precision = BF16,
) -> dict[str, Any]:
    """The second of two steps of two micro-batches, by default under DDP in bfloat16: by then optimizer states exist."""
    strategy = strategy or DDP()
    with fake():
        with CUDA, strategy.construction():
            trained = module()
        strategy.place(trained, trained.model.layers, precision)
        engine = strategy.wrap(trained, optimizer or AdamW(lr=1e-3), precision)
        frozen = {}
        if getattr(pipeline, "uses_reference", False):
            with CUDA, strategy.construction():
                reference = Transformer(shape())
            strategy.place(reference, reference.model.layers, precision)
            with CUDA:
                frozen["reference"] = strategy.freeze(reference, precision)
        models = Models(engine.model, None, "", frozen)  # type: ignore[arg-type]
        guard, watch = Guard(GuardSettings(spike_deviations=8.0), CUDA), Stopwatch(CUDA)
        for number in range(2):
            with unset_fake_temporarily():
                batches = [batch() for _ in range(2)]
            with Asked() as asked:
                engine.set_lr(1.0)
                train_step(pipeline, models, engine, guard, watch, batches, (0, number))
    return asked.report()


def rescored() -> dict[str, Any]:
    """What an iteration's log-probabilities, values and reference cost, in several forwards."""
    with fake():
        with CUDA:
            engine = DDP().wrap(actor_critic(), AdamW(lr=1e-3), BF16)
            reference = DDP().freeze(Transformer(shape()), BF16)
        ppo = PPO()
        actor = Actor(engine, None, ppo.rollout, critic=True, reference=reference)  # type: ignore[arg-type]
        long = [Completion(ids(2500), [-1.0] * 2500, True)]
        groups = [PromptGroup(n, n, Prompt(ids(4), ""), long) for n in range(3)]
        with Asked() as asked:
            actor.logprobs(groups)
    return asked.report()


def saved() -> dict[str, Any]:
    """What a checkpoint asks of the device before anybody waits for it."""
    with fake():
        with CUDA:
            fragments = [Fragment.of_tensor(str(size), "param", (size,), 0, torch.empty(size)) for size in (7, 1000)]
        with Asked() as asked:
            Copies(fragments).wait()
    return asked.report()


def vocabulary() -> dict[str, Any]:
    """The loss and the log-probabilities of 32,768 tokens of 128,256 pieces, with their gradients."""
    with fake(), torch.autocast("cuda", torch.bfloat16):
        with CUDA:
            hidden = torch.empty(8, 4096, 64, requires_grad=True)
            weight, mask = torch.empty(128_256, 64, requires_grad=True), torch.empty(8, 4096)
            targets = torch.empty(8, 4096, dtype=torch.int64)
        with Asked() as asked:
            cross_entropy(hidden, Head(weight), targets=targets, mask=mask)[0].backward()
        with Asked() as read:
            logprobs(hidden, Head(weight), targets=targets)[0].sum().backward()
    return {"loss": asked.report(), "logprobs": read.report()}


def layer() -> dict[str, Any]:
    """A block's forward and backward, in the first micro-batch of a step and in one that finds weights cast and gradients."""
    a, counts, packed = shape(), {}, Documents.from_lengths([50, 78], 2)
    with fake(), torch.autocast("cuda", torch.bfloat16):
        with CUDA:
            block = Transformer(a).model.layers[0]
            x = torch.empty(2, LENGTH, a.hidden_size, dtype=torch.bfloat16, requires_grad=True)
            inverse = torch.empty(a.head_dim // 2)
        with Asked():
            documents = packed.to(CUDA)
        turned = angles(inverse, 1.0, documents.positions, torch.bfloat16)

        for name in ("first", "later"):
            with Asked() as forward:
                out = block(x, turned, PackedContext(documents))
            gradient = torch.empty_like(out)
            with Asked() as backward:
                out.backward(gradient)
            x.grad = None
            counts[name] = {"forward": forward.report(), "backward": backward.report()}
    return counts


def main() -> None:
    pretend()
    distributed._world = distributed.World(0, 1, 0, CUDA)
    done = {
        "pretrain": step(Pretrain(z_loss=1e-4), rows),
        "sft": step(SFT(), lambda: rows(masked=True)),
        "lora": step(SFT(), lambda: rows(masked=True), lora),
        "muon": step(Pretrain(), rows, optimizer=Muon(lr=1e-3)),
        "dpo": step(DPO(), pairs),
        "kto": step(KTO(), labelled),
        "reward": step(RewardModelling(), pairs, lambda: Transformer(shape(scores=True))),
        "ppo": step(PPO(), rollout, actor_critic),
    }
    done = {"steps": done, "rescored": rescored(), "saved": saved(), **vocabulary(), "layer": layer()}
    print(json.dumps(done), flush=True)
    # The device's thread of autograd never ends.
    os._exit(0)


if __name__ == "__main__":
    main()
