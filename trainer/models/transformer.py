"""The decoder: Llama, Mistral, Qwen2, Qwen3 and SmolLM by configuration. Parameter names are Hugging Face's."""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum, auto
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.nn import functional as F
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from trainer.batch import Branches, Documents
from trainer.functional import At, working_dtype
from trainer.functional.objective import compile_loss
from trainer.models.architecture import Architecture
from trainer.models.attention import attend, has_varlen
from trainer.models.cpu_kernels import embed
from trainer.models.norm import RMSNorm
from trainer.models.rope import angles, frequencies, rotate

NARROW_STREAM = {"cuda"}
"""Devices where the residual stream is bfloat16 under autocast, too, as with bfloat16 weights: norms and sums only move bytes
there. Never float16, whose range is too small for a sum over all layers."""
Read = Callable[[Tensor, Tensor], Any]
Attend = Callable[[int, Tensor, Tensor, Tensor, int | None, float], Tensor]
"""(layer, q, k, v, window, scale) -> output, shapes as in `attention.attend`."""


class Context(Protocol):
    """What tokens attend to when it is not their own documents: a key-value cache."""

    positions: Tensor

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int | None, scale: float) -> Tensor: ...


class Recompute(StrEnum):
    """What the backward computes again instead of keeping it."""

    none = auto()
    selective = auto()
    full = auto()


class Attention(nn.Module):
    """Grouped-query attention (Ainslie et al. 2023, arXiv:2305.13245) with rotary positions."""

    def __init__(self, a: Architecture, layer: int) -> None:
        super().__init__()
        self.layer, self.size, self.window = layer, a.head_dim, a.window(layer)
        heads, groups = a.num_attention_heads * a.head_dim, a.num_key_value_heads * a.head_dim
        self.q_proj = nn.Linear(a.hidden_size, heads, bias=a.attention_bias)
        self.k_proj = nn.Linear(a.hidden_size, groups, bias=a.attention_bias)
        self.v_proj = nn.Linear(a.hidden_size, groups, bias=a.attention_bias)
        self.o_proj = nn.Linear(heads, a.hidden_size, bias=a.attention_output_bias)
        if a.qk_norm:
            self.q_norm = RMSNorm(a.head_dim, a.rms_norm_eps)
            self.k_norm = RMSNorm(a.head_dim, a.rms_norm_eps)

    def forward(
        self, x: Tensor, turned: tuple[Tensor, Tensor], attending: Attend, places: Tensor | None = None
    ) -> Tensor:
        split = (*x.shape[:2], -1, self.size)
        q, k, v = self.q_proj(x).view(split), self.k_proj(x).view(split), self.v_proj(x).view(split)
        if hasattr(self, "q_norm"):
            q, k = self.q_norm(q), self.k_norm(k)
        # The norm's float32 weight or the angles may have widened them; attention takes one format.
        q, k = rotate(q, *turned).to(v.dtype), rotate(k, *turned).to(v.dtype)
        out = attending(self.layer, q, k, v, self.window, self.size**-0.5).flatten(2)
        return self.o_proj(out if places is None else out.index_select(1, places))  # type: ignore[no-any-return]


class MLP(nn.Module):
    """SwiGLU (Shazeer 2020, arXiv:2002.05202)."""

    def __init__(self, a: Architecture) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(a.hidden_size, a.intermediate_size, bias=a.mlp_bias)
        self.up_proj = nn.Linear(a.hidden_size, a.intermediate_size, bias=a.mlp_bias)
        self.down_proj = nn.Linear(a.intermediate_size, a.hidden_size, bias=a.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))  # type: ignore[no-any-return]


class Block(nn.Module):
    """Pre-norm attention and MLP, each added to the residual stream."""

    def __init__(self, a: Architecture, layer: int) -> None:
        super().__init__()
        self.self_attn = Attention(a, layer)
        self.mlp = MLP(a)
        self.input_layernorm = RMSNorm(a.hidden_size, a.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(a.hidden_size, a.rms_norm_eps)

    def forward(
        self, x: Tensor, turned: tuple[Tensor, Tensor], attending: Attend, places: Tensor | None = None
    ) -> Tensor:
        """``(B, T, d)`` to ``(B, T, d)``; of a single row to ``(1, n, d)`` where only ``places`` ``(n,)`` are wanted."""
        added = self.self_attn(self.input_layernorm(x), turned, attending, places)
        x = (x if places is None else x.index_select(1, places)) + added
        return x + self.mlp(self.post_attention_layernorm(x))  # type: ignore[no-any-return]


def narrow_stream(device: str, working: torch.dtype) -> bool:
    """Whether the residual stream is bfloat16 on a kind of device where matrix products compute in ``working``."""
    return device in NARROW_STREAM and working is torch.bfloat16


class TokenEmbedding(nn.Embedding):
    """The input embedding. It reads its weight in its own forward, where a sharded weight is whole."""

    def __init__(self, a: Architecture) -> None:
        super().__init__(a.vocab_size, a.hidden_size)
        self.tied = a.tie_word_embeddings and not a.scores

    def forward(self, tokens: Tensor) -> Tensor:
        x = embed(tokens, self.weight, tied=self.tied)
        return x.bfloat16() if narrow_stream(x.device.type, working_dtype(x)) else x


class Decoder(nn.Module):
    """Embedding, blocks and the final norm (Hugging Face's ``model.*``)."""

    inverse: Tensor

    def __init__(self, a: Architecture) -> None:
        super().__init__()
        self.embed_tokens = TokenEmbedding(a)
        self.layers = nn.ModuleList(Block(a, layer) for layer in range(a.num_hidden_layers))
        self.norm = RMSNorm(a.hidden_size, a.rms_norm_eps)
        inverse, self.rope_factor = frequencies(a)
        self.register_buffer("inverse", inverse, persistent=False)


class VocabularyProjection(nn.Module):
    """The output embedding, its own matrix or ``tied``. A reader is given it here, inside a forward, where it is whole."""

    def __init__(self, a: Architecture, tied: Tensor | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(a.vocab_size, a.hidden_size)) if tied is None else tied

    def forward(self, hidden: Tensor, read: Read) -> Any:
        return read(hidden, self.weight)


class ScoreProjection(nn.Module):
    """A vector in the place of the output embedding: a reader makes a score of a hidden state with it."""

    def __init__(self, a: Architecture) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(1, a.hidden_size))

    def forward(self, hidden: Tensor, read: Read) -> Any:
        return read(hidden, self.weight)


class Transformer(nn.Module):
    """A decoder-only language model, or with ``architecture.scores`` a model that scores sequences."""

    def __init__(self, architecture: Architecture, recompute: Recompute = Recompute.none) -> None:
        super().__init__()
        self.architecture, self.recompute = architecture, recompute
        self._backend: str | Callable[..., Any] | None = None
        self._compiled: Callable[..., Tensor] | None = None
        self.model = Decoder(architecture)
        table = self.model.embed_tokens.weight
        if architecture.scores:
            self.score = ScoreProjection(architecture)
        else:
            self.lm_head = VocabularyProjection(architecture, table if architecture.tie_word_embeddings else None)

    def forward(self, tokens: Tensor, documents: Documents | Branches | Context, read: Read) -> Any:
        """What ``read`` makes of the final hidden states ``(B, T, d)`` and the projection ``(V, d)``, of scores ``(1, d)``.

        ``tokens`` ``(B, T)`` int64. ``documents``: where documents begin and end, or a key-value cache to attend to.
        """
        attending: Attend = (
            partial(_attend_packed, documents) if isinstance(documents, Documents | Branches) else documents.attend
        )
        x = self.model.embed_tokens(tokens)
        turned = angles(self.model.inverse, self.model.rope_factor, documents.positions, working_dtype(x))
        run = self._in_training(x) if self.training and torch.is_grad_enabled() else nn.Module.__call__
        *blocks, last = self.model.layers
        for block in blocks:
            x = run(block, x, turned, attending, None)
        places, read = (read.places, read.read) if isinstance(read, At) else (None, read)
        x = run(last, x, turned, attending, places)
        head = self.score if self.architecture.scores else self.lm_head
        return head(self.model.norm(x), read)

    def compile_blocks(self, backend: str | Callable[..., Any] = "inductor") -> None:
        """Compile what a block does in training, recomputation included: one graph for all blocks of a kind; and the loss.

        Evaluation and sampling call the same blocks uncompiled: each of their shapes would be a graph more, and after the
        limit of graphs nothing is compiled any longer.
        """
        # DDP's own splitting of graphs is for whole models: a block's gradients are ready one block after the other anyway.
        torch._dynamo.config.optimize_ddp = False
        # Several models share the code: a policy, its critic, layers with a window and without.
        torch._dynamo.config.recompile_limit = 64
        self._backend, self._compiled = backend, None
        compile_loss(backend)

    def _in_training(self, x: Tensor) -> Callable[..., Tensor]:
        """What runs a block where gradients are wanted."""
        run = RECOMPUTING[self.recompute]
        if self._backend is None:
            return run
        if self._compiled is None and has_varlen(x.device, working_dtype(x), self.architecture.head_dim):
            self._compiled = torch.compile(run, fullgraph=True, backend=self._backend)
        elif self._compiled is None:
            # Documents go by length here, as the host decides: a block's halves are graphs, and recomputation is around them.
            halves = torch.compile(_keep_all, backend=self._backend)
            self._compiled = partial(_around, run, halves)
        return self._compiled


def _attend_packed(
    documents: Documents | Branches, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int | None, scale: float
) -> Tensor:
    return attend(q, k, v, documents, window=window, scale=scale)


def _keep_products(_: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Save expensive ops (matrix products, attention); norms, activations and rotations are computed again."""
    expensive = ("mm", "addmm", "bmm", "linear", "_scaled_dot_product", "_flash_attention", "_varlen_attn")
    # Of torch_attn::_varlen_attn, too, which is not aten's.
    name = operation.overloadpacket.__name__ if isinstance(operation, OpOverload) else str(operation)
    return CheckpointPolicy.MUST_SAVE if name.startswith(expensive) else CheckpointPolicy.PREFER_RECOMPUTE


def _keep_all(block: nn.Module, *inputs: Any) -> Tensor:
    return block(*inputs)  # type: ignore[no-any-return]


def _recompute_all(block: nn.Module, x: Tensor, turned: tuple[Tensor, Tensor], *rest: Any, **how: Any) -> Tensor:
    # What is not a tensor comes by closure: torch 2.11 would compile anew for every number of documents.
    def compute(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return block(x, (cos, sin), *rest)  # type: ignore[no-any-return]

    return checkpoint(compute, x, *turned, use_reentrant=False, **how)  # type: ignore[no-any-return]


def _recompute_cheap(block: nn.Module, *inputs: Any) -> Tensor:
    return _recompute_all(block, *inputs, context_fn=partial(create_selective_checkpoint_contexts, _keep_products))


def _around(run: Callable[..., Tensor], compiled: Callable[..., Tensor], block: nn.Module, *inputs: Any) -> Tensor:
    return run(partial(compiled, block), *inputs)


RECOMPUTING: dict[Recompute, Callable[..., Tensor]] = {
    Recompute.none: _keep_all,
    Recompute.selective: _recompute_cheap,
    Recompute.full: _recompute_all,
}
"""What runs a block in training."""
