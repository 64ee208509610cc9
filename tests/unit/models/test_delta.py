"""Gated DeltaNet: what the paper's recurrence gives, token by token, whatever documents are packed with."""

from types import SimpleNamespace

import pytest
import torch

from trainer.batch import Branches, Documents
from trainer.models.delta import DeltaInputs, GatedDeltaNet, delta_rule, delta_step, initial_delta, recur_packed

SHAPE = SimpleNamespace(
    hidden_size=24, delta_key_heads=2, delta_value_heads=4, delta_key_size=8, delta_value_size=6, delta_width=4,
    rms_norm_eps=1e-6,
)  # fmt: skip
LENGTHS = [5, 64, 1, 100, 130]


@pytest.fixture(scope="module")
def layer():
    torch.manual_seed(0)
    layer = GatedDeltaNet(SHAPE, 0)
    for name, parameter in layer.named_parameters():
        torch.nn.init.normal_(parameter, 1.0 if name == "norm.weight" else 0.0, 0.3)
    return layer


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


class OfDocuments:
    def __init__(self, documents):
        self.documents = documents

    def recur(self, _, passed, inputs):
        return recur_packed(self.documents, passed, inputs)


def run(layer, x, lengths, rows=1):
    return layer(x, (), OfDocuments(Documents.from_lengths(lengths, rows)))


def drawn(rows: int, length: int):
    torch.manual_seed(1)
    q, k = (torch.nn.functional.normalize(torch.randn(rows, length, 2, 8), dim=-1) for _ in range(2))
    decay, beta = -torch.rand(rows, length, 2), torch.rand(rows, length, 2)
    return q, k, torch.randn(rows, length, 2, 6), decay, beta


def test_a_chunk_gives_what_the_recurrence_gives_token_by_token():
    """S_t = a S_{t-1} + k (b (v - (a S_{t-1})^T k))^T and o_t = S_t^T q / sqrt(K), equation 10 of the paper."""
    q, k, v, decay, beta = drawn(2, 150)
    start = torch.randn(2, 2, 8, 6)
    state, expected = start, []
    for t in range(150):
        state = decay[:, t, :, None, None].exp() * state
        read = torch.einsum("nhkv,nhk->nhv", state, k[:, t])
        state = state + torch.einsum("nhk,nhv->nhkv", k[:, t], beta[:, t, :, None] * (v[:, t] - read))
        expected.append(torch.einsum("nhkv,nhk->nhv", state, q[:, t]) / 8**0.5)
    out, last = delta_rule(q, k, v, decay, beta, torch.zeros(2, 150, dtype=torch.int64), start)
    torch.testing.assert_close(out, torch.stack(expected, 1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(last, state, rtol=1e-5, atol=1e-5)
    first = tuple(t[:, :1] for t in (q, k, v, decay, beta))
    torch.testing.assert_close(delta_step(*first, start)[0], expected[0][:, None], rtol=1e-5, atol=1e-5)


def test_packed_documents_and_their_gradients_are_those_of_each_alone(layer):
    x = torch.randn(2, sum(LENGTHS), 24, requires_grad=True)
    packed = run(layer, x, LENGTHS * 2, rows=2)
    alone = torch.cat([run(layer, part, [part.shape[1]] * 2, rows=2) for part in x.split(LENGTHS, 1)], 1)
    assert (packed - alone).abs().max() <= 2e-5 * alone.abs().max()
    upstream = torch.randn_like(packed)
    both = (torch.autograd.grad(out, [x, *layer.parameters()], upstream) for out in (packed, alone))
    for one, other in zip(*both, strict=True):
        assert (one - other).abs().max() <= 5e-5 * other.abs().max()


def test_sequences_that_share_a_beginning_are_those_of_each_alone(layer):
    x = torch.randn(1, 90, 24)
    sequences = [[*range(70), *range(70, 80)], [*range(70), *range(80, 90)]]
    out = layer(x, (), OfDocuments(Branches.of(sequences, 90)))
    for places in sequences:
        torch.testing.assert_close(out[:, places], run(layer, x[:, places], [80]), rtol=1e-5, atol=1e-5)


def test_a_row_padded_behind_leaves_the_memory_of_its_last_token(layer):
    inputs = DeltaInputs(torch.randn(2, 9, 56), -torch.rand(2, 9, 4), torch.rand(2, 9, 4))
    lengths, positions = torch.tensor([9, 2]), torch.arange(9).expand(2, -1)
    real = (positions < lengths[:, None])[..., None]
    _, padded = layer.passed(DeltaInputs(*(t * real for t in inputs)), positions, None, lengths)
    _, alone = layer.passed(DeltaInputs(*(t[1:, :2] for t in inputs)), positions[1:, :2])
    for one, other in zip(padded, alone, strict=True):
        torch.testing.assert_close(one[1:], other)


@pytest.mark.parametrize("length", [1, 3, 64, 70])
def test_a_layer_goes_on_where_it_stopped(layer, length):
    inputs = DeltaInputs(torch.randn(1, 100, 56), -torch.rand(1, 100, 4), torch.rand(1, 100, 4))
    positions = torch.arange(100)[None]
    whole, last = layer.passed(inputs, positions)
    cuts = [(0, length), (length, length + 1), (length + 1, 100)]
    state, parts = None, []
    for first, end in cuts:
        out, state = layer.passed(DeltaInputs(*(t[:, first:end] for t in inputs)), positions[:, first:end], state)
        parts.append(out)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(state.matrices, last.matrices, rtol=1e-5, atol=1e-5)
    assert torch.equal(state.columns, last.columns)


def test_a_layer_computes_what_transformers_computes(layer):
    modeling = pytest.importorskip("transformers.models.qwen3_5.modeling_qwen3_5")
    configuration = pytest.importorskip("transformers.models.qwen3_5.configuration_qwen3_5")
    config = configuration.Qwen3_5TextConfig(
        hidden_size=24, num_hidden_layers=1, layer_types=["linear_attention"], linear_num_key_heads=2,
        linear_num_value_heads=4, linear_key_head_dim=8, linear_value_head_dim=6, linear_conv_kernel_dim=4,
    )  # fmt: skip
    theirs = modeling.Qwen3_5GatedDeltaNet(config, 0)
    theirs.load_state_dict(layer.state_dict())
    x = torch.randn(2, 150, 24)
    torch.testing.assert_close(run(layer, x, [150, 150], rows=2), theirs(x), rtol=1e-5, atol=1e-5)


def test_new_heads_forget_at_rates_that_the_paper_draws():
    draw = torch.Generator().manual_seed(0)
    steps = torch.nn.functional.softplus(initial_delta("model.layers.0.linear_attn.dt_bias", (20000,), draw))
    assert 1e-3 <= steps.min() <= steps.max() <= 0.1001
    assert steps.log().mean().item() == pytest.approx(-4.605, abs=0.02)  # ln 0.01, the middle of ln 0.001 and ln 0.1
    rates = initial_delta("model.layers.0.linear_attn.A_log", (20000,), draw).exp()
    assert rates.mean().item() == pytest.approx(8, abs=0.15)
    assert initial_delta("model.layers.0.linear_attn.norm.weight", (4,), draw).tolist() == [1] * 4
    assert initial_delta("model.layers.0.linear_attn.in_proj_z.weight", (4, 4), draw) is None
