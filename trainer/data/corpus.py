"""The data of a run: what to learn from and what to hold out, by configuration."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol

from trainer.batch import Batch
from trainer.config import Node, schema, setting
from trainer.data.loader import Loader, permuted
from trainer.data.rows import Rows, prepare, tokenised
from trainer.data.sources import OnBadRow, Source
from trainer.data.streaming import Stream
from trainer.data.tokenizer import Tokenizer


class Train(Protocol):
    """What a run learns from."""

    fingerprint: str

    def __len__(self) -> int:
        """Rows an epoch."""
        ...

    def loader(self, *, micro: int, seed: int, rank: int, ranks: int) -> Any:
        """This rank's endless micro-batches."""
        ...


class Prepared(Protocol):
    """A source's units (packed rows, pairs) on disk, by number."""

    fingerprint: str

    def __len__(self) -> int: ...
    def unit(self, number: int, /) -> Any: ...
    def join(self, units: Sequence[Any], numbers: Sequence[int]) -> Batch: ...
    def collate(self, numbers: Sequence[int]) -> Batch: ...
    def summary(self, name: str) -> list[str]: ...
    def preview(self, number: int, tokenizer: Tokenizer, /) -> dict[str, str]: ...


@dataclass(frozen=True)
class Prompt:
    """A prompt to answer: its ids, what to show of it, and the answers that are right, if any are known.

    ``pattern``: its last match in a completion is the answer; None = the whole completion. ``messages``, ``row``: the
    conversation that it renders, and all columns of the data's row.
    """

    ids: list[int]
    text: str
    ideal: list[str] = field(default_factory=list)
    pattern: str | None = None
    messages: list[dict[str, Any]] = field(default_factory=list)
    row: dict[str, Any] = field(default_factory=dict)

    def right(self, completion: str) -> bool:
        """Whether a completion gives one of the right answers, letter for letter."""
        return answer_in(completion, self.pattern) in [ideal.strip() for ideal in self.ideal]


def answer_in(text: str, pattern: str | None) -> str:
    """The pattern's last match, or the whole text, without white space around it."""
    found = [text] if pattern is None else re.findall(pattern, text)
    return str(found[-1]).strip() if found else ""


@dataclass
class Corpus:
    """``train``; ``heldout`` rows by source; ``summary``: what preparing them found, a line each, for the log.

    ``floors``: the lowest value that any model can reach, by metric, where the data's own entropy is known.
    ``prompts``: the first n held-out prompts to answer; none where the data has no such thing. ``fingerprint_of``: of what is
    held out in a form that ``heldout`` does not have.
    """

    train: Train
    heldout: Mapping[str, Prepared]
    summary: list[str]
    floors: dict[str, float] = field(default_factory=dict)
    prompts: Callable[[int], list[Prompt]] = lambda count: []
    fingerprint_of: str | None = None

    @property
    def fingerprint(self) -> str:
        """Of everything that is learnt from and measured on."""
        if self.fingerprint_of is not None:
            return self.fingerprint_of
        parts = [self.train.fingerprint, *(f"{n}:{r.fingerprint}" for n, r in self.heldout.items())]
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]


class Mixture:
    """Rows of several sources in one epoch; ``passes``: how often each source's rows come in it.

    Half a pass takes one half of a source in one epoch and the other half in the next.
    """

    def __init__(self, parts: Sequence[Prepared], passes: Sequence[float], seed: int) -> None:
        self.parts, self.seed = parts, seed
        self.counts = [max(1, round(len(rows) * times)) for rows, times in zip(parts, passes, strict=True)]
        mixed = [f"{rows.fingerprint}:{count}" for rows, count in zip(parts, self.counts, strict=True)]
        self.fingerprint = hashlib.sha256("\0".join(mixed).encode()).hexdigest()[:24]

    def __len__(self) -> int:
        return sum(self.counts)

    def resolve(self, epoch: int, index: int) -> int:
        """The row's number, counted through all sources."""
        before = 0
        for part, (rows, count) in enumerate(zip(self.parts, self.counts, strict=True)):
            if index < count:
                turn, place = divmod(epoch * count + index, len(rows))
                return before + (
                    permuted(place, len(rows), f"{self.seed}:{part}:{turn}") if count != len(rows) else place
                )
            index -= count
            before += len(rows)
        raise IndexError(f"no row {index} in an epoch of {len(self)}")

    def collate(self, numbers: Sequence[int]) -> Batch:
        """A micro-batch of the units with these numbers."""
        return self.parts[0].join([self._unit(n) for n in numbers], numbers)

    def _unit(self, number: int) -> Any:
        for rows in self.parts:
            if number < len(rows):
                return rows.unit(number)
            number -= len(rows)
        raise IndexError(f"no row {number}")

    def loader(self, *, micro: int, seed: int, rank: int, ranks: int) -> Loader:
        return Loader(self, micro=micro, seed=seed, rank=rank, ranks=ranks)


@dataclass
class Data(Node):
    """What every kind of data has."""

    unit: ClassVar[str] = "packed rows"
    """What its micro-batches are made of."""

    cache: str | None = setting(None, "folder of prepared data; null = $ONECURVE_CACHE, else ~/.cache/onecurve")

    @property
    def cache_folder(self) -> Path:
        """Where prepared data is kept."""
        named = self.cache or os.environ.get("ONECURVE_CACHE")
        return Path(named) if named else Path.home() / ".cache" / "onecurve"

    def open(self, tokenizer: Tokenizer, length: int, seed: int) -> Corpus:
        """Prepare the data, or find it prepared: rows of ``length`` tokens. Needs no process group."""
        raise NotImplementedError(f"{type(self).__name__} holds no rows")

    def default_tokenizer(self) -> Tokenizer | None:
        """The tokenizer to use when none is named."""
        return None


@dataclass
class Files(Data):
    """Data out of files, folders or the hub."""

    columns_read: ClassVar[tuple[str, ...]] = ()

    train: list[str] = setting(doc="files, folders or hub ids to learn from")
    eval: list[str] = setting(list, "files, folders or hub ids to measure on; each is a source of its own")
    columns: dict[str, str] = setting(dict, "which column holds what, where it is not called so")
    weights: dict[str, float] = setting(dict, "passes of a source in an epoch, by its name; 1 where unnamed", above=0)
    on_bad_row: OnBadRow = setting(
        OnBadRow.error, "error: name the first bad row and stop; skip: leave out, count and log"
    )

    def problems(self) -> Iterator[str]:
        for group, sources in (("train", self.sources(self.train)), ("eval", self.sources(self.eval))):
            for source in sources:
                if problem := source.problem():
                    yield f"data.{group}: {problem}"
            names = [s.name for s in sources]
            for name in {n for n in names if names.count(n) > 1}:
                yield f"data.{group} has two sources called {name}; rename one of the files"
        if not self.train:
            yield "data.train=[] names nothing to learn from; give files, folders or hub ids"
        unknown = self.weights.keys() - {s.name for s in self.sources(self.train)}
        for name in sorted(unknown):
            known = ", ".join(s.name for s in self.sources(self.train))
            yield f"data.weights.{name} is the weight of no source; data.train has {known}"
        for column in sorted(self.columns.keys() - set(self.columns_read)):
            read = ", ".join(f"data.columns.{name}" for name in self.columns_read)
            yield f"data.columns.{column} is not used by this data; it reads {read}"

    def sources(self, paths: Sequence[str]) -> list[Source]:
        """One source for every path."""
        return [Source(path, self.columns.get("text", "text"), self.on_bad_row) for path in paths]

    def open(self, tokenizer: Tokenizer, length: int, seed: int) -> Corpus:
        heldout = {s.name: self.rows(s, tokenizer, length) for s in self.sources(self.eval)}
        parts = {s.name: self.rows(s, tokenizer, length) for s in self.sources(self.train)}
        mixture = Mixture(list(parts.values()), [self.weights.get(name, 1.0) for name in parts], seed)
        return Corpus(mixture, heldout, summaries(parts) + summaries(heldout))

    def rows(self, source: Source, tokenizer: Tokenizer, length: int) -> Prepared:
        """A source's units, prepared now or before."""
        raise NotImplementedError(f"{type(self).__name__} does not say how a source becomes rows")


@schema("data/text")
@dataclass
class TextData(Files):
    """Documents from files, folders or the hub."""

    columns_read: ClassVar[tuple[str, ...]] = ("text",)

    streaming: bool = setting(
        False, "tokenise on the fly instead of preparing a cache; for corpora that do not fit the disk"
    )
    window: int = setting(4096, "streaming: documents that are shuffled and packed together", least=1)

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        if self.streaming and self.weights:
            yield "data.weights is not used with data.streaming=true; list a file twice instead"

    def open(self, tokenizer: Tokenizer, length: int, seed: int) -> Corpus:
        if not self.streaming:
            return super().open(tokenizer, length, seed)
        heldout = {s.name: self.rows(s, tokenizer, length) for s in self.sources(self.eval)}
        return Corpus(Stream(self.sources(self.train), tokenizer, length, self.window), heldout, summaries(heldout))

    def rows(self, source: Source, tokenizer: Tokenizer, length: int) -> Rows:
        key = [source.fingerprint(), self.on_bad_row]
        return prepare(
            self.cache_folder / "rows", key, lambda: tokenised(source.documents(), tokenizer), tokenizer, length,
            source=source,
        )  # fmt: skip


def summaries(parts: Mapping[str, Prepared]) -> list[str]:
    """What preparing the sources found, for the log."""
    return [line for name, part in parts.items() for line in part.summary(name)]
