"""What an adapter comes to in the end: the merged model, and a folder in PEFT's layout."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from trainer.data.tokenizer import Tokenizer
from trainer.export.lineage import make_room
from trainer.models.adapter import Adapter
from trainer.models.int_grid import fake
from trainer.models.linear import FakeQuantizer, rounded_weights
from trainer.models.load import ModelLoader
from trainer.models.lora import is_adapter
from trainer.models.packed import unpacked
from trainer.models.peft_format import write_adapter
from trainer.models.peft_layout import in_peft_layout
from trainer.parallel import distributed
from trainer.parallel.engine import Engine


def merged_weights(
    engine: Engine, load: ModelLoader, exports: Callable[[str], bool] = lambda _: True
) -> Iterator[tuple[str, Tensor]]:
    """Tensors of the trained model whose names ``exports`` takes, adapters merged; collective, complete on the first rank."""
    if not load.adapter.freezes_model:
        yield from ((name, tensor) for name, tensor in engine.weights() if exports(name))
        return
    trained = {name: tensor.clone() for name, tensor in _trained(engine, load)}
    if distributed.world().is_main:
        base = load.start if load.adapter.merges_onto_original else load.dequantised
        yield from ((name, load.adapter.merged(name, trained, base)) for name in load.shapes if exports(name))


def merged_policy(
    engine: Engine, adapter: Adapter, quantizer: FakeQuantizer | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Tensors of the model as it is now on every rank, one at a time, adapters merged into what it computes with; collective.

    Unlike `merged_weights`, which reads what is frozen again as it was stored, it takes the engine's own copy.
    ``quantizer``: what rounds the weights of its forward.
    """
    rounded = set() if quantizer is None else rounded_weights(engine.module)
    trained = {n: tensor.clone() for n, tensor in engine.weights(frozen=False) if is_adapter(n)}
    for name, tensor in unpacked(engine.weights(), engine.module, engine.precision.dtype):
        if not is_adapter(name):
            merged = adapter.merged(name, trained, {name: tensor}.__getitem__) if trained else tensor
            yield name, fake(merged, quantizer.bits, quantizer.group) if quantizer and name in rounded else merged


def export_adapter(
    folder: Path, engine: Engine, load: ModelLoader, tokenizer: Tokenizer, facts: Mapping[str, Any]
) -> None:
    """Write the trained adapter, if there is one; collective. The same one stays; another is moved aside."""
    if not load.adapter.freezes_model or distributed.run_on_main(lambda: make_room(folder, facts)):
        return
    trained = {name: tensor.detach().to("cpu", copy=True) for name, tensor in _trained(engine, load)}
    table, head = "model.embed_tokens.weight", "lm_head.weight"
    if table in trained and load.architecture.tie_word_embeddings:
        # PEFT would train a copy of the one and leave the other as it was.
        trained[head] = trained[table].clone()
    settings = load.adapter.peft_settings(trained)

    def write() -> None:
        own, tensors = in_peft_layout(settings, trained, load.architecture, load.shapes)
        write_adapter(folder, own, tensors, load.config.path, tokenizer, facts, load.adapter.card(load.config.path))

    distributed.run_on_main(write)


def _trained(engine: Engine, load: ModelLoader) -> Iterator[tuple[str, Tensor]]:
    """Trained tensors of the model and its adapter, without those of what is trained beside it (a critic)."""
    own = load.shapes.keys() - load.buffers
    return ((n, tensor) for n, tensor in engine.weights(frozen=False) if is_adapter(n) or n in own)
