"""Prepared data on disk: written once under a fingerprint, whole or not at all, and asked for by number."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Protocol, Self

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray

from trainer.batch import Batch
from trainer.data.sources import LOST, DataSource
from trainer.data.tokenizer import Tokenizer
from trainer.disk import writing

log = logging.getLogger(__name__)

SIZES = "sizes.json"
"""Bytes of every file of prepared data, by name."""


class Span(NamedTuple):
    """Ids of a unit to look at.

    ``title``: what they are, where that is not plain.
    ``trained``: whether each id is learnt as a target; None = all of them.
    ``shared``: inputs that come before these ids; they are the first ones of the span before.
    """

    title: str
    ids: Sequence[int]
    trained: Sequence[bool] | None = None
    shared: int = 0


class UnitStore(Protocol):
    """A source's units (packed rows, preference pairs, prompts) on disk, by number."""

    fingerprint: str

    def __len__(self) -> int: ...
    def unit(self, number: int, /) -> Any:
        """The unit with this number."""
        ...

    def join(self, units: Sequence[Any], numbers: Sequence[int]) -> Batch:
        """A micro-batch of these units, which may come from several stores of a kind."""
        ...

    def collate(self, numbers: Sequence[int]) -> Batch:
        """A micro-batch of the units with these numbers; -1 stands for one without weight."""
        ...

    def summary(self, name: str) -> list[str]:
        """What preparing them found, for the log."""
        ...

    def preview(self, number: int, tokenizer: Tokenizer, /) -> dict[str, str]:
        """A unit as texts: ``prompt``, ``completion`` and what else there is."""
        ...

    def spans(self, number: int, /) -> list[Span]:
        """A unit as ids, with what is learnt of them."""
        ...

    def counts(self) -> dict[str, int]:
        """What preparing them counted: units, tokens, trained tokens, and what was cut, dropped or left out."""
        ...


def open_prepared(
    cache: Path, key: Sequence[str], tokenizer: Tokenizer, length: int, write: Callable[[Path, str], None]
) -> Path:
    """The folder of what ``write(folder, fingerprint)`` makes under ``key``, tokenizer and ``length``, made now or before.

    Processes that want the same data at the same time wait for the first. A killed preparation leaves nothing that looks
    finished, since the folder appears by one rename. A folder whose files are not as long as they were written (a disk that
    was full, a copy that was cut off) is made again: memory maps would give fewer tokens, or zeros, in their place.
    """
    parts = [*key, tokenizer.fingerprint, str(length)]
    fingerprint = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]
    folder = cache / fingerprint
    if folder.is_dir() and not truncated_files(folder):
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(cache / f"{fingerprint}.lock"):
        if folder.is_dir() and (problems := truncated_files(folder)):
            log.warning("prepared data is damaged and is prepared again: %s", "; ".join(problems))
            folder.rename(cache / f"{fingerprint}.tmp-{uuid.uuid4().hex[:8]}")
        if not folder.is_dir():
            for left in cache.glob(f"{fingerprint}.tmp-*"):
                shutil.rmtree(left)
            partial = cache / f"{fingerprint}.tmp-{uuid.uuid4().hex[:8]}"
            partial.mkdir()
            try:
                with writing(folder):
                    write(partial, fingerprint)
                    save_json(partial / SIZES, {p.name: p.stat().st_size for p in partial.iterdir()})
                    partial.rename(folder)
            except BaseException:
                shutil.rmtree(partial, ignore_errors=True)
                raise
    return folder


def truncated_files(folder: Path) -> list[str]:
    """What prepared data lacks of what was written, a sentence each; what an earlier release prepared is believed."""
    if not (folder / SIZES).is_file():
        return [] if (folder / "facts.json").is_file() else [f"{folder / 'facts.json'} is missing"]
    try:
        sizes: dict[str, int] = json.loads((folder / SIZES).read_text())
    except ValueError:
        return [f"{folder / SIZES} is cut off"]
    now = {name: (folder / name).stat().st_size if (folder / name).is_file() else 0 for name in sizes}
    return [f"{folder / n} has {now[n]} bytes instead of {size}" for n, size in sizes.items() if now[n] != size]


class TokenWriter:
    """Writes sequences of ids end to end into a folder, with what of them is learnt: ``tokens.bin`` and ``trained.bin``."""

    def __init__(self, folder: Path, tokenizer: Tokenizer) -> None:
        self.dtype = "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"
        self.lengths: list[int] = []
        self._tokens, self._trained = (folder / "tokens.bin").open("wb"), (folder / "trained.bin").open("wb")

    def add(self, ids: Sequence[int], trained: Sequence[bool] | None = None) -> None:
        """The next sequence."""
        self._tokens.write(np.asarray(ids, dtype=self.dtype).tobytes())
        if trained is not None:
            self._trained.write(np.asarray(trained, dtype=np.bool_).tobytes())
        self.lengths.append(len(ids))

    @property
    def offsets(self) -> NDArray[np.int64]:
        """Where each sequence begins, and the end ``(n + 1,)``."""
        return np.concatenate([[0], np.cumsum(self.lengths, dtype=np.int64)]).astype(np.int64)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for file in (self._tokens, self._trained):
            if kind is None:
                _flush(file)
            file.close()


def save_json(file: Path, value: Any) -> None:
    """Write JSON, on the disk when this returns."""
    with file.open("w") as stream:
        json.dump(value, stream)
        _flush(stream)


def save_array(file: Path, array: NDArray[Any]) -> None:
    """Write an array, on the disk when this returns."""
    with file.open("wb") as stream:
        np.save(stream, array)
        _flush(stream)


def _flush(stream: Any) -> None:
    stream.flush()
    os.fsync(stream.fileno())


def source_facts(source: DataSource | None) -> dict[str, Any]:
    """What preparing a source left to say: rows left out, notes with their number of rows, the form of its rows."""
    if source is None:
        return {"skipped": [], "notes": {}, "form": None}
    return {"skipped": source.skipped, "notes": dict(source.notes), "form": source.form}


def source_counts(facts: Mapping[str, Any]) -> dict[str, int]:
    """Rows that were left out, and rows of which a template does not write all."""
    return {"skipped": len(facts["skipped"]), "lost": facts.get("notes", {}).get(LOST, 0)}


def source_summary(name: str, facts: Mapping[str, Any]) -> list[str]:
    """Lines about rows that were left out, and about what else is to be said of a source, if there is anything."""
    skipped, notes = facts["skipped"], facts.get("notes", {})
    lines = [f"{name}: left out {len(skipped)} of its rows, first: {skipped[0]}"] if skipped else []
    return lines + [f"{name}: {note}" + (f" ({count:,} rows)" if count else "") for note, count in notes.items()]
