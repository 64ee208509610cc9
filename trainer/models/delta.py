"""Gated DeltaNet (Yang et al. 2024, arXiv:2412.06464): a mixer whose memory of a sequence is a matrix a head, of fixed size.

A token lets the matrix fade, takes out what its key finds in it, and writes its value there. A chunk of tokens is solved at
once: what each writes depends on those before it in the chunk, a unit-triangular system.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trainer.batch import Branches, Documents
from trainer.models.architecture import Architecture
from trainer.models.cpu_kernels import take
from trainer.models.linear import BlockLinear

CHUNK = 64
"""Tokens that are solved together: fewer are more steps, more a larger system (measured on CPU: 64 is fastest)."""
SHORTEST, LONGEST = 1e-3, 1e-1
"""Time steps of new heads, drawn evenly in their logarithm."""


class DeltaInputs(NamedTuple):
    """What a layer's tokens bring to its memory.

    mixed: queries, keys and values before their convolution ``(B, T, C)``
    decay: logarithm of what is left of the memory ``(B, T, H)``, float32
    beta: how much of what a key finds is replaced ``(B, T, H)``
    """

    mixed: Tensor
    decay: Tensor
    beta: Tensor


class DeltaState(NamedTuple):
    """What a layer has of the tokens behind it.

    matrices: of each sequence and head ``(n, H, K, V)``, float32
    columns: ``mixed`` of the last tokens, which the convolution looks back on ``(n, width - 1, C)``
    """

    matrices: Tensor
    columns: Tensor


Pass = Callable[[DeltaInputs, Tensor, DeltaState | None, Tensor | None], tuple[Tensor, DeltaState]]
"""(inputs, positions, memory, lengths) -> outputs ``(B, T, H, V)`` and the memory behind them: `GatedDeltaNet.passed`."""


class RecurrentContext(Protocol):
    """What passes a layer's tokens on, each behind those before it in its own document."""

    def recur(self, layer: int, passed: Pass, inputs: DeltaInputs) -> Tensor: ...


class GatedDeltaNet(nn.Module):
    """The mixer of Qwen3-Next and Qwen3.5, in attention's place. Parameter names are Hugging Face's."""

    def __init__(self, a: Architecture, number: int) -> None:
        super().__init__()
        self.number = number
        self.heads, self.sizes = (a.delta_key_heads, a.delta_value_heads), (a.delta_key_size, a.delta_value_size)
        keys, values = (heads * size for heads, size in zip(self.heads, self.sizes, strict=True))
        self.widths = (keys, keys, values)
        self.in_proj_qkv = BlockLinear(a.hidden_size, sum(self.widths), bias=False)
        self.in_proj_z = BlockLinear(a.hidden_size, values, bias=False)
        self.in_proj_b = BlockLinear(a.hidden_size, a.delta_value_heads, bias=False)
        self.in_proj_a = BlockLinear(a.hidden_size, a.delta_value_heads, bias=False)
        self.conv1d = ShortConvolution(sum(self.widths), a.delta_width)
        self.dt_bias = nn.Parameter(torch.ones(a.delta_value_heads))
        self.A_log = nn.Parameter(torch.zeros(a.delta_value_heads))
        self.norm = GatedNorm(a.delta_value_size, a.rms_norm_eps)
        self.out_proj = BlockLinear(values, a.hidden_size, bias=False)

    def forward(
        self, x: Tensor, turned: Sequence[Tensor], context: RecurrentContext, places: Tensor | None = None
    ) -> Tensor:
        decay = -self.A_log.float().exp() * F.softplus(self.in_proj_a(x).float() + self.dt_bias.float())
        inputs = DeltaInputs(self.in_proj_qkv(x), decay, self.in_proj_b(x).sigmoid())
        out = context.recur(self.number, self.passed, inputs)
        if places is not None:
            out, x = out.index_select(1, places), x.index_select(1, places)
        gate = self.in_proj_z(x).unflatten(-1, (self.heads[1], -1))
        return self.out_proj(self.norm(out, gate).flatten(2).to(x.dtype))  # type: ignore[no-any-return]

    def passed(
        self, inputs: DeltaInputs, positions: Tensor, memory: DeltaState | None = None, lengths: Tensor | None = None
    ) -> tuple[Tensor, DeltaState]:
        """Outputs ``(B, T, H, V)`` of tokens, and the memory behind the last one of each row.

        Args:
            inputs: Of rows of documents, end to end.
            positions: Of every token in its document ``(B, T)``; at 0 nothing is left of what came before.
            memory: What stands before each row's first token, if that is not at 0; None = nothing.
            lengths: Tokens of each row ``(B,)``, behind which it is padded with zeros; None = all.
        """
        mixed, columns = self.conv1d(inputs.mixed, positions, None if memory is None else memory.columns, lengths)
        q, k, v = (
            t.unflatten(-1, (-1, size)) for t, size in zip(mixed.split(self.widths, -1), self._sizes, strict=True)
        )
        q, k = (_unit(t).repeat_interleave(self.heads[1] // self.heads[0], 2) for t in (q, k))
        state = None if memory is None else memory.matrices
        if memory is not None and positions.shape[1] == 1:
            out, state = delta_step(q, k, v, inputs.decay, inputs.beta, memory.matrices)
        else:
            out, state = delta_rule(q, k, v, inputs.decay, inputs.beta, (positions == 0).cumsum(1), state)
        return out, DeltaState(state, columns)

    @property
    def _sizes(self) -> tuple[int, int, int]:
        return self.sizes[0], self.sizes[0], self.sizes[1]


class ShortConvolution(nn.Module):
    """A causal convolution of each channel over its document's last tokens, through a SiLU."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(channels, 1, width))

    def forward(
        self, x: Tensor, positions: Tensor, before: Tensor | None, lengths: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Of ``x`` ``(B, T, C)``; with it the last ``width - 1`` columns of each row, those ``before`` it among them."""
        width, length = self.weight.shape[-1], x.shape[1]
        before = x.new_zeros(len(x), width - 1, x.shape[2]) if before is None else before.to(x.dtype)
        padded = torch.cat([before, x], 1)
        out = padded[:, width - 1 :] * self.weight[:, 0, -1]
        for back in range(1, width):
            reached = (positions >= back)[..., None]
            first = width - 1 - back
            out = out + padded[:, first : first + length] * self.weight[:, 0, first] * reached
        if lengths is None:
            return F.silu(out), padded[:, length:]
        places = lengths[:, None] + torch.arange(width - 1, device=x.device)
        return F.silu(out), padded.gather(1, places[..., None].expand(-1, -1, x.shape[2]))


class GatedNorm(nn.Module):
    """``weight * x / sqrt(mean(x ** 2) + eps) * silu(gate)``, in float32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return wide * self.weight.float() * F.silu(gate.float())


def delta_rule(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor, document: Tensor, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Outputs ``(B, T, H, V)`` and the last memory ``(B, H, K, V)``, both float32.

    Documents are told apart by masks: a decay that forgets everything would be infinite, or cost the digits of the sums.

    Args:
        q, k: Of unit length ``(B, T, H, K)``.
        v: ``(B, T, H, V)``.
        decay, beta: As in `DeltaInputs`.
        document: The number of every token's document ``(B, T)``, which never falls; ``state`` is of number 0.
        state: What stands before the first token ``(B, H, K, V)``; None = nothing.
    """
    rows, length, heads, size = q.shape
    spare = -length % CHUNK
    document = torch.cat([document, document[:, -1:].expand(-1, spare)], 1).view(rows, 1, -1, CHUNK)
    with torch.autocast(q.device.type, enabled=False):
        wide = (q.float() * size**-0.5, k.float(), v.float(), decay.float()[..., None], beta.float()[..., None])
        q, k, v, decay, beta = (_chunked(t, spare) for t in wide)
        total = decay.squeeze(-1).cumsum(-1)  # (B, H, N, C)
        same = document[..., :, None] == document[..., None, :]
        faded = (total[..., :, None] - total[..., None, :]).masked_fill(~same, -torch.inf).tril().exp().tril()
        before = F.pad(document[..., -1], (1, -1))  # the document that the chunk before ends with
        entering = (total.exp() * (document == before[..., None]))[..., None]  # what is left of the incoming memory
        system = (k @ k.transpose(-1, -2) * faded * beta).tril(-1)
        right = torch.cat([v * beta, k * entering * beta], -1)
        solved = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)
        own, read = solved.split([v.shape[-1], size], -1)
        inside = q @ k.transpose(-1, -2) * faded
        asked, lasting = q * entering, (k * faded[..., -1, :, None]).transpose(-1, -2)
        state = v.new_zeros(rows, heads, size, v.shape[-1]) if state is None else state.float()
        out = []
        for n in range(k.shape[2]):
            written = own[:, :, n] - read[:, :, n] @ state
            out.append(asked[:, :, n] @ state + inside[:, :, n] @ written)
            state = state * entering[:, :, n, -1:] + lasting[:, :, n] @ written
    return torch.cat(out, 2)[:, :, :length].transpose(1, 2), state


def delta_step(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """As `delta_rule`, of a single token in each row, which continues its document."""
    q, k, v, decay, beta = (t[:, 0].float() for t in (q, k, v, decay, beta))
    state = state * decay.exp()[..., None, None]
    written = (v - (state * k[..., None]).sum(-2)) * beta[..., None]
    state = state + k[..., None] * written[..., None, :]
    return (state * q[..., None]).sum(-2)[:, None] * q.shape[-1] ** -0.5, state


def recur_packed(documents: Documents | Branches, passed: Pass, inputs: DeltaInputs) -> Tensor:
    """Outputs of packed documents, or of the sequences that share tokens of a row, each with a memory of its own."""
    if isinstance(documents, Documents):
        return passed(inputs, documents.positions, None, None)[0]
    sequences = DeltaInputs(*(take(t, 1, documents.index) for t in inputs))
    return take(passed(sequences, documents.sequences.positions, None, None)[0], 1, documents.back)


def initial_delta(name: str, shape: Sequence[int], generator: torch.Generator) -> Tensor | None:
    """First values of its norm, and of what is neither matrix nor norm, as in the paper's code; None for others.

    A head's decay is ``exp(-A dt)``: A is even in (0, 16), and the bias makes dt even in its logarithm.
    """
    if name.endswith("linear_attn.A_log"):
        return torch.empty(*shape).uniform_(1e-4, 16, generator=generator).log()
    if name.endswith("linear_attn.dt_bias"):
        dt = torch.empty(*shape).uniform_(math.log(SHORTEST), math.log(LONGEST), generator=generator).exp()
        return dt + (-(-dt).expm1()).log()  # whose softplus is dt
    if name.endswith("linear_attn.norm.weight"):
        return torch.ones(*shape)
    return None


def _chunked(t: Tensor, spare: int) -> Tensor:
    """``(B, T, H, D)`` to ``(B, H, N, C, D)``, padded by ``spare`` tokens that change nothing."""
    padded = F.pad(t, (0, 0, 0, 0, 0, spare))
    return padded.reshape(len(t), -1, CHUNK, *t.shape[2:]).permute(0, 3, 1, 2, 4)


def _unit(x: Tensor) -> Tensor:
    wide = x.float()
    return wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + 1e-6)
