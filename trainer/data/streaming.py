"""Corpora that do not fit the disk: tokenised on the fly, shuffled and packed inside fixed windows of documents."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np

from trainer.batch import PackedRows
from trainer.data.loader import Prefetched, permuted
from trainer.data.packing import best_fit, segments_of
from trainer.data.rows import Segment, collate, document_key, tokenize
from trainer.data.sources import DataError, DataSource
from trainer.data.tokenizer import Tokenizer

Row = list[Segment]
SHARD, WINDOW, ROW = 2**40, 2**20, 1
"""A streamed row's number is shard * 2**40 + window * 2**20 + row."""


class Stream:
    """Documents of all files, window by window. Every rank reads all windows and takes its own rows of each.

    So the order is the same on any number of ranks. The fingerprint is of names, not of content: a corpus of this size is not
    read twice.
    """

    def __init__(self, sources: Sequence[DataSource], tokenizer: Tokenizer, length: int, window: int) -> None:
        if remote := [s.path for s in sources if not s.local]:
            raise DataError(
                f"data.streaming=true reads files and folders; {', '.join(remote)} is prepared with data.streaming=false"
            )
        self.shards = [(s, file) for s in sources for file in s.files()]
        self.tokenizer, self.length, self.window = tokenizer, length, window
        named = [f"{file}:{file.stat().st_size}" for _, file in self.shards]
        parts = [*named, tokenizer.fingerprint, str(length), str(window), *document_key(tokenizer)]
        self.fingerprint = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]

    def __len__(self) -> int:
        raise DataError("data.streaming=true does not know the length of an epoch; give steps instead of epochs")

    def loader(self, *, micro: int, seed: int, rank: int, ranks: int) -> StreamLoader:
        return StreamLoader(self, micro=micro, seed=seed, rank=rank, ranks=ranks)

    def windows(self, shard: int, first: int) -> Iterator[list[Row]]:
        """Packed rows of a shard's windows from the ``first`` on."""
        source, file = self.shards[shard]
        documents = islice(source.read(file), first * self.window, None)
        while texts := list(islice(documents, self.window)):
            ids = [np.asarray(e.ids, dtype=np.int64) for e in tokenize(texts, self.tokenizer)]
            flat = np.concatenate(ids)
            starts, lengths = segments_of(np.concatenate([[0], np.cumsum([len(i) for i in ids])]), self.length)
            segments = [Segment(flat[s : s + n + 1]) for s, n in zip(starts.tolist(), lengths.tolist(), strict=True)]
            yield [[segments[n] for n in row] for row in best_fit(lengths.tolist(), self.length)]


class StreamLoader(Prefetched):
    """This rank's micro-batches of a stream; the state is (epoch, shard, window, row), and the window is built again."""

    def __init__(self, stream: Stream, *, micro: int, seed: int, rank: int, ranks: int) -> None:
        self.stream, self.micro, self.seed, self.rank, self.ranks = stream, micro, seed, rank, ranks
        super().__init__({"epoch": 0, "shard": 0, "window": 0, "row": 0, "fingerprint": stream.fingerprint})

    def produce(self, state: dict[str, Any]) -> Iterator[tuple[PackedRows, dict[str, Any]]]:
        rows = self._rows(state)
        while True:
            of_all_ranks = list(islice(rows, self.micro * self.ranks))
            mine, after = of_all_ranks[self.rank :: self.ranks], of_all_ranks[-1][2]
            batch = collate(
                [row for row, _, _ in mine], [n for _, n, _ in mine], self.stream.length, self.stream.tokenizer.pad
            )
            yield batch, {**state, **after}

    def _rows(self, state: dict[str, Any]) -> Iterator[tuple[Row, int, dict[str, int]]]:
        """Every row from ``state`` on, with its number and the state behind it."""
        epoch, place, window, skip = state["epoch"], state["shard"], state["window"], state["row"]
        count = len(self.stream.shards)
        while True:
            empty, from_start = True, (place, window, skip) == (0, 0, 0)
            for turn in range(place, count):
                shard = permuted(turn, count, f"{self.seed}:{epoch}:shards")
                for number, rows in enumerate(self.stream.windows(shard, window), start=window):
                    key = f"{self.seed}:{epoch}:{shard}:{number}"
                    for at in range(skip, len(rows)):
                        empty = False
                        row = permuted(at, len(rows), key)
                        after = {"epoch": epoch, "shard": turn, "window": number, "row": at + 1}
                        yield rows[row], shard * SHARD + number * WINDOW + row * ROW, after
                    skip = 0
                window = 0
            if from_start and empty:
                raise DataError("no document is left to learn from; look at data.train")
            epoch, place = epoch + 1, 0
