"""The decoder: initialisation, activation checkpointing, compilation."""

from functools import partial

import pytest
import torch
from torch._dynamo.backends.debugging import aot_eager
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from trainer.batch import Documents
from trainer.functional import At, cross_entropy, logprobs
from trainer.models.initial import initial
from trainer.models.load import Model, ModelLoader
from trainer.models.recompute import Recompute
from trainer.parallel.ddp import DDP

SMALL = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64,
}  # fmt: skip


def built(seed: int = 0, **changes):
    return ModelLoader(Model(**{**SMALL, **changes}), DDP(), seed, 50).load()


def gradients(model) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(1)
    tokens, targets = (torch.randint(0, 50, (2, 24), generator=draw) for _ in range(2))
    documents = Documents.from_lengths((10, 14, 24), 2)
    read = partial(cross_entropy, targets=targets, mask=torch.ones(2, 24))
    model.train()
    model(tokens, documents, read)[0].backward()
    return {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("recompute", list(Recompute))
def test_reading_some_tokens_gives_what_is_found_there_in_all_of_them(recompute):
    draw = torch.Generator().manual_seed(1)
    tokens, targets = torch.randint(0, 50, (1, 24), generator=draw), torch.randint(0, 50, (3,), generator=draw)
    places, found = torch.tensor([2, 9, 20]), []

    def picked(hidden, head):
        return logprobs(hidden[:, places], head, targets=targets[None])

    for read in (picked, At(places, partial(logprobs, targets=targets[None]))):
        model = built(activation_checkpointing=recompute).train()
        values, entropy = model(tokens, Documents.from_lengths((10, 14), 1), read)
        (values.sum() + entropy.square().sum()).backward()
        found.append([values, entropy, *(p.grad for p in model.parameters())])
    for whole, part in zip(*found, strict=True):
        torch.testing.assert_close(part, whole, rtol=1e-5, atol=1e-6)  # float32 sums of other shapes


@pytest.mark.parametrize("recompute", [Recompute.selective, Recompute.full])
def test_recomputing_activations_changes_no_bit_of_the_gradient(recompute):
    plain, again = gradients(built()), gradients(built(activation_checkpointing=recompute))
    assert all(torch.equal(plain[name], again[name]) for name in plain)


class Attentions(TorchDispatchMode):
    """Counts forwards of attention in bfloat16 on CPU."""

    made = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.made += operation is torch.ops.onecurve.causal_attention.default
        return operation(*args, **(kwargs or {}))


@pytest.mark.parametrize(("recompute", "times"), [(Recompute.selective, 1), (Recompute.full, 2)])
def test_selective_recomputation_keeps_bfloat16_attention_on_cpu(recompute, times):
    grads = {}
    for how in (Recompute.none, recompute):
        model = built(activation_checkpointing=how, max_position_embeddings=256).train()
        tokens = torch.arange(200)[None] * 7 % 50
        read = partial(cross_entropy, targets=tokens, mask=torch.ones(1, 200))
        with Attentions() as attentions, torch.autocast("cpu", torch.bfloat16):
            model(tokens, Documents.from_lengths((200,), 1), read)[0].backward()
        grads[how] = [p.grad for p in model.parameters()]
    assert attentions.made == 3 * times
    assert all(map(torch.equal, *grads.values()))


def kept_for_backward(recompute: Recompute) -> int:
    """Bytes of what a forward keeps, less the weights."""
    model = built(activation_checkpointing=recompute).train()
    tokens = torch.randint(0, 50, (2, 24))
    read = partial(cross_entropy, targets=tokens, mask=torch.ones(2, 24))
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.data_ptr()] = tensor  # alive, so that no other takes its place
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        model(tokens, Documents.from_lengths((24, 24), 2), read)
    weights = {p.data_ptr() for p in model.parameters()}
    return sum(tensor.nbytes for at, tensor in kept.items() if at not in weights)


def test_recomputing_keeps_less():
    assert kept_for_backward(Recompute.full) < 0.5 * kept_for_backward(Recompute.none)


def test_a_parameter_s_first_value_depends_on_seed_and_name_alone():
    first, deeper, other = built(), built(num_hidden_layers=4), built(seed=1)
    name = "model.layers.1.self_attn.q_proj.weight"
    assert torch.equal(first.get_parameter(name), deeper.get_parameter(name))
    assert not torch.equal(first.get_parameter(name), other.get_parameter(name))
    assert not torch.equal(first.get_parameter(name), first.get_parameter(name.replace("layers.1", "layers.2")))


def test_new_weights_have_the_deviation_that_is_asked_for():
    wide = initial("model.layers.0.mlp.up_proj.weight", (400, 500), 0, 0.02, 8)
    assert wide.std().item() == pytest.approx(0.02, rel=0.02)  # 200,000 draws: one standard error is 0.16%
    out = initial("model.layers.0.mlp.down_proj.weight", (400, 500), 0, 0.02, 8)
    assert out.std().item() == pytest.approx(0.02 / 4, rel=0.02)  # 1 / sqrt(2 * 8)
    assert initial("model.norm.weight", (7,), 0, 0.02, 8).tolist() == [1] * 7
    assert initial("model.layers.0.self_attn.q_proj.bias", (7,), 0, 0.02, 8).tolist() == [0] * 7


@pytest.mark.slow
@pytest.mark.parametrize("recompute", [Recompute.none, Recompute.full])
def test_a_compiled_model_learns_the_same(recompute):
    plain, compiled = gradients(built()), gradients(built(compile=True, activation_checkpointing=recompute))
    for name, expected in plain.items():
        # Fused kernels sum in another order: float32, relative to the largest entry.
        torch.testing.assert_close(compiled[name], expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def test_compiled_blocks_in_bf16_on_the_cpu_take_documents_of_any_lengths():
    """Attention there goes by length, which the host decides: no graph holds it."""
    torch._dynamo.reset()
    with torch.autocast("cpu", torch.bfloat16):
        expected, compiled = gradients(built()), built(activation_checkpointing=Recompute.full)
        compiled.compile_blocks(aot_eager)
        found = gradients(compiled)
    assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())
