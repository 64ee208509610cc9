"""The decoder: what a family of models computes, by its features. Parameter names are Hugging Face's for Llama."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from trainer.batch import Branches, Documents
from trainer.functional import At, Head, VocabularyPart, working_dtype
from trainer.functional.objective import compile_loss
from trainer.models import dropout
from trainer.models.architecture import Architecture, Rope
from trainer.models.attention import has_kernel
from trainer.models.context import Context, DividedContext, PackedContext, vocabulary_part
from trainer.models.cpu_kernels import embed
from trainer.models.delta import GatedDeltaNet
from trainer.models.experts import MixtureOfExperts, mlp_of
from trainer.models.norm import norm_of
from trainer.models.recompute import RECOMPUTING, Recompute, around, keep_all
from trainer.models.rope import angles, frequencies, growth
from trainer.models.self_attention import Attention, Turned
from trainer.parallel.cuts import cut
from trainer.parallel.mesh import UNDIVIDED, Axis, Mesh

NARROW_STREAM = {"cuda"}
"""Devices where the residual stream is bfloat16 under autocast, too, as with bfloat16 weights: norms and sums only move bytes
there. Never float16, whose range is too small for a sum over all layers."""
Read = Callable[[Tensor, Head], Any]


class Block(nn.Module):
    """A mixer of tokens and an MLP, each normed before, after or both, and added to the residual stream."""

    def __init__(self, a: Architecture, number: int) -> None:
        super().__init__()
        self.recurrent = a.layers[number].delta
        if self.recurrent:
            self.linear_attn = GatedDeltaNet(a, number)
        else:
            self.self_attn = Attention(a, number)
        self.mlp = mlp_of(a, a.layers[number])
        if a.norm_before:
            self.input_layernorm = norm_of(a, a.hidden_size)
        if a.norm_after:
            self.attention_output_norm = norm_of(a, a.hidden_size)
        if a.norm_before and not a.parallel:
            self.post_attention_layernorm = norm_of(a, a.hidden_size)
        if a.norm_after:
            self.mlp_output_norm = norm_of(a, a.hidden_size)
        self.before, self.after, self.parallel, self.scale = a.norm_before, a.norm_after, a.parallel, a.residual_scale
        self.sparse = a.layers[number].sparse

    def divide(self, mesh: Mesh) -> None:
        """Compute this rank's part of it."""
        if mesh.tensor.size > 1:
            self.self_attn.divide(mesh)
        if mesh.tensor.size > 1 or isinstance(self.mlp, MixtureOfExperts):
            self.mlp.divide(mesh)

    def forward(
        self,
        x: Tensor,
        turned: Turned,
        context: Context,
        places: Tensor | None = None,
        real: Tensor | None = None,
        run: Callable[..., Tensor] | None = None,
    ) -> Tensor:
        """``(B, T, d)`` to ``(B, T, d)``; of a single row to ``(1, n, d)`` where only ``places`` ``(n,)`` are wanted.

        ``real`` ``(B, T)``: how often experts are counted for a token, None = once. ``run``: calls `compute`, compiled or to
        be recomputed; so what a strategy does around a block (gather its weights) is around that, too.
        """
        inputs = x, turned, context, places, real
        return self.compute(*inputs) if run is None else run(self, *inputs)

    def compute(
        self, x: Tensor, turned: Turned, context: Context, places: Tensor | None, real: Tensor | None
    ) -> Tensor:
        """What the forward computes."""
        normed = self.input_layernorm(x) if self.before else x
        mixer = self.linear_attn if self.recurrent else self.self_attn
        added = mixer(normed, turned, context, places)
        added = self._scaled(self.attention_output_norm(added) if self.after else added)
        if places is not None:
            x = x.index_select(1, places)
            real = None if real is None else real.index_select(1, places)
        if self.parallel:
            normed = normed if places is None else normed.index_select(1, places)
            return x + added + self._scaled(self._after_mixer(normed, real))
        x = x + added
        out = self._after_mixer(self.post_attention_layernorm(x) if self.before else x, real)
        return x + self._scaled(self.mlp_output_norm(out) if self.after else out)

    def _after_mixer(self, x: Tensor, real: Tensor | None) -> Tensor:
        return self.mlp(x, real) if self.sparse else self.mlp(x)  # type: ignore[no-any-return]

    def _scaled(self, added: Tensor) -> Tensor:
        return added if self.scale == 1.0 else added * self.scale


def narrow_stream(device: str, working: torch.dtype) -> bool:
    """Whether the residual stream is bfloat16 on a kind of device where matrix products compute in ``working``."""
    return device in NARROW_STREAM and working is torch.bfloat16


class TokenEmbedding(nn.Embedding):
    """The input embedding. It reads its weight in its own forward, where a sharded weight is whole.

    Attributes:
        tensor: Ranks that each have some of the rows.
    """

    tensor: Axis = UNDIVIDED

    def __init__(self, a: Architecture) -> None:
        super().__init__(a.vocab_size, a.hidden_size)
        self.tied, self.scale = a.tie_word_embeddings and not a.scores, a.embedding_scale

    def divide(self, mesh: Mesh) -> None:
        """Look up this rank's rows."""
        cut(self, "weight", 0, mesh.tensor)
        self.tensor = mesh.tensor

    def forward(self, tokens: Tensor) -> Tensor:
        if self.tensor.size == 1:
            return self._rows(tokens)
        first, last = self.tensor.span(self.num_embeddings)
        own = (tokens >= first) & (tokens < last)
        rows = self._rows((tokens - first).clamp(0, last - first - 1))
        # Exact in any format: one rank alone adds something.
        return self.tensor.leave(rows.masked_fill(~own[..., None], 0))

    def _rows(self, tokens: Tensor) -> Tensor:
        x = embed(tokens, self.weight, tied=self.tied)
        if torch.is_autocast_enabled(x.device.type):
            x = x.float()  # the residual stream's format; a frozen table may be held in a narrower one
        x = x if self.scale == 1.0 else x * self.scale
        return x.bfloat16() if narrow_stream(x.device.type, working_dtype(x)) else x


class Decoder(nn.Module):
    """Embedding, blocks and the final norm (Hugging Face's ``model.*``)."""

    inverse: Tensor

    def __init__(self, a: Architecture) -> None:
        super().__init__()
        self.embed_tokens = TokenEmbedding(a)
        self.layers = nn.ModuleList(Block(a, number) for number in range(a.num_hidden_layers))
        self.norm = norm_of(a, a.hidden_size)
        self.ropes, self.factors = a.ropes, list[float]()
        for number, rope in enumerate(a.ropes):
            inverse, factor = frequencies(rope, a)
            self.register_buffer(f"inverse{number or ''}", inverse, persistent=False)
            self.factors.append(factor)
        self.rope_of = [None if layer.rope is None else a.ropes.index(layer.rope) for layer in a.layers]

    def turned(self, positions: Tensor, dtype: torch.dtype) -> list[Turned]:
        """For every layer what it reads of ``positions`` ``(B, T)``; layers of one rotation share it."""
        each = [self._angles(number, rope, positions, dtype) for number, rope in enumerate(self.ropes)]
        return [() if number is None else each[number] for number in self.rope_of]

    def _angles(self, number: int, rope: Rope, positions: Tensor, dtype: torch.dtype) -> Turned:
        inverse = self.get_buffer(f"inverse{number or ''}")
        return (*angles(inverse, self.factors[number], positions, dtype), *growth(rope, positions, dtype))


class VocabularyProjection(nn.Module):
    """The output embedding, its own matrix or ``tied``. A reader is given it here, inside a forward, where it is whole.

    Attributes:
        tensor: Ranks that each have some of the rows.
        parts: Which rows this rank reads, of hidden states that it has by itself, and of those that ranks have joined; each
            None = all.
    """

    tensor: Axis = UNDIVIDED
    parts: tuple[VocabularyPart | None, VocabularyPart | None] = (None, None)

    def __init__(self, a: Architecture, tied: Tensor | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(a.vocab_size, a.hidden_size)) if tied is None else tied
        self.scale, self.cap = a.logit_scale, a.logit_cap

    def divide(self, mesh: Mesh, tied: Tensor | None) -> None:
        """Read off this rank's rows, or off those that it has of the ``tied`` matrix."""
        rows = self.weight.shape[0]
        self.parts = vocabulary_part(rows, mesh, joined=False), vocabulary_part(rows, mesh, joined=True)
        self.tensor = mesh.tensor
        if tied is not None:
            self.weight = tied
        elif mesh.tensor.size > 1:
            cut(self, "weight", 0, mesh.tensor)

    def forward(self, hidden: Tensor, read: Read, divided: DividedContext | None = None) -> Any:
        hidden = hidden if divided is None else divided.joined(hidden)
        hidden = hidden if self.scale == 1.0 else hidden * self.scale
        alone, part = self.parts[0], self.parts[divided is not None]
        if part is None:
            return read(hidden, Head(self.weight, self.cap))
        first = 0 if alone is None else alone.span[0]
        own = slice(part.span[0] - first, part.span[1] - first)
        return read(self.tensor.enter(hidden), Head(self.weight[own], self.cap, part))


class ScoreProjection(nn.Module):
    """A vector in the place of the output embedding: a reader makes a score of a hidden state with it.

    Attributes:
        sequence: Ranks that all make the same scores of hidden states that they have joined.
    """

    sequence: Axis = UNDIVIDED

    def __init__(self, a: Architecture) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(1, a.hidden_size))

    def forward(self, hidden: Tensor, read: Read, divided: DividedContext | None = None) -> Any:
        hidden = hidden if divided is None else divided.joined(hidden)
        return read(self.sequence.even(hidden), Head(self.sequence.even(self.weight)))


class Transformer(nn.Module):
    """A decoder-only language model, or with ``architecture.scores`` a model that scores sequences.

    Attributes:
        sequence: Ranks that divide the tokens of a micro-batch among them.
        stages: Ranks that divide the layers among them.
    """

    sequence: Axis = UNDIVIDED
    stages: Axis = UNDIVIDED

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

    def divide(self, mesh: Mesh) -> None:
        """Compute this rank's part of every forward from now on; the parameters have no values yet."""
        for block in self.blocks:
            block.divide(mesh)
        self.sequence = mesh.sequence
        if mesh.tensor.size > 1:
            self.model.embed_tokens.divide(mesh)
        if self.architecture.scores:
            self.score.sequence = mesh.sequence
        else:
            tied = self.architecture.tie_word_embeddings
            self.lm_head.divide(mesh, self.model.embed_tokens.weight if tied else None)

    @property
    def blocks(self) -> list[Block]:
        """The layers, in their order."""
        return [block for block in self.model.layers if isinstance(block, Block)]

    @property
    def key_heads(self) -> int:
        """Key heads that this rank has keys and values of."""
        return max((block.self_attn.key_heads for block in self.blocks if not block.recurrent), default=0)

    def forward(self, tokens: Tensor, documents: Documents | Branches | Context, read: Read) -> Any:
        """What ``read`` makes of the final hidden states ``(B, T, d)`` and the projection, a `Head`.

        ``tokens`` ``(B, T)`` int64. ``documents``: where documents begin and end, or a key-value cache to attend to.
        """
        context, divided = self._context(tokens, documents)
        x = self.model.embed_tokens(tokens if divided is None else divided.own(tokens))
        *turned, last_turned = self.model.turned(context.positions, working_dtype(x))
        learns = self.training and torch.is_grad_enabled()
        run = self._in_training(x) if learns else None
        real = getattr(divided or documents, "real", None) if self.architecture.experts else None
        *blocks, last = self.model.layers
        places, of_last = None, real
        if divided is None and isinstance(read, At):
            # The last block computes nothing of other tokens. Divided, all ranks must compute equally many.
            places, read = read.places, read.read
        elif divided is not None and isinstance(read, At) and self.architecture.experts:
            of_last = divided.times_read(read.places)
        if learns and divided is not None:
            dropout.divide(divided.shape, divided.span)
        for block, own in zip(blocks, turned, strict=True):
            x = block(x, own, context, None, real, run)
        if learns:
            dropout.narrow_to(places)
        x = self.model.norm(last(x, last_turned, context, places, of_last, run))
        head = self.score if self.architecture.scores else self.lm_head
        return head(x, read, divided)

    def _context(
        self, tokens: Tensor, documents: Documents | Branches | Context
    ) -> tuple[Context, DividedContext | None]:
        """What the tokens see; and the same where this rank computes a part of them alone."""
        if not isinstance(documents, Documents | Branches):
            return documents, None
        packed = PackedContext(documents)
        if self.sequence.size == 1:
            return packed, None
        divided = DividedContext(packed, (tokens.shape[0], tokens.shape[1]), self.sequence)
        return divided, divided

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
        if self._compiled is None and has_kernel(self.architecture, x.device, working_dtype(x)):
            self._compiled = torch.compile(run, fullgraph=True, backend=self._backend)
        elif self._compiled is None:
            # Documents go by length here, as the host decides: a block's halves are graphs, and recomputation is around them.
            halves = torch.compile(keep_all, backend=self._backend)
            self._compiled = partial(around, run, halves)
        return self._compiled
