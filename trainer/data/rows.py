"""Packed rows on disk: tokenised once, mapped into memory, collated on demand."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from trainer.batch import Branches, Documents, PackedRows
from trainer.data.packing import pack, pack_groups, segments_of
from trainer.data.sources import DataError, DataSource
from trainer.data.store import (
    Span,
    TokenWriter,
    open_prepared,
    save_array,
    save_json,
    source_counts,
    source_facts,
    source_summary,
)
from trainer.data.tokenizer import Tokenizer

FORMAT = 3
DOCUMENTS_A_CALL = 512
"""Documents tokenised in one call: enough for all cores, little enough for memory."""


class Encoded(NamedTuple):
    """A document's ids.

    ``trained``: whether each is learnt as a target; None = all of them.
    ``cut``: ids that were cut off.
    ``shared``: inputs that come before its ids; they are the first ones of the document before, and computed there.
    """

    ids: Sequence[int]
    trained: Sequence[bool] | None = None
    cut: int = 0
    shared: int = 0


class Segment(NamedTuple):
    """A part of a document in a row.

    ``ids`` ``(n + 1,)``: n inputs and their targets.
    ``trained`` ``(n + 1,)``: whether each id is learnt as a target; None = all of them.
    ``shared``: inputs that come before these; they are the first ones of the segment before in the row.
    """

    ids: NDArray[np.int64]
    trained: NDArray[np.bool_] | None = None
    shared: int = 0


class RowStore:
    """Rows of ``length`` (input, next token) positions; a row's number is the same on any number of ranks.

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
        self._shared = np.load(folder / "shared.npy", mmap_mode="r") if self.facts.get("shared") else None

    def __len__(self) -> int:
        return len(self._rows) - 1

    def unit(self, number: int) -> list[Segment]:
        """The segments in a row, each one id longer than its targets."""
        span = slice(int(self._rows[number]), int(self._rows[number + 1]))
        starts, lengths = self._starts[span].tolist(), self._lengths[span].tolist()
        shared = [0] * len(starts) if self._shared is None else self._shared[span].tolist()
        return [self._segment(start, start + n + 1, s) for start, n, s in zip(starts, lengths, shared, strict=True)]

    def _segment(self, start: int, end: int, shared: int) -> Segment:
        trained = None if self._trained is None else np.array(self._trained[start:end])
        return Segment(self._tokens[start:end].astype(np.int64), trained, shared)

    def join(self, units: Sequence[Any], numbers: Sequence[int]) -> PackedRows:
        return collate(units, numbers, self.length, self.pad)

    def collate(self, numbers: Sequence[int]) -> PackedRows:
        return self.join([[] if n < 0 else self.unit(n) for n in numbers], numbers)

    def preview(self, number: int, tokenizer: Tokenizer) -> dict[str, str]:
        ids = [int(n) for segment in self.unit(number) for n in segment.ids]
        return {"prompt": "", "completion": tokenizer.decode(ids)}

    def spans(self, number: int) -> list[Span]:
        return [
            Span(
                f"behind the first {s.shared:,} tokens of the one before" if s.shared else "",
                s.ids.tolist(),
                None if s.trained is None else s.trained.tolist(),
                s.shared,
            )
            for s in self.unit(number)
        ]

    def counts(self) -> dict[str, int]:
        f = self.facts
        return {
            f"{f['unit']}s": f["documents"],
            "rows": f["rows"],
            "tokens": f["tokens"],
            "trained": f["trained"],
            "truncated": f["cut_documents"],
            **source_counts(f),
        }

    def summary(self, name: str) -> list[str]:
        f = self.facts
        learnt = f", {f['trained']:,} of them learnt" if f["masked"] else ""
        form = f" ({f['form']})" if f["form"] else ""
        shared = f", {f['shared']:,} more in beginnings that are computed once" if f.get("shared") else ""
        line = (
            f"{name}: {f['documents']:,} {f['unit']}s{form}, {f['tokens']:,} tokens{learnt} "
            f"in {f['rows']:,} rows of {f['length']}{shared} ({100 * f['padding']:.1f}% padding, "
            f"{f['cut_documents']:,} {f['unit']}s cut; median {f['median']:,}, longest {f['longest']:,} tokens)"
        )
        return [line, *source_summary(name, f)]


def collate(rows: Sequence[Sequence[Segment]], numbers: Sequence[int], length: int, pad: int) -> PackedRows:
    """Lay segments end to end in rows of ``length`` positions, the rest padding: a document of its own."""
    tokens = torch.full((len(rows), length), pad, dtype=torch.int64)
    targets, mask = tokens.clone(), torch.zeros(len(rows), length)
    filled = torch.zeros(len(rows), length, dtype=torch.bool)
    lengths: list[int] = []
    real, branching = 0, False
    for row, segments in enumerate(rows):
        at = 0
        for ids, trained, shared in segments:
            branching |= shared > 0
            segment, end = torch.from_numpy(ids), at + len(ids) - 1
            tokens[row, at:end], targets[row, at:end] = segment[:-1], segment[1:]
            mask[row, at:end] = 1 if trained is None else torch.from_numpy(trained[1:]).float()
            lengths.append(len(ids) - 1)
            at = end
        real += at
        filled[row, :at] = True
        if at < length:
            lengths.append(length - at)
    documents: Documents | Branches = Documents.from_lengths(lengths, len(rows))
    if branching:
        documents = _branches(rows, length)
        tokens, targets, mask, filled = (t.view(1, -1) for t in (tokens, targets, mask, filled))
    if real < tokens.numel():
        documents = replace(documents, real=filled)
    count = torch.tensor(real, dtype=torch.float64)
    # Here, because on a device nobody can count them without waiting for it.
    places = mask.flatten().nonzero().squeeze(1)
    return PackedRows(torch.tensor(list(numbers)), tokens, documents, count, targets, mask, places)


def _branches(rows: Sequence[Sequence[Segment]], length: int) -> Branches:
    """The sequences in rows that are laid end to end, padding as one of its own."""
    sequences: list[list[int]] = []
    for row, segments in enumerate(rows):
        at, end = row * length, (row + 1) * length
        for segment in segments:
            own = range(at, at + len(segment.ids) - 1)
            before = sequences[-1][: segment.shared] if segment.shared else []
            sequences.append([*before, *own])
            at = own.stop
        if at < end:
            sequences.append([*range(at, end)])
    return Branches.of(sequences, len(rows) * length)


def prepare_rows(
    cache: Path,
    key: Sequence[str],
    documents: Callable[[], Iterable[Encoded]],
    tokenizer: Tokenizer,
    length: int,
    *,
    source: DataSource | None = None,
    unit: str = "document",
) -> RowStore:
    """Pack encoded ``documents`` once, under a fingerprint of ``key``, tokenizer and row length.

    ``source``: asked afterwards what was left out and what format its rows had.
    ``unit``: what a document is called in the log.

    Raises:
        DataError: if no document is left.
    """

    def write(folder: Path, fingerprint: str) -> None:
        full_lengths, all_shared, learnt, masked = [], list[int](), 0, False
        with TokenWriter(folder, tokenizer) as out:
            for ids, trained, cut, shared in documents():
                out.add(ids, trained)
                full_lengths.append(shared + len(ids) + cut)
                all_shared.append(shared)
                if trained is not None:
                    masked, learnt = True, learnt + sum(trained[1:])
        skipped = [] if source is None else source.skipped
        if not full_lengths:
            raise DataError(_nothing_to_learn("the data" if source is None else source.path, unit, skipped))
        targets, rows = _pack(folder, out.offsets, np.asarray(all_shared, dtype=np.int32), length)
        save_json(
            folder / "facts.json",
            {
                "fingerprint": fingerprint,
                "length": length,
                "dtype": out.dtype,
                "pad": tokenizer.pad,
                "documents": len(full_lengths),
                "cut_documents": sum(n - 1 > length for n in full_lengths),
                "tokens": targets,
                "rows": rows,
                "padding": 1 - targets / (rows * length),
                "shared": sum(all_shared),
                **source_facts(source),
                "unit": unit,
                "masked": masked,
                "trained": learnt if masked else targets,
                "longest": max(full_lengths) - 1,
                "median": int(np.median(full_lengths)) - 1,
            },
        )

    return RowStore(open_prepared(cache, [str(FORMAT), *key, *document_key(tokenizer)], tokenizer, length, write))


def _nothing_to_learn(path: str, unit: str, skipped: Sequence[str]) -> str:
    if not skipped:
        return f"{path} holds no {unit} to learn from; it is empty"
    return f"{path} has no {unit} left to learn from ({len(skipped)} were left out, the first: {skipped[0]})"


def _pack(folder: Path, offsets: NDArray[np.int64], shared: NDArray[np.int32], length: int) -> tuple[int, int]:
    """Write which segments make up each row; gives the number of targets and of rows."""
    starts, lengths = segments_of(offsets, length)
    sharing = bool(shared.any())
    # Documents that share a beginning fit a row together, so that each is one segment.
    rows = list(pack_groups(lengths, shared == 0, length) if sharing else pack(lengths, length))
    order = np.concatenate([np.asarray(row, dtype=np.int64) for row in rows])
    if sharing:
        save_array(folder / "shared.npy", shared[order])
    save_array(folder / "starts.npy", starts[order])
    save_array(folder / "lengths.npy", lengths[order])
    save_array(folder / "rows.npy", np.concatenate([[0], np.cumsum([len(row) for row in rows], dtype=np.int64)]))
    return int(lengths.sum(dtype=np.int64)), len(rows)


def document_key(tokenizer: Tokenizer) -> list[str]:
    """What prepared documents depend on beside tokenizer and text: release 0.1 put BOS before all of them."""
    return [] if tokenizer.bos is None or tokenizer.adds_bos else ["documents without BOS"]


def tokenize(documents: Iterable[str], tokenizer: Tokenizer) -> Iterator[Encoded]:
    """Ids of every document: BOS where the tokenizer itself puts it before a text, the text, EOS."""
    bos = [tokenizer.bos] if tokenizer.bos is not None and tokenizer.adds_bos else []
    stream = iter(documents)
    while texts := list(islice(stream, DOCUMENTS_A_CALL)):
        for ids in tokenizer.encode_many(texts):
            start = [] if ids[:1] == bos else bos
            end = [] if ids[-1:] == [tokenizer.eos] else [tokenizer.eos]
            yield Encoded(start + ids + end)
