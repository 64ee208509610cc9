"""QLoRA: low-rank adapters beside frozen weights of four bits."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import nn

from trainer.config import schema
from trainer.models.adapter import Adapter
from trainer.models.architecture import Architecture
from trainer.models.lora import LoRA, matches
from trainer.models.nf4 import BITS, absent_library
from trainer.models.packed import pack_layers, packed_weights, packing
from trainer.models.sizes import parameters_of
from trainer.models.transformer import TokenEmbedding, Transformer, VocabularyProjection

SMALL = 1_000_000_000
"""Parameters below which a model loses visibly to four bits."""


@schema("adapter/qlora")
@dataclass
class QLoRA(LoRA):
    """LoRA whose frozen linear layers are held in 4 bits, NF4 (Dettmers et al. 2023, arXiv:2305.14314).

    All of the blocks' linear layers are packed, adapted or not, experts too; what ``full`` names, embeddings, norms and heads
    are not.
    """

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        if absent := absent_library():
            yield f"adapter=qlora: {absent}"

    def construction(self) -> AbstractContextManager[object]:
        return packing()

    def validate_rounded(self) -> Iterator[str]:
        yield "qat.bits rounds weights that adapter=qlora holds in NF4; leave qat.bits out, or use adapter=lora"

    def install(self, model: Transformer, *, grown: bool) -> None:
        pack_layers(model, lambda name: matches(name, self.full))
        super().install(model, grown=grown)

    def frozen_matrices(self, model: nn.Module) -> Iterator[nn.Parameter]:
        yield from super().frozen_matrices(model)
        for module in model.modules():
            if isinstance(module, TokenEmbedding | VocabularyProjection):
                yield from (p for p in module.parameters(recurse=False) if not p.requires_grad)

    def packed(self, architecture: Architecture) -> dict[str, tuple[int, ...]]:
        with torch.device("meta"):
            model = Transformer(architecture)
            pack_layers(model, lambda name: matches(name, self.full))
        return {name: weight.shape for name, weight in packed_weights(model).items()}

    def remarks(self, architecture: Architecture) -> Iterator[str]:
        (packed, _), every = self.packed_elements(architecture), parameters_of(architecture)
        yield (
            f"base in NF4: {packed:,} of {every:,} weights at {BITS:.2f} bits, {packed * BITS / 8e9:.2f} GB instead of "
            f"{2 * packed / 1e9:.2f} in 16 bits"
        )
        if every < SMALL:
            yield (
                f"a model below {SMALL / 1e9:g} billion parameters loses more accuracy to NF4 than a large one, and fits in "
                "16 bits: compare with adapter=lora"
            )

    @property
    def at_start(self) -> Adapter:
        # Without adapters, which add nothing yet; packed like the policy.
        return dataclasses.replace(self, targets=[]) if self.path is None else self
