"""The mixer of most families: attention with rotary positions, whose heads ranks may divide among them."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from trainer.models.architecture import Architecture
from trainer.models.attention import Scores
from trainer.models.linear import BlockLinear
from trainer.models.norm import divide_heads, norm_of
from trainer.models.rope import rotate
from trainer.parallel.cuts import cut
from trainer.parallel.mesh import UNDIVIDED, Axis, Mesh

Turned = tuple[Tensor, ...]
"""What a layer's mixer reads of positions: cosines, sines, and what queries grow by; () = nothing."""


class AttendingContext(Protocol):
    """What a layer's tokens see of those before them."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scores: Scores) -> Tensor: ...


class Attention(nn.Module):
    """Grouped-query attention (Ainslie et al. 2023, arXiv:2305.13245) with rotary positions.

    Attributes:
        key_heads: That this rank's queries look at.
        tensor: Ranks that each have some of the heads.
        group: Which key head that is, where there are fewer than ranks and each rank computes them all; None = it computes
            its own.
    """

    tensor: Axis = UNDIVIDED
    group: int | None = None

    def __init__(self, a: Architecture, number: int) -> None:
        super().__init__()
        self.number, self.size = number, a.head_dim
        self.key_heads = a.num_key_value_heads
        self.gated, self.interleaved = a.attention_gate, a.interleaved_rope
        self.norm, self.norm_last = a.qk_norm, a.qk_norm_after_rope
        self.scores = Scores(a.attention_scale or a.head_dim**-0.5, a.layers[number].window, a.score_cap)
        heads, groups = a.num_attention_heads, a.num_key_value_heads
        self.q_proj = BlockLinear(a.hidden_size, heads * self.size * (1 + a.attention_gate), bias=a.attention_bias)
        self.k_proj = BlockLinear(a.hidden_size, groups * self.size, bias=a.attention_bias)
        self.v_proj = BlockLinear(a.hidden_size, groups * self.size, bias=a.attention_bias)
        self.o_proj = BlockLinear(heads * self.size, a.hidden_size, bias=a.attention_output_bias)
        if a.qk_norm:
            self.q_norm = norm_of(a, *_norm_shape(a, heads))
            self.k_norm = norm_of(a, *_norm_shape(a, groups))
        self.sinks = nn.Parameter(torch.zeros(heads)) if a.sinks else None

    def divide(self, mesh: Mesh) -> None:
        """Compute this rank's heads."""
        axis = self.tensor = mesh.tensor
        self.q_proj.divide_outputs(axis)
        self.o_proj.divide_inputs(axis)
        norms = [self.q_norm] if self.norm else []
        if self.key_heads % axis.size:
            self.group, self.key_heads = axis.rank * self.key_heads // axis.size, 1
        else:
            self.key_heads //= axis.size
            self.k_proj.divide_outputs(axis)
            self.v_proj.divide_outputs(axis)
            norms += [self.k_norm] if self.norm else []
        for norm in norms:
            divide_heads(norm, self.norm, axis)
        if self.sinks is not None:
            cut(self, "sinks", 0, axis)

    def forward(self, x: Tensor, turned: Turned, context: AttendingContext, places: Tensor | None = None) -> Tensor:
        split = (*x.shape[:2], -1, self.size)
        x = self.tensor.enter(x)
        shared = x if self.group is None else self.tensor.even(x)
        q, k, v = self.q_proj(x), self.k_proj(shared).view(split), self.v_proj(shared).view(split)
        gate = None
        if self.gated:
            q, gate = q.view(*x.shape[:2], -1, 2 * self.size).chunk(2, -1)
        q, k = self._prepared(q.reshape(split), k, turned)
        # The norm's float32 weight or the angles may have widened them; attention takes one format.
        q, k = q.to(v.dtype), k.to(v.dtype)
        if self.group is not None:
            k, v = self.tensor.enter(torch.stack([k, v]))[..., self.group : self.group + 1, :].unbind()
        scores = self.scores if self.sinks is None else self.scores._replace(sinks=self.sinks)
        out = context.attend(self.number, q, k, v, scores)
        out = (out if gate is None else out * gate.sigmoid()).flatten(2)
        return self.o_proj(out if places is None else out.index_select(1, places))  # type: ignore[no-any-return]

    def _prepared(self, q: Tensor, k: Tensor, turned: Turned) -> tuple[Tensor, Tensor]:
        """Queries and keys, normed and turned."""
        if self.norm and not self.norm_last:
            q, k = self._normed(q, k)
        if turned:
            cos, sin, *grown = turned
            q, k = rotate(q, cos, sin, self.interleaved), rotate(k, cos, sin, self.interleaved)
            q = q * grown[0] if grown else q
        return self._normed(q, k) if self.norm and self.norm_last else (q, k)

    def _normed(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        if self.norm == "width":
            return self.q_norm(q.flatten(2)).view(q.shape), self.k_norm(k.flatten(2)).view(k.shape)
        return self.q_norm(q), self.k_norm(k)


def _norm_shape(a: Architecture, heads: int) -> tuple[int, ...]:
    """The shape of a norm's weight, of queries or keys of ``heads`` heads."""
    return {"head": (a.head_dim,), "heads": (heads, a.head_dim), "width": (heads * a.head_dim,)}[a.qk_norm]
