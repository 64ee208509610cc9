"""The formats that a finished model is written in beside its Hugging Face folder: what each needs, refuses and writes.

A row of `FORMATS` is a format. Its functions take plain folders, so that a folder that nobody trained here can be written
too, and read tensor by tensor: no format needs the model in memory to write it.
"""

from __future__ import annotations

import difflib
import importlib.util
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from trainer.data.tokenizer import Tokenizer, open_tokenizer
from trainer.export.compressed_tensors import int_problems, write_int
from trainer.export.ggml import GGUF_FORMATS
from trainer.export.gguf import gguf_problems, open_gguf, write_gguf
from trainer.export.nf4_folder import nf4_problems, write_nf4
from trainer.models.architecture import Architecture
from trainer.models.header import read_shape
from trainer.models.hf_format import SHARD_BYTES, read_config, read_generation, write_model
from trainer.models.load import Model, ModelLoader
from trainer.models.transformer import Transformer
from trainer.parallel.ddp import DDP

Calibration = Sequence[list[int]]
"""Rows of token ids, of any length."""


def loader_of(folder: Path) -> ModelLoader:
    """What reads a folder's tensors under the decoder's own names, dequantised where they are quantised."""
    shape = read_shape(folder)  # a folder that is no model is named as such, not by the tokenizer that it lacks
    tokenizer = open_tokenizer(folder)
    return ModelLoader(Model(path=str(folder)), DDP(), 0, tokenizer.vocab_size, scores=shape.scores)


def opened_folder(folder: Path) -> Transformer:
    """The model of a Hugging Face folder, in float32 on the CPU."""
    return loader_of(folder).load()


def write_copy(dtype: torch.dtype, source: Path, out: Path, _: Calibration) -> list[str]:
    """The same folder with its weights in ``dtype``."""
    load = loader_of(source)
    write_model(
        out, load.architecture, ((name, load.start(name)) for name in load.shapes), dtype=dtype, shard_bytes=SHARD_BYTES,
        tokenizer=open_tokenizer(source), facts={}, generation=read_generation(source),
    )  # fmt: skip
    return []


def nothing_refused(architecture: Architecture, tokenizer: Tokenizer) -> Iterator[str]:
    """Of a format that holds every model."""
    yield from ()


@dataclass(frozen=True)
class ExportFormat:
    """A way out of a Hugging Face folder.

    ``write``: ``write(source, out, calibration)`` makes the folder ``out``, which does not exist yet, of the folder
    ``source``; gives what is to be said about it, a sentence each (rows that fell back to another type). What it
    leaves behind when it fails is removed, and ``out`` is renamed when it is done, by `trainer.export.format_folder`.
    ``open``: the model that such a folder holds, dequantised, in float32 on the CPU.
    ``problems``: by shape and tokenizer alone, before any weight exists: a clause for everything that the format cannot hold,
    which continues "FORMAT: ".
    ``packages``: what must be importable to write it, and the ``extra`` that installs them.
    ``calibrated``: whether `write` needs rows of token ids; the other formats ignore them.
    ``rounds``: whether weights are rounded to a grid. A folder that is rounded already is not rounded again.
    """

    write: Callable[[Path, Path, Calibration], list[str]]
    open: Callable[[Path], Transformer] = opened_folder
    problems: Callable[[Architecture, Tokenizer], Iterator[str]] = nothing_refused
    packages: tuple[str, ...] = ()
    extra: str = ""
    calibrated: bool = False
    rounds: bool = True


FORMATS: Mapping[str, ExportFormat] = {
    "bf16": ExportFormat(partial(write_copy, torch.bfloat16), rounds=False),
    "fp16": ExportFormat(partial(write_copy, torch.float16), rounds=False),
    "int4": ExportFormat(partial(write_int, 4, "gptq"), problems=partial(int_problems, 4), calibrated=True),
    "int4-rtn": ExportFormat(partial(write_int, 4, "rtn"), problems=partial(int_problems, 4)),
    "int8": ExportFormat(partial(write_int, 8, "rtn"), problems=partial(int_problems, 8)),
    "nf4": ExportFormat(write_nf4, problems=nf4_problems, packages=("bitsandbytes",), extra="quant"),
    **{
        f"gguf-{kind}": ExportFormat(
            partial(write_gguf, kind),
            open_gguf,
            gguf_problems,
            ("gguf", "xllamacpp") if how.ggml else ("gguf",),
            "gguf",
            rounds=kind not in ("f16", "bf16"),
        )
        for kind, how in GGUF_FORMATS.items()
    },
}
"""Every format by the name that ``--format`` and ``export.formats`` have for it."""


def name_problems(names: Sequence[str], setting: str) -> Iterator[str]:
    """A sentence for each of ``names`` that is no format, comes twice, or needs a package that is not installed."""
    for name in dict.fromkeys(names):
        if name not in FORMATS:
            near = difflib.get_close_matches(name, FORMATS, n=1)
            hint = f"did you mean {near[0]}?" if near else f"use {', '.join(FORMATS)}"
            yield f"{setting}: {name} is no format; {hint}"
            continue
        if names.count(name) > 1:
            yield f"{setting} names {name} {names.count(name)} times; name it once"
        absent = [p for p in FORMATS[name].packages if importlib.util.find_spec(p) is None]
        if absent:
            yield (
                f"{setting}: {name} needs {' and '.join(absent)}, not installed here; "
                f"pip install 'onecurve[{FORMATS[name].extra}]'"
            )


def model_problems(
    names: Sequence[str], architecture: Architecture, tokenizer: Tokenizer, setting: str
) -> Iterator[str]:
    """A sentence for everything about a model that one of the formats cannot hold; unknown names have none."""
    for name in dict.fromkeys(names):
        if name in FORMATS:
            yield from (f"{setting}: {name}: {clause}" for clause in FORMATS[name].problems(architecture, tokenizer))


def folder_problems(names: Sequence[str], source: Path, setting: str) -> Iterator[str]:
    """`model_problems` of a folder, and a sentence if it is quantised already.

    Raises:
        InputError: if the folder holds no model that can be read.
    """
    architecture, tokenizer = read_shape(source), open_tokenizer(source)
    yield from model_problems(names, architecture, tokenizer, setting)
    settings = read_config(source).get("quantization_config")
    rounding = [name for name in dict.fromkeys(names) if name in FORMATS and FORMATS[name].rounds]
    if settings and rounding:
        yield (
            f"{source} is quantised already (quant_method={settings.get('quant_method')}), and {', '.join(rounding)} would "
            "round its weights once more; give the folder of plain weights that it was made from"
        )
