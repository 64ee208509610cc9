"""The tensors of a folder under the decoder's own names, whatever its family calls them and however it lays them out."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from trainer.models import bnb_format
from trainer.models.architecture import Architecture
from trainer.models.families import FAMILIES
from trainer.models.family import Origin
from trainer.models.hf_format import FormatError, WeightFiles

NAMED = 3
"""Tensors that a message names; the others are counted."""
IGNORED = (".rotary_emb.inv_freq", ".attention.bias", ".masked_bias")
"""Endings of what earlier releases saved and nothing is computed with."""


class StoredWeights:
    """Parameters of a folder's model, read where they are asked for."""

    def __init__(self, folder: Path, architecture: Architecture) -> None:
        self.files, self.architecture = WeightFiles(folder), architecture
        self.family = FAMILIES[architecture.family]

    def __contains__(self, name: str) -> bool:
        return all(theirs in self.files.files for theirs in self._source(name).names)

    def fingerprint(self) -> str:
        """Of the shape and all of the weights."""
        return self.files.fingerprint()

    def tensor(self, name: str) -> Tensor:
        """A parameter, in the format that it is stored in."""
        source = self._source(name)
        return source.load([self.files.tensor(theirs) for theirs in source.names], self.architecture)[source.place]

    def packed(self, name: str) -> tuple[Tensor, Tensor, Tensor] | None:
        """Codes, maxima and numbers of a parameter as `nf4.pack` gives them, as the folder has them.

        None where it is stored in another way, or as a part of a tensor that begins within a block.
        """
        source = self._source(name)
        packed = self.files.packed(source.names[0]) if len(source.names) == 1 else None
        if packed is None:
            return None
        rows, columns = self.files.shape(source.names[0])
        own = source.load([torch.arange(rows)[:, None]], self.architecture)[source.place].flatten()
        first, last = int(own[0]), int(own[-1]) + 1
        if not torch.equal(own, torch.arange(first, last)):
            return None
        return bnb_format.part_of(packed, first * columns, last * columns)

    def validate(
        self, wanted: Mapping[str, tuple[int, ...]], optional: Collection[str], rows: Collection[str], grown: int
    ) -> None:
        """The folder holds parameters of the shapes ``wanted``, and nothing else but what is ``optional``.

        ``rows``: endings of those with a row for every token, which may lack the ``grown`` last ones.

        Raises:
            FormatError: naming some of what is missing, unexpected, or of another shape.
        """
        read = {theirs for name in wanted for theirs in self._source(name).names}
        missing = sorted(
            n for name in wanted if name not in optional for n in self._source(name).names if n not in self.files.files
        )
        unexpected = [
            n for n in sorted(self.files.files) if n not in read and n not in optional and not n.endswith(IGNORED)
        ]
        problems = [_listed("missing", missing)] if missing else []
        problems += [_listed("unexpected", unexpected)] if unexpected else []
        problems += [] if missing else list(self._wrong(wanted, rows, grown))[:NAMED]
        if problems:
            raise FormatError(f"{self.files.folder}: {'; '.join(problems)}")

    def _wrong(self, wanted: Mapping[str, tuple[int, ...]], rows: Collection[str], grown: int) -> Iterator[str]:
        for name, shape in wanted.items():
            if name in self:
                need = (shape[0] - grown, *shape[1:]) if name.endswith(tuple(rows)) else shape
                if (have := self.shape(name)) != need:
                    yield f"{name} is {have} and should be {need}"

    def shape(self, name: str) -> tuple[int, ...]:
        """A parameter's shape, by the files' headers alone."""
        source = self._source(name)
        shapes = [self.files.shape(theirs) for theirs in source.names]
        stand_ins = [torch.empty(shape, device="meta") for shape in shapes]
        try:
            return tuple(source.load(stand_ins, self.architecture)[source.place].shape)
        except (RuntimeError, IndexError):
            what = ", ".join(f"{n} of {shape}" for n, shape in zip(source.names[:NAMED], shapes, strict=False))
            raise FormatError(f"{self.files.folder}: {what} does not fit its config.json; download it again") from None

    def _source(self, name: str) -> Origin:
        return self.family.source(name, self.architecture, self.files.files)


def _listed(what: str, names: list[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return f"{what} keys {', '.join(names[:NAMED])}{more}"
