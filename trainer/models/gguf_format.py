"""GGUF files: their shape, weights and tokenizer, as a Hugging Face folder holds them."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trainer.config import ConfigError, InputError
from trainer.data.gguf_vocabulary import tokenizer_of
from trainer.data.tokenizer import Tokenizer
from trainer.models import families
from trainer.models.architecture import Architecture
from trainer.models.gguf_architectures import GGUF_ARCHITECTURES
from trainer.models.gguf_metadata import CONFIG, read_metadata
from trainer.models.gguf_rope import TABLES
from trainer.models.gguf_tensors import GgufTensor, holders, parameter_of, stored_shapes, tensors_of
from trainer.models.hf_format import SHARD_BYTES, write_model
from trainer.models.transformer import Transformer
from trainer.parallel.engine import saved_buffers

DAMAGE = (KeyError, IndexError, TypeError, AttributeError, ArithmeticError)
"""What metadata of any content leads to."""


class UnsupportedError(InputError):
    """A file that is no GGUF file, or one with something that is not supported here."""


class Gguf:
    """A file's metadata and tensors, under the decoder's own names.

    Raises:
        UnsupportedError: if it is no GGUF file, or holds something that is not supported.
    """

    def __init__(self, file: Path) -> None:
        try:
            from gguf import GGUFReader
        except ImportError:
            raise UnsupportedError("GGUF files need the package gguf; pip install 'onecurve[convert]'") from None
        try:
            self.reader = GGUFReader(file)
        except Exception as error:  # whatever numbers in a damaged header lead to
            raise UnsupportedError(f"{file} is not a GGUF file that can be read ({error}); give a .gguf file") from None
        self.kind = str(self.get("general.architecture"))
        if self.kind not in GGUF_ARCHITECTURES:
            raise UnsupportedError(
                f"{file}: architecture {self.kind} is not supported; use one of {', '.join(GGUF_ARCHITECTURES)}"
            )
        self.row = GGUF_ARCHITECTURES[self.kind]
        self._stored = {tensor.name: tensor for tensor in self.reader.tensors}
        try:
            self.architecture = read_metadata(self.kind, self._metadata(), self._stored)
            self.tokenizer = self._tokenizer()
            self._validate_tensors()
        except DAMAGE as error:
            raise UnsupportedError(f"{file} is damaged ({type(error).__name__}: {error}); download it again") from None
        except ConfigError as error:
            raise UnsupportedError(f"{file}: {'; '.join(error.problems)}") from None
        except ValueError as error:
            raise UnsupportedError(f"{file}: {error}") from None

    def get(self, key: str, default: Any = None) -> Any:
        """A value of the metadata."""
        value = self.reader.fields.get(key)
        return default if value is None else value.contents()

    def _metadata(self) -> dict[str, Any]:
        """What the architecture is read from."""
        begin = f"{self.kind}."
        metadata = {key.removeprefix(begin): self.get(key) for key in self.reader.fields if key.startswith(begin)}
        metadata |= {name: self._values(name).tolist() for name in TABLES if name in self._stored}
        metadata.setdefault("vocab_size", len(self.get("tokenizer.ggml.tokens")))
        return metadata | {CONFIG: self.get(CONFIG)}

    def _tokenizer(self) -> Tokenizer:
        metadata = {key: self.get(key) for key in self.reader.fields if key.startswith("tokenizer.")}
        return tokenizer_of(metadata, self.architecture.max_position_embeddings)

    @cached_property
    def _shapes(self) -> dict[str, tuple[int, ...]]:
        """Of our parameters."""
        return shapes_of(self.architecture)

    @cached_property
    def _tensors(self) -> dict[str, GgufTensor]:
        return tensors_of(self.row, self._shapes)

    @cached_property
    def _holders(self) -> dict[str, list[str]]:
        return holders(self._tensors)

    def _values(self, name: str) -> Tensor:
        from gguf import dequantize

        stored = self._stored[name]
        values = np.array(dequantize(stored.data, stored.tensor_type), dtype=np.float32)
        return torch.from_numpy(np.ascontiguousarray(values))

    def tensor(self, name: str) -> Tensor:
        """A parameter of ours, float32."""
        parts = [(self._tensors[theirs], self._values(theirs)) for theirs in self._holders[name]]
        return parameter_of(self.row, self.architecture, name, parts, self._shapes)

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """All parameters, in our order."""
        return ((name, self.tensor(name)) for name in self._shapes)

    def _validate_tensors(self) -> None:
        """The file holds the tensors of its metadata's model, in its shapes: else what is written could not be loaded.

        Raises:
            UnsupportedError: naming one that is missing, unexpected, or of another shape.
        """
        a, names = self.architecture, self._stored.keys() - set(TABLES)
        layers = {name.split(".")[1] for name in names if name.startswith("blk.")}
        if problems := list(families.problems_of(a, "")):
            raise UnsupportedError("; ".join(problems))
        if len(layers) != a.num_hidden_layers:  # before a model is built of so many
            raise UnsupportedError(f"it says {a.num_hidden_layers} layers and holds {len(layers)}; download it again")
        needed = stored_shapes(self.row, a, self._shapes)
        missing, unexpected = sorted(needed.keys() - names), sorted(names - needed.keys())
        shapes = {name: tuple(int(n) for n in reversed(self._stored[name].shape)) for name in needed.keys() & names}
        wrong = [name for name in sorted(shapes) if shapes[name] != needed[name]]
        parts = [f"missing {name}" for name in missing[:1]] + [f"unexpected {name}" for name in unexpected[:1]]
        parts += [f"{name} is {shapes[name]} and should be {needed[name]}" for name in wrong[:1]]
        if parts:
            raise UnsupportedError(f"its tensors are not those of its metadata: {'; '.join(parts)}; download it again")


@lru_cache(maxsize=8)
def shapes_of(a: Architecture) -> dict[str, tuple[int, ...]]:
    """The shapes of a model's own tensors, tied ones once, in their order."""
    with torch.device("meta"):
        model = Transformer(a)
    return {name: tuple(t.shape) for name, t in [*model.named_parameters(), *saved_buffers(model)]}


def opened(file: Gguf) -> Transformer:
    """The model that a file holds, dequantised, in float32."""
    model = Transformer(file.architecture)
    own = dict([*model.named_parameters(), *saved_buffers(model)])
    with torch.no_grad():
        for name, values in file.weights():
            own[name].copy_(values)
    return model


def convert(source: Path, folder: Path, dtype: torch.dtype) -> Architecture:
    """Write the Hugging Face folder ``folder``, which must not exist, from a GGUF file; gives the model's shape.

    Quantised weights are dequantised in float32 and rounded once.

    Raises:
        UnsupportedError: if the file is no GGUF file, or holds something that is not supported.
    """
    file = Gguf(source)
    facts = {"converted_from": source.name, "license": file.get("general.license")}
    write_model(
        folder, file.architecture, file.weights(), dtype=dtype, shard_bytes=SHARD_BYTES,
        tokenizer=file.tokenizer, facts=facts,
    )  # fmt: skip
    return file.architecture
