"""Documents out of files: text, JSON lines (also .gz, .zst), Parquet, folders of them, or a hub id."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum, auto
from pathlib import Path
from typing import Any

import pyarrow.parquet
import zstandard

from trainer.config import InputError

SUFFIXES = (".txt", ".text", ".md", ".jsonl", ".json", ".parquet")
COMPRESSED = (".gz", ".zst")


class OnBadRow(StrEnum):
    """How a row that cannot be used is handled."""

    error = auto()
    skip = auto()


class DataError(InputError):
    """A row or a file that cannot be used; the message names file and line."""


@dataclass
class DataSource:
    """One named part of the data.

    ``path``: a file, a folder, or a hub id.
    ``column``: the column that holds a document's text.
    ``skipped``: one line for every bad row that was left out, in order.
    ``form``: the name of the format that its rows were recognised as.
    """

    path: str
    column: str = "text"
    on_bad_row: OnBadRow = OnBadRow.error
    skipped: list[str] = field(default_factory=list)
    form: str | None = None

    @property
    def name(self) -> str:
        """The file's name without its endings; what metrics are called after."""
        return Path(self.path).name.partition(".")[0] or self.path

    @property
    def local(self) -> bool:
        return Path(self.path).exists()

    def problem(self) -> str | None:
        """Why this source cannot be opened, if that can be seen from its name."""
        path = Path(self.path)
        if path.is_file() and not _readable(path):
            return f"{self.path} is of no kind that is read; use {', '.join(SUFFIXES)}, also with {' or '.join(COMPRESSED)}"
        if path.is_dir() and not self.files():
            return f"{self.path} holds no file of a kind that is read ({', '.join(SUFFIXES)})"
        looks_local = path.suffix != "" or self.path.count("/") != 1 or self.path.startswith((".", "/", "~"))
        if not path.exists() and looks_local:
            return f"{self.path} does not exist; give a file, a folder, or a hub id (owner/name)"
        return None

    def files(self) -> list[Path]:
        """The files of this source, sorted by name."""
        path = Path(self.path)
        if path.is_dir():
            return sorted(p for p in path.rglob("*") if p.is_file() and _readable(p))
        return [path] if path.is_file() else []

    def fingerprint(self) -> str:
        """Of the content: a changed file is another source."""
        if not self.local:
            return hashlib.sha256(f"hub:{self.path}:{self.column}".encode()).hexdigest()
        digest = hashlib.sha256(self.column.encode())
        for file in self.files():
            with file.open("rb") as stream:
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
        """Every row with its place (file and line), in the order of the files.

        Raises:
            DataError: for the first row that cannot be read, unless such rows are skipped.
        """
        if not self.local:
            yield from self._hub()
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
        kind = _kind(file)
        if kind == ".parquet":
            rows = _parquet_rows(file)
        elif kind in (".jsonl", ".json"):
            rows = _json_rows(file)
        else:
            text = _text(file)
            rows = iter([(f"{file}", text if isinstance(text, BadRow) else {self.column: text})])
        for where, row in rows:
            if isinstance(row, BadRow):
                self.reject(where, row.why)
            else:
                yield where, row

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

    def _hub(self) -> Iterator[tuple[str, dict[str, Any]]]:
        import datasets

        rows = datasets.load_dataset(self.path, split="train")
        yield from ((f"{self.path}, row {number}", dict(row)) for number, row in enumerate(rows))


@dataclass
class BadRow:
    """Stands for a row that could not even be parsed."""

    why: str


def _json_rows(file: Path) -> Iterator[tuple[str, Any]]:
    with _open(file) as stream:
        for number, line in enumerate(stream, start=1):
            if number == 1 and line.lstrip()[:1] == b"[" and _kind(file) == ".json":
                yield from _json_array(file, line + stream.read())
                return
            if not line.strip():
                continue
            where = f"{file}, line {number}"
            try:
                row = json.loads(line.decode("utf-8"))
            except UnicodeDecodeError as error:
                yield where, BadRow(f"not UTF-8 (byte {error.start} of the line)")
            except json.JSONDecodeError as error:
                yield where, BadRow(f"not JSON ({error.msg} at column {error.colno})")
            else:
                yield where, row if isinstance(row, dict) else BadRow("not a JSON object")


def _json_array(file: Path, content: bytes) -> Iterator[tuple[str, Any]]:
    try:
        rows = json.loads(content.decode("utf-8"))
    except UnicodeDecodeError as error:
        yield f"{file}", BadRow(f"not UTF-8 (byte {error.start})")
    except json.JSONDecodeError as error:
        yield f"{file}, line {error.lineno}", BadRow(f"not JSON ({error.msg} at column {error.colno})")
    else:
        for number, row in enumerate(rows):
            yield f"{file}, row {number}", row if isinstance(row, dict) else BadRow("not a JSON object")


def _kind(file: Path) -> str:
    return Path(file.stem).suffix if file.suffix in COMPRESSED else file.suffix


def _readable(file: Path) -> bool:
    return _kind(file) in SUFFIXES and not file.name.startswith(".")


def _open(file: Path) -> io.BufferedIOBase:
    if file.suffix == ".gz":
        return gzip.open(file, "rb")
    if file.suffix == ".zst":
        return io.BufferedReader(zstandard.ZstdDecompressor().stream_reader(file.open("rb"), read_across_frames=True))
    return file.open("rb")


def _text(file: Path) -> str | BadRow:
    try:
        with _open(file) as stream:
            return stream.read().decode("utf-8")
    except UnicodeDecodeError as error:
        return BadRow(f"not UTF-8 (byte {error.start})")


def _parquet_rows(file: Path) -> Iterator[tuple[str, Any]]:
    number = 0
    for group in pyarrow.parquet.ParquetFile(file).iter_batches(batch_size=256):
        for row in group.to_pylist():
            yield f"{file}, row {number}", row
            number += 1
