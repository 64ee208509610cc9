"""The data of a run: what to learn from and what to hold out, by configuration."""

from __future__ import annotations

import hashlib
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol

from trainer.batch import Batch, PackedRows
from trainer.config import Node, schema, setting
from trainer.data.loader import Mixture
from trainer.data.rows import RowStore, prepare_rows, tokenize
from trainer.data.sources import DataSource, OnBadRow
from trainer.data.store import UnitStore, source_facts, source_summary
from trainer.data.streaming import Stream
from trainer.data.tokenizer import Tokenizer


class TrainingData(Protocol):
    """What a run learns from."""

    fingerprint: str

    def __len__(self) -> int:
        """Units an epoch."""
        ...

    def loader(self, *, micro: int, seed: int, rank: int, ranks: int) -> Any:
        """This rank's endless micro-batches."""
        ...


@dataclass(frozen=True)
class Prompt:
    """A prompt to answer.

    ``ids``: what generation continues.
    ``text``: what to show of it.
    ``ideal``: the answers that are right, if any are known.
    ``pattern``: its last match in a completion is the answer; None = the whole completion.
    ``messages``: the conversation that it renders.
    ``row``: all columns of the data's row.
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
    matches = [text] if pattern is None else re.findall(pattern, text)
    return str(matches[-1]).strip() if matches else ""


@dataclass
class Corpus:
    """The data of a run, prepared.

    ``train``: what is learnt from.
    ``heldout``: units to measure on, by source.
    ``summary``: what preparing them found, a line each, for the log.
    ``floors``: the lowest value that any model can reach, by metric, where the data's own entropy is known.
    ``prompts``: the first n held-out prompts to answer; none where the data has no such thing.
    ``fingerprint_of``: of what is held out in a form that ``heldout`` does not have.
    """

    train: TrainingData
    heldout: Mapping[str, UnitStore]
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


@dataclass
class Data(Node):
    """What every kind of data has."""

    batch_type: ClassVar[type[Batch]] = PackedRows
    """The micro-batches that it yields."""

    cache: str | None = setting(None, "folder of prepared data; null = $ONECURVE_CACHE, else ~/.cache/onecurve")

    @property
    def cache_folder(self) -> Path:
        """Where prepared data is stored."""
        configured = self.cache or os.environ.get("ONECURVE_CACHE")
        return Path(configured) if configured else Path.home() / ".cache" / "onecurve"

    def open(self, tokenizer: Tokenizer, length: int, seed: int) -> Corpus:
        """Prepare the data, or open what was prepared before: units of ``length`` tokens. Needs no process group."""
        raise NotImplementedError(f"{type(self).__name__} does not implement open()")

    def default_tokenizer(self) -> Tokenizer | None:
        """The tokenizer to use when none is named."""
        return None


@dataclass
class Files(Data):
    """Data out of files, folders or the hub."""

    train: list[str] = setting(doc="files, folders or hub ids (owner/name:split) to learn from")
    eval: list[str] = setting(list, "files, folders or hub ids to measure on; each is a source of its own")
    columns: dict[str, str] = setting(dict, "which column holds what, where it is not called so")
    source_columns: dict[str, dict[str, str]] = setting(
        dict, "further data.columns of one source, by its name: {gsm8k: {prompt: question}}"
    )
    weights: dict[str, float] = setting(dict, "passes of a source in an epoch, by its name; 1 where unnamed", above=0)
    on_bad_row: OnBadRow = setting(
        OnBadRow.error, "error: name the first bad row and stop; skip: leave out, count and log"
    )

    def problems(self) -> Iterator[str]:
        groups = {"train": self.sources(self.train), "eval": self.sources(self.eval, heldout=True)}
        for group, sources in groups.items():
            for source in sources:
                if problem := source.problem():
                    yield f"data.{group}: {problem}"
            names = [s.name for s in sources]
            for name in {n for n in names if names.count(n) > 1}:
                yield f"data.{group} has two sources called {name}; rename one of the files"
        if not self.train:
            yield "data.train=[] names nothing to learn from; give files, folders or hub ids"
        names = [s.name for s in groups["train"]]
        for name in sorted(self.weights.keys() - set(names)):
            yield f"data.weights.{name} is the weight of no source; data.train has {', '.join(names)}"
        names += [s.name for s in groups["eval"]]
        for name in sorted(self.source_columns.keys() - set(names)):
            yield f"data.source_columns.{name} names no source; there are {', '.join(names)}"
        mappings = {"columns": self.columns, **{f"source_columns.{n}": c for n, c in self.source_columns.items()}}
        for setting_name, columns in mappings.items():
            for column in sorted(columns.keys() - set(self.columns_read())):
                accepted = ", ".join(f"data.columns.{name}" for name in self.columns_read())
                yield f"data.{setting_name}.{column} is not used by this data; it reads {accepted}"

    def columns_read(self) -> tuple[str, ...]:
        """Names that ``data.columns`` can give to other columns."""
        return ("text",)

    def sources(self, paths: Sequence[str], *, heldout: bool = False) -> list[DataSource]:
        """One source for every path; where two would be called alike, by more of their paths."""
        sources = [DataSource(path, on_bad_row=self.on_bad_row, heldout=heldout) for path in paths]
        taken = Counter(name for source in sources for name in dict.fromkeys(source.names))
        for source in sources:
            source.name = next((name for name in source.names if taken[name] == 1), source.name)
            source.columns = {**self.columns, **self.source_columns.get(source.name, {})}
            source.column = source.columns.get("text", "text")
        return sources

    def open(self, tokenizer: Tokenizer, length: int, seed: int) -> Corpus:
        heldout = {s.name: self.rows(s, tokenizer, length) for s in self.sources(self.eval, heldout=True)}
        parts = {s.name: self.rows(s, tokenizer, length) for s in self.sources(self.train)}
        mixture = Mixture(list(parts.values()), [self.weights.get(name, 1.0) for name in parts], seed)
        return Corpus(mixture, heldout, [*self.remarks(), *summaries(parts), *summaries(heldout)])

    def remarks(self) -> list[str]:
        """What is to be said of the sources as they are named."""
        both = [
            path for path in self.eval if path in self.train and (Path(path).is_file() or ":" in path)
        ]  # a folder and a hub id may have two splits
        return [f"data.eval: {path} is in data.train, too: its figures say nothing about other data" for path in both]

    def rows(self, source: DataSource, tokenizer: Tokenizer, length: int) -> UnitStore:
        """A source's units, prepared now or before."""
        raise NotImplementedError(f"{type(self).__name__} does not implement rows()")


@schema("data/text")
@dataclass
class TextData(Files):
    """Documents from files, folders or the hub."""

    streaming: bool = setting(
        False, "tokenise on the fly instead of preparing a cache; for corpora that do not fit the disk"
    )
    window: int = setting(4096, "streaming: documents that are shuffled and packed together", least=1)

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        if self.streaming and self.weights:
            yield "data.weights is not used with data.streaming=true; leave it out, or set data.streaming=false"

    def open(self, tokenizer: Tokenizer, length: int, seed: int) -> Corpus:
        if not self.streaming:
            return super().open(tokenizer, length, seed)
        heldout = {s.name: self.rows(s, tokenizer, length) for s in self.sources(self.eval, heldout=True)}
        sources = self.sources(self.train)
        stream = Stream(sources, tokenizer, length, self.window)
        notes = [line for s in sources for line in source_summary(s.name, source_facts(s))]
        return Corpus(stream, heldout, [*self.remarks(), *notes, *summaries(heldout)])

    def rows(self, source: DataSource, tokenizer: Tokenizer, length: int) -> RowStore:
        key = [source.fingerprint(), self.on_bad_row]
        folder = self.cache_folder / "rows"
        return prepare_rows(
            folder, key, lambda: tokenize(source.documents(), tokenizer), tokenizer, length, source=source
        )


def summaries(parts: Mapping[str, UnitStore]) -> list[str]:
    """What preparing the sources found, for the log."""
    return [line for name, part in parts.items() for line in part.summary(name)]
