"""Packed rows on disk: tokenised once under a fingerprint, mapped into memory, collated on demand."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from filelock import FileLock
from numpy.typing import NDArray

from trainer.batch import Documents, PackedRows
from trainer.data.packing import pack, pieces_of
from trainer.data.sources import DataError, Source
from trainer.data.tokenizer import Tokenizer

log = logging.getLogger(__name__)

FORMAT = 3
SIZES = "sizes.json"
"""Bytes of every file of prepared data, by name."""
TOGETHER = 512
"""Documents tokenised in one call: enough for all cores, little enough for memory."""


class Encoded(NamedTuple):
    """A document's ids, and whether each is learnt as a target; None = all of them. ``cut``: ids that were cut off."""

    ids: Sequence[int]
    trained: Sequence[bool] | None = None
    cut: int = 0


class Piece(NamedTuple):
    """Ids ``(n + 1,)`` of ``n`` pairs, and whether each id is learnt as a target; None = all of them."""

    ids: NDArray[np.int64]
    trained: NDArray[np.bool_] | None = None


class Rows:
    """Rows of ``length`` (input, next token) pairs; a row's number is the same on any number of ranks.

    ``facts``: documents, tokens, rows, padding (part of all positions), tokens learnt as targets, rows left out.
    """

    def __init__(self, folder: Path) -> None:
        self.facts: dict[str, Any] = json.loads((folder / "facts.json").read_text())
        self.fingerprint: str = self.facts["fingerprint"]
        self.length: int = self.facts["length"]
        self.pad: int = self.facts["pad"]
        self._tokens = np.memmap(folder / "tokens.bin", dtype=self.facts["dtype"], mode="r")
        self._trained = np.memmap(folder / "trained.bin", dtype=np.bool_, mode="r") if self.facts["masked"] else None
        self._starts = np.load(folder / "starts.npy", mmap_mode="r")
        self._lengths = np.load(folder / "lengths.npy", mmap_mode="r")
        self._rows = np.load(folder / "rows.npy", mmap_mode="r")

    def __len__(self) -> int:
        return len(self._rows) - 1

    def pieces(self, row: int) -> list[Piece]:
        """The pieces in a row, each one id longer than its pairs."""
        span = slice(int(self._rows[row]), int(self._rows[row + 1]))
        ends = zip(self._starts[span].tolist(), self._lengths[span].tolist(), strict=True)
        return [self._piece(start, start + n + 1) for start, n in ends]

    def _piece(self, start: int, end: int) -> Piece:
        trained = None if self._trained is None else np.array(self._trained[start:end])
        return Piece(self._tokens[start:end].astype(np.int64), trained)

    def unit(self, row: int) -> list[Piece]:
        """What a micro-batch is made of: `pieces`."""
        return self.pieces(row)

    def join(self, units: Sequence[Any], numbers: Sequence[int]) -> PackedRows:
        """A micro-batch of these rows."""
        return collate(units, numbers, self.length, self.pad)

    def collate(self, numbers: Sequence[int]) -> PackedRows:
        """A micro-batch of the rows with these numbers; -1 stands for a row of padding, without weight."""
        return self.join([[] if n < 0 else self.pieces(n) for n in numbers], numbers)

    def preview(self, row: int, tokenizer: Tokenizer) -> dict[str, str]:
        """A row as text."""
        ids = [int(n) for piece in self.unit(row) for n in piece.ids]
        return {"prompt": "", "completion": tokenizer.decode(ids)}

    def summary(self, name: str) -> list[str]:
        """What preparing them found, for the log."""
        f = self.facts
        learnt = f", {f['trained']:,} of them learnt" if f["masked"] else ""
        form = f" ({f['form']})" if f["form"] else ""
        lines = [
            f"{name}: {f['documents']:,} {f['unit']}s{form}, {f['tokens']:,} tokens{learnt} "
            f"in {f['rows']:,} rows of {f['length']} ({100 * f['padding']:.1f}% padding, "
            f"{f['cut_documents']:,} {f['unit']}s cut; median {f['median']:,}, longest {f['longest']:,} tokens)"
        ]
        return lines + left_out(name, f["skipped"])


def collate(rows: Sequence[Sequence[Piece]], numbers: Sequence[int], length: int, pad: int) -> PackedRows:
    """Lay pieces of ids end to end in rows of ``length`` pairs, the rest padding: a document of its own."""
    tokens = torch.full((len(rows), length), pad, dtype=torch.int64)
    targets, mask = tokens.clone(), torch.zeros(len(rows), length)
    lengths: list[int] = []
    real = 0
    for row, pieces in enumerate(rows):
        at = 0
        for ids, trained in pieces:
            piece, end = torch.from_numpy(ids), at + len(ids) - 1
            tokens[row, at:end], targets[row, at:end] = piece[:-1], piece[1:]
            mask[row, at:end] = 1 if trained is None else torch.from_numpy(trained[1:]).float()
            lengths.append(len(ids) - 1)
            at = end
        real += at
        if at < length:
            lengths.append(length - at)
    documents = Documents.from_lengths(lengths, len(rows))
    count = torch.tensor(real, dtype=torch.float64)
    return PackedRows(torch.tensor(list(numbers)), tokens, documents, count, targets, mask)


def left_out(name: str, skipped: Sequence[str]) -> list[str]:
    """A line about rows that were left out, if there are any."""
    return [f"{name}: left out {len(skipped)} of its rows, first: {skipped[0]}"] if skipped else []


def prepare(
    cache: Path,
    key: Sequence[str],
    documents: Callable[[], Iterable[Encoded]],
    tokenizer: Tokenizer,
    length: int,
    *,
    source: Source | None = None,
    unit: str = "document",
) -> Rows:
    """Pack encoded ``documents`` once, under a fingerprint of ``key``, tokenizer and row length.

    ``source``: asked afterwards what was left out and what form its rows had. ``unit``: what a document is called in the log.

    Processes that want the same rows at the same time wait for the first; a killed preparation leaves nothing that looks
    finished, since the folder appears by one rename.

    Raises:
        DataError: if no document is left.
    """

    def write(folder: Path, fingerprint: str) -> None:
        _write(folder, documents(), tokenizer, length, fingerprint, source, unit)

    return Rows(prepared(cache, [str(FORMAT), *key], tokenizer, length, write))


def prepared(
    cache: Path, key: Sequence[str], tokenizer: Tokenizer, length: int, write: Callable[[Path, str], None]
) -> Path:
    """The folder of what ``write(folder, fingerprint)`` makes, made now or before.

    One whose files are not as long as they were written (a disk that was full, a copy that was cut off) is made again: memory
    maps would give fewer tokens, or zeros, in the place of what is missing.
    """
    parts = [*key, tokenizer.fingerprint, str(length)]
    fingerprint = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]
    folder = cache / fingerprint
    if not folder.is_dir() or shortened(folder):
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(cache / f"{fingerprint}.lock"):
            if folder.is_dir() and (wrong := shortened(folder)):
                log.warning("prepared data is damaged and is prepared again: %s", "; ".join(wrong))
                folder.rename(cache / f"{fingerprint}.tmp-{uuid.uuid4().hex[:8]}")
            if not folder.is_dir():
                for left in cache.glob(f"{fingerprint}.tmp-*"):
                    shutil.rmtree(left)
                partial = cache / f"{fingerprint}.tmp-{uuid.uuid4().hex[:8]}"
                partial.mkdir()
                try:
                    write(partial, fingerprint)
                    save_json(partial / SIZES, {p.name: p.stat().st_size for p in partial.iterdir()})
                    partial.rename(folder)
                except BaseException:
                    shutil.rmtree(partial, ignore_errors=True)
                    raise
    return folder


def shortened(folder: Path) -> list[str]:
    """What prepared data lacks of what was written, a sentence each; what an earlier release prepared is believed."""
    if not (folder / SIZES).is_file():
        return [] if (folder / "facts.json").is_file() else [f"{folder / 'facts.json'} is missing"]
    try:
        sizes: dict[str, int] = json.loads((folder / SIZES).read_text())
    except ValueError:
        return [f"{folder / SIZES} is cut off"]
    held = {name: (folder / name).stat().st_size if (folder / name).is_file() else 0 for name in sizes}
    return [f"{folder / n} has {held[n]} bytes instead of {size}" for n, size in sizes.items() if held[n] != size]


def tokenised(documents: Iterable[str], tokenizer: Tokenizer) -> Iterator[Encoded]:
    """Ids of every document: BOS, text, EOS."""
    bos = [] if tokenizer.bos is None else [tokenizer.bos]
    stream = iter(documents)
    while texts := list(islice(stream, TOGETHER)):
        for ids in tokenizer.encode_many(texts):
            start = [] if ids[:1] == bos else bos
            end = [] if ids[-1:] == [tokenizer.eos] else [tokenizer.eos]
            yield Encoded(start + ids + end)


def _write(
    folder: Path,
    documents: Iterable[Encoded],
    tokenizer: Tokenizer,
    length: int,
    fingerprint: str,
    source: Source | None,
    unit: str,
) -> None:
    dtype = "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"
    counts, whole, learnt, masked = [], [], 0, False
    with (folder / "tokens.bin").open("wb") as file, (folder / "trained.bin").open("wb") as mask:
        for ids, trained, cut in documents:
            whole.append(len(ids) + cut)
            file.write(np.asarray(ids, dtype=dtype).tobytes())
            counts.append(len(ids))
            if trained is not None:
                masked = True
                mask.write(np.asarray(trained, dtype=np.bool_).tobytes())
                learnt += sum(trained[1:])
        _flush(file.fileno())
        _flush(mask.fileno())
    left = [] if source is None else source.skipped
    if not counts:
        path = "the data" if source is None else source.path
        if not left:
            raise DataError(f"{path} holds no {unit} to learn from; it is empty")
        raise DataError(f"{path} has no {unit} left to learn from ({len(left)} were left out, the first: {left[0]})")
    offsets = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
    starts, lengths = pieces_of(offsets, length)
    rows = list(pack(lengths, length))
    order = np.concatenate([np.asarray(row, dtype=np.int64) for row in rows])
    save(folder / "starts.npy", starts[order])
    save(folder / "lengths.npy", lengths[order])
    save(folder / "rows.npy", np.concatenate([[0], np.cumsum([len(row) for row in rows], dtype=np.int64)]))
    pairs = int(lengths.sum(dtype=np.int64))
    facts = {
        "fingerprint": fingerprint, "length": length, "dtype": dtype, "pad": tokenizer.pad, "documents": len(counts),
        "cut_documents": sum(n - 1 > length for n in whole), "tokens": pairs, "rows": len(rows),
        "padding": 1 - pairs / (len(rows) * length), "skipped": left, "unit": unit,
        "form": source and source.form, "masked": masked,
        "trained": learnt if masked else pairs, "longest": max(whole) - 1, "median": int(np.median(whole)) - 1,
    }  # fmt: skip
    save_json(folder / "facts.json", facts)


def save_json(file: Path, value: Any) -> None:
    """Write JSON, on the disk when this returns."""
    with file.open("w") as stream:
        json.dump(value, stream)
        _flush(stream.fileno())


def save(file: Path, array: NDArray[Any]) -> None:
    """Write an array, on the disk when this returns."""
    with file.open("wb") as stream:
        np.save(stream, array)
        _flush(stream.fileno())


def _flush(descriptor: int) -> None:
    os.fsync(descriptor)
