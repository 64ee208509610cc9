"""Hugging Face folders: ``config.json`` and safetensors, read tensor by tensor and written shard by shard."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from trainer.config import InputError
from trainer.disk import digest, is_pointer, new_folder, save_tensors, write_text
from trainer.models.architecture import Architecture
from trainer.models.families import FAMILIES
from trainer.models.quantized import METHODS, method_of, quantized_weights, unread
from trainer.models.text_part import ahead, left_out, text_config, text_names
from trainer.models.unread_folders import absent, quantized, unsupported, without_safetensors

LANGUAGE, SCORE = "ForCausalLM", "ForSequenceClassification"
SHARD_BYTES = 5 * 10**9
"""Of the largest file, where no setting says it."""
INDEX = "model.safetensors.index.json"


class FormatError(InputError):
    """A folder that is no model of a family that this decoder computes, or a damaged one."""


def read_architecture(folder: Path) -> Architecture:
    """The architecture that ``config.json`` describes.

    Raises:
        FormatError: naming the file and what is missing, unknown, or cannot be computed.
    """
    file = folder / "config.json"
    config = read_config(folder)
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise FormatError(f"{file}: {unsupported(config, FAMILIES)}")
    if (quantization := config.get("quantization_config")) and not _readable(quantization, kind):
        raise FormatError(f"{file}: {quantized(folder, quantization, unread(quantization))}")
    classes = config.get("architectures") or []
    if not isinstance(classes, list):
        raise FormatError(f"{file}: architectures={json.dumps(classes)[:80]} is not a list; correct the file")
    try:
        a = FAMILIES[kind].read(config)
    except ValueError as error:
        raise FormatError(f"{file}: {error}") from None
    return dataclasses.replace(a, scores=any(str(name).endswith(SCORE) for name in classes))


def _readable(quantization: Any, kind: str) -> bool:
    return method_of(quantization) in (*METHODS, *FAMILIES[kind].quantized) and unread(quantization) is None


def read_config(folder: Path) -> dict[str, Any]:
    """What ``config.json`` says of the text model.

    Raises:
        FormatError: if there is none, or it is no JSON object.
    """
    file = folder / "config.json"
    if not file.is_file():
        raise FormatError(absent(folder))
    return dict(text_config(read_object(file)))


def read_object(file: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        FormatError: naming the file, if it holds something else or is cut off.
    """
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, OSError) as error:
        raise FormatError(f"{file} is no JSON that can be read ({error}); download it again") from None
    if not isinstance(value, dict):
        raise FormatError(f"{file} holds {type(value).__name__}, not a JSON object; download it again")
    return value


def damaged(file: Path, error: Exception) -> FormatError:
    """What to raise for a file of tensors that cannot be opened."""
    if file.is_file() and is_pointer(file):
        return FormatError(f"{file} is a pointer of Git LFS, not the file; run git lfs pull in its folder")
    return FormatError(f"{file} is damaged ({error}); download it again")


def config_json(a: Architecture, dtype: torch.dtype, tokens: Mapping[str, int | None]) -> dict[str, Any]:
    """The ``config.json`` of an architecture; ``tokens``: ids by name (``bos_token_id``, ...)."""
    family = FAMILIES[a.family]
    config: dict[str, Any] = {
        "architectures": [family.classes + (SCORE if a.scores else LANGUAGE)],
        "model_type": a.family,
        "dtype": str(dtype).removeprefix("torch."),
        "attention_dropout": 0.0,
        "use_cache": True,
        # Null where there is none: else the class's own, which may lie outside of the vocabulary.
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")),
        **family.write(a),
        **tokens,
    }
    if a.scores:
        config.update(num_labels=1, id2label={"0": "LABEL_0"}, label2id={"LABEL_0": 0}, use_cache=False)
    return config


class WeightFiles:
    """The tensors of a folder by name, mapped from its files and read only where asked for.

    ``files``: the file of each tensor, by the name that a model that reads text has for it.
    ``quantized``: those of them that are stored in few bits, as several tensors each; they are read as numbers.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._open: dict[str, Any] = {}
        stored = self._locate()
        names = text_names(stored)
        config = read_config(folder) if (folder / "config.json").is_file() else {}
        further = ahead(names, config)
        self._names = {name: origin for name, origin in names.items() if name not in further}
        self._stored = {name: stored[origin] for name, origin in self._names.items()}
        self.quantized = dict(quantized_weights(self._names, config.get("quantization_config")))
        parts = {part for weight in self.quantized.values() for part in weight.names.values()}
        self.files = {name: file for name, file in self._stored.items() if name not in parts}
        self.files |= {name: self._stored[weight.main] for name, weight in self.quantized.items()}
        self.left_out = left_out(stored, self._names.values(), [names[name] for name in further])
        """One sentence for the tensors that no model that reads text one token ahead has; None where there are none."""

    def _locate(self) -> dict[str, str]:
        index = self.folder / INDEX
        if index.is_file():
            named: dict[str, str] = read_object(index).get("weight_map", {})
            if not named or not isinstance(named, dict) or not all(isinstance(f, str) for f in named.values()):
                raise FormatError(f"{index} has no weight_map from tensors to files; download it again")
            if outside := sorted({f for f in named.values() if Path(f).name != f}):
                raise FormatError(
                    f"{index} names {', '.join(outside)}, which is outside of {self.folder}; only own files are read"
                )
            absent = sorted({f for f in named.values() if not (self.folder / f).is_file()})
            if absent:
                raise FormatError(f"{index} names {', '.join(absent)}, which are missing in {self.folder}")
            return named
        single = self.folder / "model.safetensors"
        if not single.is_file():
            raise FormatError(without_safetensors(self.folder, INDEX))
        return dict.fromkeys(self._handle(single.name).keys(), single.name)

    def _handle(self, file: str) -> Any:
        if file not in self._open:
            try:
                self._open[file] = safe_open(self.folder / file, framework="pt")
            except Exception as error:
                raise damaged(self.folder / file, error) from None
        return self._open[file]

    def fingerprint(self) -> str:
        """Of the shape and all of the weights."""
        names = ["config.json", *sorted(set(self._stored.values()))]
        every = [[name, digest(self.folder / name)] for name in names]
        return hashlib.sha256(json.dumps(every).encode()).hexdigest()[:24]

    def shape(self, name: str) -> tuple[int, ...]:
        """The tensor's shape, by the files' headers and records alone."""
        weight = self.quantized.get(name)
        if weight is None:
            return self._shape(name)
        with self._reading(name):
            return weight.shape(self._shape, self._tensor)

    def tensor(self, name: str) -> Tensor:
        """The tensor, in the format that it is stored in; float32 if that is no number's."""
        if name not in self.quantized:
            return self._tensor(name)
        with self._reading(name):
            return self.quantized[name].tensor(self._tensor)

    def packed(self, name: str) -> tuple[Tensor, Tensor, Tensor] | None:
        """Codes, maxima and numbers as `nf4.pack` gives them, as they are stored; None where they are not stored so."""
        if name not in self.quantized:
            return None
        with self._reading(name):
            return self.quantized[name].packed(self._tensor)

    @contextmanager
    def _reading(self, name: str) -> Iterator[None]:
        try:
            yield
        except FormatError:
            raise
        except (ValueError, LookupError, TypeError, AttributeError, RuntimeError) as error:
            kind = self.quantized[name].packing.label
            raise FormatError(f"{self.folder}: {name} is no {kind} weight ({error}); download it again") from None

    def _shape(self, name: str) -> tuple[int, ...]:
        handle, stored = self._handle(self._stored[name]), self._names[name]
        if stored not in handle.keys():  # noqa: SIM118 - it is no dictionary
            raise FormatError(
                f"{self.folder / self._stored[name]} lacks {stored}, which {INDEX} says it holds; download it again"
            )
        return tuple(handle.get_slice(stored).get_shape())

    def _tensor(self, name: str) -> Tensor:
        tensor: Tensor = self._handle(self._stored[name]).get_tensor(self._names[name])
        return tensor


def write_weights(
    folder: Path, weights: Iterator[tuple[str, Tensor]], dtype: torch.dtype | None, shard_bytes: int
) -> dict[str, str]:
    """Write ``model*.safetensors`` of at most ``shard_bytes`` each (a larger tensor gets a file of its own).

    ``dtype``: of all tensors; None = each keeps its own.
    No more than one shard is in memory. Returns the file of every tensor; above one file an index is written.
    """
    shards: list[list[str]] = []
    shard: dict[str, Tensor] = {}
    size = total = 0

    def flush() -> None:
        nonlocal shard, size
        if shard:
            save_tensors(shard, folder / f"shard-{len(shards)}", metadata={"format": "pt"})
            shards.append(list(shard))
        shard, size = {}, 0

    for name, tensor in weights:
        own = tensor.detach().to("cpu", dtype or tensor.dtype, copy=True).contiguous()
        if size + own.nbytes > shard_bytes:
            flush()
        shard[name] = own
        size, total = size + own.nbytes, total + own.nbytes
    flush()
    names = ["model.safetensors"]
    if len(shards) > 1:
        names = [f"model-{n + 1:05d}-of-{len(shards):05d}.safetensors" for n in range(len(shards))]
    for number, name in enumerate(names):
        (folder / f"shard-{number}").rename(folder / name)
    where = {tensor: name for name, tensors in zip(names, shards, strict=True) for tensor in tensors}
    if len(shards) > 1:
        _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": where})
    return where


def write_model(
    folder: Path,
    architecture: Architecture,
    weights: Iterator[tuple[str, Tensor]],
    *,
    dtype: torch.dtype,
    shard_bytes: int,
    tokenizer: Any,
    facts: Mapping[str, Any],
    generation: Mapping[str, Any] | None = None,
) -> None:
    """Write a folder that ``transformers`` opens; it appears whole, or not at all.

    ``tokenizer``: saves its own files (``save(folder)``). ``facts``: kept in ``onecurve.json``: where the model comes from.
    ``generation``: how its parent samples, which it inherits.

    Raises:
        FileExistsError: nothing is overwritten.
    """
    if folder.exists():
        raise FileExistsError(f"{folder} exists already; move it away first")
    with new_folder(folder) as partial:
        partial.mkdir()
        tokenizer.save(partial)
        ids = {"bos_token_id": tokenizer.bos, "eos_token_id": tokenizer.eos, "pad_token_id": tokenizer.pad}
        stored = FAMILIES[architecture.family].stored(weights, architecture)
        write_weights(partial, stored, dtype, shard_bytes)
        _write_json(partial / "config.json", config_json(architecture, dtype, ids))
        _write_json(partial / "generation_config.json", _generation_config(generation or {}, ids, tokenizer.stops))
        _write_json(partial / "onecurve.json", dict(facts))


def read_generation(folder: Path) -> dict[str, Any]:
    """How a folder's model is meant to sample (``generation_config.json``); empty if it does not say.

    Raises:
        FormatError: if the file is damaged.
    """
    file = folder / "generation_config.json"
    stored = read_object(file) if file.is_file() else {}
    return {key: value for key, value in stored.items() if key not in ("transformers_version", "_from_model_config")}


def end_ids(generation: Mapping[str, Any]) -> list[int]:
    """Ids that end a generation, of which a model may have several."""
    ends = generation.get("eos_token_id")
    return [end for end in (ends if isinstance(ends, list) else [ends]) if isinstance(end, int)]


def _generation_config(
    parent: Mapping[str, Any], ids: Mapping[str, int | None], stops: Sequence[int]
) -> dict[str, Any]:
    ends = list(dict.fromkeys([*stops, *end_ids(parent)]))
    sampling = parent or {"do_sample": True, "temperature": 1.0}
    own = {**ids, "eos_token_id": ends if len(ends) > 1 else ids["eos_token_id"]}
    if ids["pad_token_id"] == ids["eos_token_id"]:  # the tokenizer has none of its own
        own["pad_token_id"] = parent.get("pad_token_id", ids["pad_token_id"])
    return {**sampling, **own}


def _write_json(file: Path, value: Any) -> None:
    write_text(file, json.dumps(value, indent=2) + "\n")
