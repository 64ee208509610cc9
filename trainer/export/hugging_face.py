"""The end of a run: a Hugging Face folder of the trained weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum, auto
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainer.config import Node, schema, setting
from trainer.data.tokenizer import Tokenizer
from trainer.export.lineage import make_room
from trainer.models.hf_format import read_generation, write_model
from trainer.models.load import ModelLoader
from trainer.parallel import distributed


class Format(StrEnum):
    """Number format of exported weights."""

    fp32 = auto()
    bf16 = auto()
    fp16 = auto()


@schema("export")
@dataclass
class Export(Node):
    """How the trained model is written."""

    dtype: Format = setting(Format.fp32, "format of the weights; fp32 loses nothing")
    shard_gb: float = setting(5.0, "largest file, GB; above it the weights are split, with an index", above=0)

    def write(
        self,
        folder: Path,
        weights: Callable[[], Iterator[tuple[str, Tensor]]],
        load: ModelLoader,
        tokenizer: Tokenizer,
        facts: dict[str, Any],
    ) -> Path:
        """Write ``folder`` and give it back; collective. The same model in the same format stays as it is.

        ``weights``: gives every tensor of the model on the first rank; the others take part in it.
        ``load``: knows the model's shape, and the folder that it comes from, whose way to sample it inherits.
        ``facts``: the record of the run, with its ``config`` and ``step``.
        Another export that is there is kept as ``<folder>-step-<step>``.
        """
        if distributed.run_on_main(lambda: make_room(folder, facts, "export")):
            return folder
        dtype = {Format.fp32: torch.float32, Format.bf16: torch.bfloat16, Format.fp16: torch.float16}[self.dtype]

        def write() -> None:
            tensors = weights()
            if not distributed.world().is_main:
                _exhaust(tensors)
                return
            write_model(
                folder,
                load.architecture,
                tensors,
                dtype=dtype,
                shard_bytes=int(self.shard_gb * 1e9),
                tokenizer=tokenizer,
                facts=facts,
                generation=read_generation(Path(load.config.path)) if load.config.path else None,
            )

        distributed.run_on_all_ranks(write)
        return folder


def _exhaust(weights: Iterator[tuple[str, Tensor]]) -> None:
    """Take part in every gather; only the first rank keeps what comes."""
    for _ in weights:
        pass
