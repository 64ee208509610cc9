"""QLoRA: low-rank adapters beside frozen weights of four bits."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from enum import StrEnum, auto
from functools import cache
from typing import Any, ClassVar

import torch
from torch import nn

from trainer.config import schema, setting
from trainer.functional.bitsandbytes import absent_library
from trainer.models.adapter import Adapter
from trainer.models.architecture import Architecture
from trainer.models.lora import LoRA, matches
from trainer.models.nf4 import BITS
from trainer.models.packed import pack_layers, packed_weights, packing
from trainer.models.sizes import parameters_of
from trainer.models.transformer import TokenEmbedding, Transformer, VocabularyProjection


class MergeBase(StrEnum):
    """What adapters that were trained beside packed weights are merged onto."""

    trained = auto()
    original = auto()


SMALL = 1_000_000_000
"""Parameters below which a model loses visibly to four bits."""


LOSSES = {MergeBase.trained: "eval/loss", MergeBase.original: "eval/loss_on_original"}
"""The held-out loss of each merge; that onto what was trained is the model that is evaluated."""
FORMAT = "nf4"
CARD = """---
library_name: peft
base_model: {base}
---

# An adapter beside weights in {format}

It was trained beside `{base}` with all linear layers of the blocks in NF4 (blocks of 64, double
quantisation), and computes what it was evaluated with on that base in four bits:

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="{format}", bnb_4bit_use_double_quant=True)
base = AutoModelForCausalLM.from_pretrained("{base}", quantization_config=settings)
model = PeftModel.from_pretrained(base, "THIS FOLDER")
```
"""
"""The README of an adapter's folder: PEFT's configuration has no word for it."""


@schema("adapter/qlora")
@dataclass
class QLoRA(LoRA):
    """LoRA whose frozen linear layers are held in 4 bits, NF4 (Dettmers et al. 2023, arXiv:2305.14314).

    All of the blocks' linear layers are packed, adapted or not, experts too; what ``full`` names, embeddings, norms and heads
    are not.
    """

    base_format: ClassVar[str | None] = FORMAT

    merge_onto: MergeBase = setting(
        MergeBase.trained,
        "what export/ merges the adapters onto: trained, the numbers that NF4 stands for; original, the folder's own weights",
    )

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        if self.merges_onto_original and not self.merge:
            yield "adapter.merge_onto=original has no effect beside adapter.merge=false, which merges nothing; leave it out"
        if absent := absent_library("NF4"):
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
        return dict(_packed_shapes(architecture, tuple(self.full)))

    def remarks(self, architecture: Architecture) -> Iterator[str]:
        yield from super().remarks(architecture)
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
    def merges_onto_original(self) -> bool:
        return self.merge_onto is MergeBase.original

    def record(self, base: str | None, latest: Mapping[str, float]) -> dict[str, Any]:
        losses = {kind.value: latest[metric] for kind, metric in LOSSES.items() if metric in latest}
        merge = {"merge": {"onto": self.merge_onto.value, "heldout_loss": losses}} if self.merge else {}
        return {"adapter_base": {"folder": base, "format": FORMAT}, **merge}

    def card(self, base: str | None) -> str | None:
        return CARD.format(base=base or "BASE", format=FORMAT)

    @property
    def at_start(self) -> Adapter:
        # Without adapters, which add nothing yet; packed like the policy.
        return dataclasses.replace(self, targets=[]) if self.path is None else self


@cache
def _packed_shapes(architecture: Architecture, full: tuple[str, ...]) -> Mapping[str, tuple[int, ...]]:
    """Shapes of the weights that are packed where those that ``full`` matches are not, by name."""
    with torch.device("meta"):
        model = Transformer(architecture)
        pack_layers(model, lambda name: matches(name, full))
    return {name: weight.shape for name, weight in packed_weights(model).items()}
