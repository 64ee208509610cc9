"""The end of a run: a Hugging Face folder of the trained weights, and further formats of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum, auto
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainer.config import Node, schema, setting
from trainer.data.corpus import Corpus
from trainer.data.tokenizer import Tokenizer
from trainer.export.export_rows import calibration_rows, heldout_of
from trainer.export.format_folder import write_formats
from trainer.export.formats import model_problems, name_problems
from trainer.export.lineage import make_room
from trainer.models.adapter import Adapter
from trainer.models.architecture import Architecture
from trainer.models.hf_format import read_generation, write_model
from trainer.models.load import ModelLoader
from trainer.parallel import distributed


class Format(StrEnum):
    """Number format of exported weights."""

    fp32 = auto()
    bf16 = auto()
    fp16 = auto()


SAME = ("export.dtype", "export.shard_gb", "adapter.merge_onto")
"""Settings that decide what is exported of a step."""


@schema("export")
@dataclass
class Export(Node):
    """How the trained model is written."""

    dtype: Format = setting(Format.fp32, "format of the weights; fp32 loses nothing")
    shard_gb: float = setting(5.0, "largest file, GB; above it the weights are split, with an index", above=0)
    formats: list[str] = setting(
        list, "further formats beside export/, each in export-<format>/ with what it cost (docs/quantization.md)"
    )
    cost_tokens: int = setting(
        16384, "held-out tokens on which what each of the formats costs is measured; 0 = only sizes are said", least=0
    )

    def problems(self) -> Iterator[str]:
        yield from name_problems(self.formats, "export.formats")

    def validate(self, architecture: Architecture, tokenizer: Tokenizer, adapter: Adapter) -> Iterator[str]:
        """One sentence for everything about the trained model that one of the formats cannot hold."""
        yield from model_problems(self.formats, architecture, tokenizer, "export.formats")
        if self.formats and not adapter.exports:
            yield "export.formats are made of the merged model, which adapter.merge=false leaves out; use adapter.merge=true"

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
        if distributed.run_on_main(lambda: make_room(folder, facts, *SAME)):
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

    def write_formats(
        self, folder: Path, corpus: Corpus, answer_tokens: int, say: Callable[[Sequence[str]], None]
    ) -> None:
        """Write the ``formats`` of a run's ``export/`` and measure what each cost; collective, the main rank works alone.

        ``corpus``: its training rows calibrate, its held-out ones measure. ``answer_tokens``: the longest answer to a prompt.
        """
        if not self.formats:
            return

        def write() -> None:
            outs = {name: folder / f"export-{name}" for name in self.formats}
            heldout = heldout_of(corpus, self.cost_tokens, answer_tokens)
            write_formats(folder / "export", outs, calibration_rows(corpus.train), heldout, say)

        distributed.run_long_on_main(write)


def _exhaust(weights: Iterator[tuple[str, Tensor]]) -> None:
    """Take part in every gather; only the first rank keeps what comes."""
    for _ in weights:
        pass
