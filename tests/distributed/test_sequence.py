"""Tokens divided among the ranks of a replica: the curve of one rank, whatever the model, and bitwise equal ranks."""

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from tests.cuda.emulated_varlen import emulated
from tests.mixtures import SMALL
from tests.ranks import on_ranks, session_of
from tests.uneven_rows import uneven_rows
from trainer.batch import Documents
from trainer.diagnostics.guard import Guard, GuardSettings
from trainer.functional import cross_entropy, logprobs_at
from trainer.loop import train_step
from trainer.models.actor_critic import ActorCritic, ValueHead, values_at
from trainer.models.adapter import Adapter, Full
from trainer.models.architecture import Architecture, Layer, Rope
from trainer.models.balance import Balancer, BalanceRates
from trainer.models.initial import initial
from trainer.models.lora import LoRA
from trainer.models.recompute import Recompute
from trainer.models.transformer import Transformer
from trainer.optim import AdamW
from trainer.parallel import distributed
from trainer.parallel.cuts import cuts_of
from trainer.parallel.ddp import DDP
from trainer.parallel.fsdp import FSDP
from trainer.parallel.mesh import UNDIVIDED, Mesh, MeshShape
from trainer.parallel.precision import Precision
from trainer.pipelines.base import Models
from trainer.pipelines.pretrain import Pretrain
from trainer.tracking.throughput import Stopwatch

ROWS, LENGTH = 8, 31
"""Two rows of 31 tokens are 62: of four ranks two have spare tokens."""
STEPS, FEW = 20, 3
LONG = ["adapters", "tied, one key head"]
"""Cases that go through all steps once; what differs in a gradient shows in a few."""
ROPE = Rope(10000.0)
DENSE: dict[str, Any] = {
    **SMALL, "experts": 0, "num_attention_heads": 8, "head_dim": 4, "layers": (Layer(rope=ROPE),) * 2,
}  # fmt: skip
CASES: dict[str, tuple[dict[str, Any], Adapter, Recompute]] = {
    "tied, one key head": (
        {"tie_word_embeddings": True, "num_key_value_heads": 1, "qk_norm": "head"}, Full(), Recompute.none
    ),
    # Three key heads divide by neither 2 nor 4.
    "windows, sinks, gates, bounds": (
        {"layers": (Layer(5, ROPE), Layer(rope=ROPE)), "sinks": True, "attention_gate": True, "logit_cap": 2.0,
         "num_attention_heads": 12, "num_key_value_heads": 3}, Full(), Recompute.selective,
    ),
    "experts": (
        {"experts": 4, "expert_size": 8, "layers": (Layer(rope=ROPE, sparse=True), Layer(rope=ROPE)), "shared_size": 8},
        Full(), Recompute.full,
    ),
    "gated delta rule": (
        {"layers": (Layer(delta=True), Layer(rope=ROPE)), "delta_key_heads": 2, "delta_value_heads": 2, "delta_key_size": 4,
         "delta_value_size": 4, "delta_width": 3}, Full(), Recompute.none,
    ),
    "adapters": ({}, LoRA(rank=4, dropout=0.2), Recompute.full),
}  # fmt: skip


rows_of = partial(uneven_rows, length=LENGTH, less=3, first=[20, 12])


def curve(case: str, strategy: Any, steps: int) -> np.ndarray:
    """Loss, gradient norm and what routers counted in every step."""
    features, adapter, recompute = CASES[case]
    with strategy.construction():
        model = Transformer(Architecture(**{**DENSE, **features}), recompute)
        adapter.install(model, grown=False)
    strategy.place(model, model.model.layers, Precision())
    for name, parameter in model.named_parameters():
        shape = strategy.shape_of(parameter)
        added = adapter.initial(name, shape, 0)
        strategy.fill(parameter, initial(name, shape, 0, 0.1, 2) if added is None else added)
    engine = strategy.wrap(model, AdamW(lr=3e-3, clip=1.0), Precision())
    balancer = Balancer(engine.module, BalanceRates(balance_loss=0.1, z_loss=0.01))
    models = Models(engine.model, None, balancer=balancer if balancer.routers else None)  # type: ignore[arg-type]
    guard, watch, data = Guard(GuardSettings(), engine.device), Stopwatch(engine.device), distributed.world().data
    lines = []
    for step in range(steps):
        mine = data.share(list(range(ROWS)))
        half = len(mine) // 2
        parts = [rows_of(step, mine[n : n + half]) for n in (0, half)]
        metrics = train_step(Pretrain(), models, engine, guard, watch, parts, (0, step))
        names = ["loss", "grad_norm", *(name for name in sorted(metrics) if name.startswith("router/"))]
        lines.append([float(metrics[name]) for name in names])
    return np.array(lines)


Layout = tuple[int, int, int, list[str]]
"""Sequence ranks, tensor ranks, steps, cases."""


def layouts(every: list[Layout]) -> list[dict[str, np.ndarray]]:
    curves = []
    for sequence, tensor, steps, cases in every:
        with session_of(sequence * tensor):
            curves.append({case: curve(case, FSDP(sequence=sequence, tensor=tensor), steps) for case in cases})
    return curves


@pytest.mark.parametrize(
    "every",
    [
        pytest.param([(2, 1, FEW, list(CASES))], id="with two data ranks"),
        pytest.param(
            [(2, 1, STEPS, LONG), (2, 2, STEPS, LONG), (4, 1, FEW, list(CASES)), (2, 2, FEW, ["experts"])],
            id="others",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_divided_tokens_follow_the_curve_of_one_rank(every):
    """On four ranks."""
    ranks = on_ranks(4, layouts, every, joined=False)
    for number, (_, _, steps, cases) in enumerate(every):
        for case in cases:
            lines, label = ranks[0][number][case], f"{every[number]}, {case}"
            # Float32 sums in another order.
            np.testing.assert_allclose(lines, curve(case, DDP(), steps), rtol=1e-5, atol=1e-6, err_msg=label)
            assert all(np.array_equal(of_rank[number][case], lines) for of_rank in ranks), label


def scored(kind: str, mesh: Mesh) -> dict[str, torch.Tensor]:
    """Gradients of scores, or of values and log-probabilities, of a single row; of this rank's blocks, over all tokens."""
    architecture = Architecture(**{**DENSE, "scores": kind == "scores"})
    model: Any = Transformer(architecture)
    if kind == "value head":
        model = ActorCritic(architecture)
        model.critic = ValueHead(architecture.hidden_size)
        model.critic.divide(mesh)
    model.divide(mesh)
    for name, cut in cuts_of(model, mesh).items():
        draw = torch.Generator().manual_seed(len(name))
        values = 0.2 * torch.randn(cut.shape, generator=draw)
        model.get_parameter(name).data = values[tuple(slice(*span) for span in cut.box)]
    places, tokens = torch.tensor([3, 9, 9, 16]), torch.arange(17)[None] * 5 % 101
    documents, read = Documents.from_lengths([10, 7], 1), values_at(places)
    if kind == "scores":
        objective = model(tokens, documents, read).square().sum()
    else:
        (logprobs, _), scores = model(tokens, documents, logprobs_at(places, places), read)
        objective = scores.square().sum() - logprobs.sum()
    objective.backward()
    gradients = {n: p.grad.to_dense() if p.grad.is_sparse else p.grad for n, p in model.named_parameters()}
    return {name: mesh.sequence.sum(gradient) for name, gradient in gradients.items()}


def scores_compared() -> list[str]:
    """The gradients that are not those of a model that nothing divides."""
    wrong = []
    with session_of(4):
        mesh, whole = Mesh.of(MeshShape(sequence=2, tensor=2)), Mesh(*[UNDIVIDED] * 7)
        for kind in ("scores", "value head"):
            divided, alone = scored(kind, mesh), scored(kind, whole)
            axis = mesh.tensor
            for name, gradient in divided.items():
                wanted = alone[name]
                for dim, (mine, all_of) in enumerate(zip(gradient.shape, wanted.shape, strict=True)):
                    if mine != all_of:
                        first, last = axis.span(all_of)
                        wanted = wanted.narrow(dim, first, last - first)
                # Float32 sums in another order.
                if (gradient - wanted).abs().max() > 1e-5 * wanted.abs().max():
                    wrong.append(f"{kind}: {name}: {(gradient - wanted).abs().max() / wanted.abs().max():.1e}")
    return wrong


def test_what_all_ranks_read_alike_has_the_gradient_of_one():
    assert on_ranks(4, scores_compared, joined=False) == [[]] * 4


def compiled() -> list[float]:
    """The largest difference of a gradient through compiled blocks and one through blocks as they are, by the largest."""
    errors = []
    with session_of(2), emulated():
        for recompute in (Recompute.none, Recompute.selective):
            gradients = []
            for compiles in (False, True):
                model = Transformer(Architecture(**{**DENSE, "head_dim": 8}), recompute).train()
                model.divide(Mesh.of(MeshShape(sequence=2)))
                for name, parameter in model.named_parameters():
                    parameter.data = initial(name, parameter.shape, 0, 0.1, 2)
                if compiles:
                    model.compile_blocks("aot_eager")
                batch = rows_of(0, [0, 1])
                read = partial(cross_entropy, targets=batch.targets, mask=batch.mask)
                with torch.autocast("cpu", torch.bfloat16):
                    model(batch.tokens, batch.documents, read)[0].backward()
                gradients.append([p.grad for p in model.parameters()])
            for mine, theirs in zip(*gradients, strict=True):
                errors.append(float((mine - theirs).abs().max() / theirs.abs().max()))
    return errors


@pytest.mark.slow
def test_blocks_compile_in_one_graph_with_their_exchanges():
    """As CUDA's branch: with its kernel for packed documents a break in the graph would raise."""
    # bfloat16 has 8 bits, and compiled blocks round less often on the way.
    assert max(max(errors) for errors in on_ranks(2, compiled, joined=False)) < 0.05
