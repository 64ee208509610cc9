"""One named part of the data: a file, a folder, or a split of the hub, and what is done about rows that cannot be used."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum, auto
from pathlib import Path
from typing import Any

from trainer.data.files import (
    COMPRESSED,
    SUFFIXES,
    BadRow,
    DataError,
    damage,
    kind_of,
    readable,
    rows_of,
    without_nulls,
)
from trainer.data.folders import one_split, select
from trainer.data.hub import HubSplit, hub_split

__all__ = ["LOST", "DataError", "DataSource", "OnBadRow"]


NULLS = "nulls inside a column are read as keys that are not there: in Parquet and Arrow all rows have the keys of any"
FILE = re.compile(r"\.[A-Za-z]\w*$")
"""How the name of a file ends; a data set may be called 1.5, too."""
LOST = "a text is lost that the template does not write"
"""Notes on rows."""


class OnBadRow(StrEnum):
    """How a row that cannot be used is handled."""

    error = auto()
    skip = auto()


@dataclass
class DataSource:
    """One named part of the data.

    ``path``: a file, a folder, or a hub id (owner/name, owner/name:split, owner/name:configuration:split).
    ``column``: the column that holds a document's text.
    ``columns``: the row's name of a column, by ours.
    ``roles``: the role of a speaker, by the name that the rows give it.
    ``heldout``: it is measured on, so of a folder the held-out split is read.
    ``name``: what metrics are called after; the file's name without its endings.
    ``skipped``: one line for every bad row that was left out, in order.
    ``notes``: what else is to be said of its rows, with their number; 0 where it is about the whole of it.
    ``form``: the name of the format that its rows were recognised as.
    """

    path: str
    column: str = "text"
    on_bad_row: OnBadRow = OnBadRow.error
    columns: Mapping[str, str] = field(default_factory=dict)
    roles: Mapping[str, str] = field(default_factory=dict)
    heldout: bool = False
    name: str = ""
    skipped: list[str] = field(default_factory=list)
    notes: Counter[str] = field(default_factory=Counter)
    form: str | None = None

    def __post_init__(self) -> None:
        name = Path(self.path).name.partition(".")[0] if self._hub is None else Path(self._hub.name).name
        self.name = self.name or name or self.path

    @property
    def names(self) -> tuple[str, str, str]:
        """What it may be called: `name`, with all but the endings that say how it is read, with its folder before that."""
        if self._hub is not None:
            longer = [Path(self._hub.name).name, *filter(None, self._hub[1:])]
            return self.name, ".".join(longer), ".".join([Path(self._hub.name).parent.name, *longer])
        stem = Path(self.path).name
        for suffix in (*COMPRESSED, *SUFFIXES):
            stem = stem.removesuffix(suffix)
        return self.name, stem or self.path, f"{Path(self.path).parent.name}.{stem}"

    @property
    def local(self) -> bool:
        return Path(self.path).exists()

    @property
    def _hub(self) -> HubSplit | None:
        """What is read of the hub; None for a file or a folder, also for one that is missed."""
        hub = None if self.local else hub_split(self.path)
        return None if hub is None or FILE.search(hub.name) else hub

    def problem(self) -> str | None:
        """Why this source cannot be opened, if that can be seen from its name."""
        path = Path(self.path)
        if path.is_file() and not readable(path):
            return f"{self.path} is of no kind that is read; use {', '.join(SUFFIXES)}, also with {' or '.join(COMPRESSED)}"
        try:
            empty = path.is_dir() and not self.files()
        except DataError as error:
            return str(error)
        if empty:
            return f"{self.path} holds no file of a kind that is read ({', '.join(SUFFIXES)})"
        if not path.exists() and self._hub is None:
            return f"{self.path} does not exist; give a file, a folder, or a hub id (owner/name, or owner/name:split)"
        return None

    def files(self) -> list[Path]:
        """The files of this source in the order in which they are read; of a folder those of one split."""
        path = Path(self.path)
        if path.is_dir():
            selection = select(path, heldout=self.heldout)
            self.notes.update(dict.fromkeys(selection.notes, 0))
            return selection.files
        return [path] if path.is_file() else []

    def fingerprint(self) -> str:
        """Of the content: a changed file is another source."""
        if not self.local:
            which = ":heldout" if self.heldout else ""
            return hashlib.sha256(f"hub:{self.path}:{self.column}{which}".encode()).hexdigest()
        digest = hashlib.sha256(self.column.encode())
        for file in self.files():
            with damage(file), file.open("rb") as stream:
                digest.update(file.name.encode() + hashlib.file_digest(stream, "sha256").digest())
        return digest.hexdigest()

    def documents(self) -> Iterator[str]:
        """Every document's text, in the order of the files.

        Raises:
            DataError: for the first row that cannot be used, unless such rows are skipped.
        """
        return self._texts(self.rows())

    def read(self, file: Path) -> Iterator[str]:
        """The documents of one of `files`."""
        return self._texts(self._rows_of(file))

    def rows(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Every row with its place (file and line), in the order of the files, with columns under our names as well.

        Raises:
            DataError: for what cannot be opened, a damaged file, and the first row that cannot be read unless such rows
                are skipped.
        """
        if problem := self.problem():
            raise DataError(problem)
        if self._hub is not None:
            yield from self._usable(self._rows_of_hub(self._hub), nulls=True)
        for file in self.files():
            yield from self._rows_of(file)

    def reject(self, where: str, why: str) -> None:
        """A row cannot be used: leave it out, or stop.

        Raises:
            DataError: unless such rows are skipped.
        """
        sentence = f"{where}: {why}"
        if self.on_bad_row is OnBadRow.error:
            raise DataError(f"{sentence} (data.on_bad_row=skip leaves such rows out)")
        self.skipped.append(sentence)

    def _rows_of(self, file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
        yield from self._usable(rows_of(file, self.column), nulls=kind_of(file) in (".parquet", ".arrow"))

    def _usable(
        self, rows: Iterator[tuple[str, dict[str, Any] | BadRow]], *, nulls: bool
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        for where, row in rows:
            if isinstance(row, BadRow):
                self.reject(where, row.why)
                continue
            if nulls:
                present = {column: without_nulls(value) for column, value in row.items()}
                if present != row:
                    self.notes[NULLS] += 1
                row = present
            yield where, {**row, **{ours: row[theirs] for ours, theirs in self.columns.items() if theirs in row}}

    def _texts(self, rows: Iterator[tuple[str, dict[str, Any]]]) -> Iterator[str]:
        for where, row in rows:
            text = row.get(self.column)
            if self.column not in row:
                columns = ", ".join(map(str, row)) or "nothing"
                self.reject(where, f"no column '{self.column}', the row has {columns}; set data.columns.text")
            elif not isinstance(text, str):
                self.reject(where, f"'{self.column}' is {type(text).__name__}, not text")
            elif not text.strip():
                self.reject(where, "the document is empty")
            else:
                yield text

    def _rows_of_hub(self, hub: HubSplit) -> Iterator[tuple[str, dict[str, Any] | BadRow]]:
        splits = hub.splits()
        split, notes = (hub.split, []) if hub.split else one_split(hub.name, splits, ":", heldout=self.heldout)
        if split not in splits:
            raise DataError(f"{hub.name} has no split {split}; it has {', '.join(splits)}")
        self.notes.update(dict.fromkeys(notes, 0))
        yield from ((f"{self.path}, row {number}", dict(row)) for number, row in enumerate(splits[split]))
