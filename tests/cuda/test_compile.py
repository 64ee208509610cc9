"""Compiled blocks on emulated kernels: how many graphs there are, and that they stay."""

import random
from functools import partial

import pytest
import torch
from torch._dynamo.backends.debugging import aot_eager

from tests.cuda.emulated_varlen import emulated
from tests.unit.models.test_transformer import built
from trainer.batch import Branches, Documents
from trainer.functional import cross_entropy, logits, logprobs_at
from trainer.generation.generate import generate
from trainer.generation.sampling import Sampling
from trainer.models.recompute import Recompute
from trainer.parallel import distributed, sharding
from trainer.parallel.mesh import Mesh, MeshShape


class Graphs:
    """A backend that computes as written and counts what it is given."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, graph, inputs):
        self.count += 1
        return aot_eager(graph, inputs)


def packed_step(model, number: int) -> float:
    """A loss and its gradient of two rows of documents, other ones at every step."""
    draw = random.Random(number)
    tokens = torch.tensor([[draw.randrange(50) for _ in range(32)] for _ in range(2)])
    lengths = [64 - 10 * (number + 1), *[5] * (2 * (number + 1))]
    read = partial(cross_entropy, targets=tokens.roll(-1), mask=torch.ones(2, 32))
    loss = model(tokens, Documents.from_lengths(lengths, 2), read)[0]
    loss.backward()
    return loss.item()


def branched_step(model, number: int) -> float:
    """A sum and its gradient of two answers to one prompt, read at some tokens only; other lengths at every step."""
    prompt, first, second, draw = 3 + number, 9 + number, 5 + 2 * number, random.Random(number)
    total = prompt + first + second
    sequences = [range(prompt + first), [*range(prompt), *range(prompt + first, total)]]
    tokens = torch.tensor([[draw.randrange(50) for _ in range(total)]])
    places = torch.arange(prompt, total)
    values, _ = model(tokens, Branches.of(sequences, total), logprobs_at(places, tokens[0, places]))
    values.sum().backward()
    return values.sum().item()


@pytest.mark.parametrize(
    ("step", "recompute", "kinds", "attended"),
    [
        (packed_step, Recompute.none, 1, 3),
        (packed_step, Recompute.selective, 1, 3),
        (packed_step, Recompute.full, 1, 6),
        # The last block computes the wanted tokens alone.
        (branched_step, Recompute.none, 2, 3),
    ],
)
def test_blocks_are_compiled_once_a_kind_and_stay_so_whatever_is_sampled(step, recompute, kinds, attended):
    """First with the sizes of the first step, then for all sizes; without a break, which `fullgraph` refuses."""
    torch._dynamo.reset()
    graphs, plain, model = Graphs(), built(), built(activation_checkpointing=recompute)
    model.compile_blocks(graphs)
    counts = []
    with torch.autocast("cpu", torch.bfloat16), emulated() as calls:
        for number in range(3):
            expected = step(plain.train(), number)
            calls.clear()
            assert step(model.train(), number) == pytest.approx(expected, rel=1e-2)  # bfloat16 sums in another order
            # Attention of three layers: computed again in the backward only where everything is.
            assert len(calls) == attended
            counts.append(graphs.count)
            with torch.no_grad():
                model.eval()(torch.tensor([[1, 2, 3]]), Documents.from_lengths((3,), 1), logits)
                generate(model, [[1, 2, 3], [4]], Sampling(2 + number, 1.0), stops=())
    assert counts == [kinds, *[2 * kinds] * 2]


def test_blocks_in_shards_are_compiled_as_whole_ones_are():
    """What gathers a block's weights is around its graph, and around what is computed again."""
    torch._dynamo.reset()
    with distributed.session():
        graphs, plain, model = Graphs(), built(), built(activation_checkpointing=Recompute.full)
        sharding.shard(model, model.model.layers, Mesh.of(MeshShape()), dtype=None, reshard=True, offload=False)
        model.compile_blocks(graphs)
        counts = []
        with torch.autocast("cpu", torch.bfloat16), emulated():
            for number in range(3):
                expected = packed_step(plain.train(), number)
                assert packed_step(model.train(), number) == pytest.approx(expected, rel=1e-2)  # as above
                counts.append(graphs.count)
    assert counts == [1, 2, 2]


def test_the_eager_backward_computes_attention_again_only_under_full_recomputation():
    for recompute, attended in {Recompute.none: 3, Recompute.selective: 3, Recompute.full: 6}.items():
        with torch.autocast("cpu", torch.bfloat16), emulated() as calls:
            packed_step(built(activation_checkpointing=recompute).train(), 0)
        assert len(calls) == attended
