"""Folders that are written in few bits: weights as they come, the source's configuration, and what lies beside it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from trainer.disk import write_text
from trainer.models.hf_format import LANGUAGE, SCORE, SHARD_BYTES, read_config, write_weights
from trainer.models.stored import IGNORED, StoredWeights

COMPANIONS = (".json", ".jinja", ".model", ".txt", ".md")
"""Endings of the files beside the weights that are as true of the new folder: tokenizer, templates, card."""
REWRITTEN = ("config.json", "onecurve.json", "model.safetensors.index.json")


def plain_names(stored: StoredWeights) -> list[str]:
    """The tensors that a folder in few bits has of another one: a tied head is not written twice."""
    tied = ["lm_head.weight"] if stored.architecture.tie_word_embeddings else []
    return [name for name in stored.files.files if name not in tied and not name.endswith(IGNORED)]


def write_rounded(
    stored: StoredWeights, out: Path, tensors: Iterator[tuple[str, Tensor]], settings: Mapping[str, Any]
) -> None:
    """Write ``out``, which must not exist: ``tensors`` by name, and ``settings`` as the ``quantization_config``."""
    out.mkdir(parents=True)
    write_weights(out, tensors, None, SHARD_BYTES)
    source = stored.files.folder
    config = read_config(source)
    # An image-text model's text part may leave out the one, and its files have the last word on the other.
    config.setdefault("architectures", [stored.family.classes + (SCORE if stored.architecture.scores else LANGUAGE)])
    config["tie_word_embeddings"] = stored.architecture.tie_word_embeddings
    config["quantization_config"] = dict(settings)
    write_text(out / "config.json", json.dumps(config, indent=2) + "\n")
    for file in source.iterdir():
        if file.is_file() and file.suffix in COMPANIONS and file.name not in REWRITTEN:
            shutil.copyfile(file, out / file.name)
