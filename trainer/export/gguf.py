"""GGUF files for llama.cpp, of any Hugging Face folder of a family that it computes; tensor by tensor."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainer.data.gguf_vocabulary import vocabulary_of, vocabulary_problems, vocabulary_remarks
from trainer.data.tokenizer import Tokenizer, open_tokenizer
from trainer.export.ggml import GGUF_FORMATS, GgufFormat, fitting, quantised, stored_bytes
from trainer.models.architecture import Architecture
from trainer.models.gguf_architectures import GGUF_ARCHITECTURES, GGUF_FAMILIES, architecture_for
from trainer.models.gguf_format import Gguf, opened, shapes_of
from trainer.models.gguf_metadata import CONFIG, differences, metadata_of, read_metadata
from trainer.models.gguf_rope import TABLES
from trainer.models.gguf_tensors import GgufTensor, is_matrix, stored_shapes, stored_tensor, tensors_of
from trainer.models.header import read_shape
from trainer.models.stored import StoredWeights
from trainer.models.transformer import Transformer

HEAD, EMBEDDING = "output.weight", "token_embd.weight"
PHI = re.compile("phi-?3", re.IGNORECASE)
"""In a model's name it has llama.cpp look for that family's special tokens, and drop the spaces after them."""
WINDOW = (
    "llama.cpp computes no window for {0} models, and this one looks back on {1} tokens; for documents up to that length it "
    "is the same model without: set max_position_embeddings to {1} in a copy of its config.json, and export that"
)


def gguf_problems(a: Architecture, tokenizer: Tokenizer) -> Iterator[str]:
    """A clause for each thing of a model that no GGUF file holds, or that llama.cpp computes otherwise."""
    yield from architecture_problems(a)
    yield from vocabulary_problems(tokenizer, a.vocab_size)


def architecture_problems(a: Architecture) -> Iterator[str]:
    """Of its shape: what is lost when the metadata that would be written is read as llama.cpp reads it."""
    name = architecture_for(a.family)
    if name is None:
        yield f"family {a.family} is not written; only {', '.join(GGUF_FAMILIES)} are"
        return
    if a.scores:
        yield "it holds no head that scores; keep safetensors"
        return
    try:
        back = read_metadata(name, metadata_of(a), stored_shapes(GGUF_ARCHITECTURES[name], a, shapes_of(a)))
    except ValueError as error:
        yield str(error)
        return
    lost = list(differences(a, back))
    if GGUF_ARCHITECTURES[name].always and not any(layer.window for layer in a.layers):
        yield f"llama.cpp computes {name} models with windows alone, and this one has none; keep safetensors"
        return
    if "sliding_window" in lost:
        lost.remove("sliding_window")
        yield WINDOW.format(name, max(layer.window or 0 for layer in a.layers))
    if lost:
        yield f"llama.cpp computes no {name} model with this one's {', '.join(lost)}; keep safetensors"


def architecture_remarks(a: Architecture) -> Iterator[str]:
    """One sentence for what llama.cpp does otherwise with a model that is written."""
    if any(rope.scaling.get("truncate") is False for rope in a.ropes):
        yield "llama.cpp rounds the dimensions between which yarn stretches, as it does in every GGUF file of gpt-oss"


def write_gguf(kind: str, source: Path, out: Path, _: Sequence[list[int]] = ()) -> list[str]:
    """Write the GGUF file of a Hugging Face folder into the new folder ``out``; gives what is to be said about it.

    ``kind``: a name of `GGUF_FORMATS`. No more than one tensor is in memory.

    Raises:
        InputError: naming a tensor whose numbers the format does not reach.
    """
    name = (source.parent.name if source.name == "export" else source.name) or "model"
    out.mkdir()
    model = GgufSource(source, GGUF_FORMATS[kind])
    model.write(out / f"{name}-{kind}.gguf", name)
    return [*model.fallbacks(), *architecture_remarks(model.a), *vocabulary_remarks(model.tokenizer)]


def open_gguf(folder: Path) -> Transformer:
    """The model of the GGUF file in a folder, dequantised, in float32 on the CPU."""
    [file] = folder.glob("*.gguf")
    return opened(Gguf(file))


class GgufSource:
    """A folder on its way into a GGUF file."""

    def __init__(self, folder: Path, how: GgufFormat) -> None:
        self.how, self.a = how, read_shape(folder)
        self.tokenizer = open_tokenizer(folder)
        self.name = architecture_for(self.a.family) or ""
        self.row = GGUF_ARCHITECTURES[self.name]
        self.weights = StoredWeights(folder, self.a)

    @cached_property
    def tensors(self) -> dict[str, GgufTensor]:
        """What each tensor of the file is made of."""
        return tensors_of(self.row, shapes_of(self.a))

    @cached_property
    def kinds(self) -> dict[str, str]:
        """The numbers of each tensor: vectors, norms and routers stay in float32."""
        head = HEAD if HEAD in self.tensors else EMBEDDING
        wanted = {
            name: "F32" if not is_matrix(name, shape) else self.how.head if name == head else self.how.kind
            for name, shape in self.shapes.items()
        }
        return {name: kind if kind == "F32" else fitting(kind, self.shapes[name][-1]) for name, kind in wanted.items()}

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each tensor."""
        return stored_shapes(self.row, self.a, shapes_of(self.a))

    def write(self, file: Path, name: str) -> None:
        """Write the file: what it holds, and where, before the first tensor."""
        import gguf

        logging.getLogger(gguf.gguf_writer.__name__).setLevel(logging.WARNING)  # it counts its tensors
        out = gguf.GGUFWriter(file, self.name)
        metadata = metadata_of(self.a)
        tables = {name: torch.tensor(metadata.pop(name), dtype=torch.float32) for name in TABLES if name in metadata}
        general = {
            "general.type": "model", "general.name": PHI.sub("phi_3", name), CONFIG: metadata.pop(CONFIG),
            "general.quantization_version": gguf.GGML_QUANT_VERSION,
            "general.file_type": int(gguf.LlamaFileType[self.how.file_type]),
        }  # fmt: skip
        own = {f"{self.name}.{key}": value for key, value in metadata.items()}
        _add(out, general | own | vocabulary_of(self.tokenizer, self.a.vocab_size))
        every = {**{each: tuple(t.shape) for each, t in tables.items()}, **self.shapes}
        for each, shape in every.items():
            kind = self.kinds.get(each, "F32")
            raw = gguf.GGMLQuantizationType[kind]
            out.add_tensor_info(each, shape, torch.float32, stored_bytes(kind, shape), raw_dtype=raw)
        for step in (out.write_header_to_file, out.write_kv_data_to_file, out.write_ti_data_to_file):
            step()
        for each in every:
            values = tables[each] if each in tables else self.tensor(each)
            out.write_tensor_data(quantised(each, values, self.kinds.get(each, "F32")))
        out.close()

    def tensor(self, name: str) -> Tensor:
        """A tensor of the file, in the format that the folder has it in."""
        ours = [self.weights.tensor(each) for each in self.tensors[name].ours]
        return stored_tensor(self.row, self.a, self.tensors[name], ours)

    def fallbacks(self) -> Iterator[str]:
        """A sentence for every other kind of numbers that rows are in, since blocks of the format's do not divide them."""
        rounded = [kind for kind in self.kinds.values() if kind != "F32"]
        for kind, count in Counter(rounded).items():
            if kind not in (self.how.kind, self.how.head):
                yield f"{count} of {len(rounded)} matrices are {kind}: blocks of {self.how.kind} do not divide their rows"


def _add(out: Any, metadata: Mapping[str, Any]) -> None:
    """Add values by the types that llama.cpp reads them in."""
    from gguf import GGUFValueType as Kind

    kinds = {bool: Kind.BOOL, int: Kind.UINT32, float: Kind.FLOAT32, str: Kind.STRING}
    for key, value in metadata.items():
        if isinstance(value, list):
            out.add_array(key, value)
        elif value != "":
            out.add_key_value(key, value, kinds[type(value)])
