"""Rows out of a file: text, JSON, JSON lines (also .gz, .zst), Parquet, Arrow. A damaged file is never a shorter one."""

from __future__ import annotations

import codecs
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import zstandard

from trainer.config import InputError
from trainer.disk import BROKEN, disk_error, is_pointer

TEXT, TABLES = (".txt", ".text", ".md"), (".jsonl", ".json", ".parquet", ".arrow")
SUFFIXES = (*TEXT, *TABLES)
COMPRESSED = (".gz", ".zst")
ARROW_END = b"\xff\xff\xff\xff\0\0\0\0"
"""What ends a stream in Arrow's format."""
WIDE = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}
SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


class DataError(InputError):
    """A row or a file that cannot be used; the message names file and line."""


@dataclass
class BadRow:
    """Stands for a row that could not even be parsed."""

    why: str


def kind_of(file: Path) -> str:
    """The ending that says how a file is read, that of its compression left out."""
    return Path(file.stem).suffix if file.suffix in COMPRESSED else file.suffix


def readable(file: Path) -> bool:
    """Whether a file is of a kind that is read."""
    return kind_of(file) in SUFFIXES and not file.name.startswith(".")


def rows_of(file: Path, column: str) -> Iterator[tuple[str, dict[str, Any] | BadRow]]:
    """Every row with its place (file and line); a text is one row with one ``column``.

    Raises:
        DataError: if the file is damaged or cut off, whatever a run does about bad rows: how much is gone is not known.
    """
    with damage(file):
        if is_pointer(file):
            raise DataError(f"{file} is a pointer of Git LFS, not the file; run git lfs pull in its folder")
        kind = kind_of(file)
        if kind in TEXT:
            text = _text(file)
            yield f"{file}", text if isinstance(text, BadRow) else {column: text}
        elif kind in (".jsonl", ".json"):
            yield from _json_rows(file)
        else:
            yield from _table_rows(file)


@contextmanager
def damage(file: Path) -> Iterator[None]:
    """Name the file in what a library raises while it reads it.

    Raises:
        DataError: for everything that a file which cannot be read makes a library raise.
    """
    try:
        yield
    except OSError as error:
        if error.errno in BROKEN:  # which says nothing about what the file holds
            raise disk_error(error, file) or error from None
        why = "is damaged or cut off" if error.errno is None else "cannot be read"
        raise DataError(f"{file} {why} ({_reason(error)}); get the file again") from None
    except (EOFError, UnicodeDecodeError, zlib.error, zstandard.ZstdError, pyarrow.ArrowException) as error:
        raise DataError(f"{file} is damaged or cut off ({_reason(error)}); get the file again") from None


def _reason(error: BaseException) -> str:
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return text.strip().splitlines()[0].rstrip(".")


class ZstdFile(io.RawIOBase):
    """The content of a .zst file. Unlike zstandard's own reader it tells the end of the data from the end of the file."""

    def __init__(self, file: Path) -> None:
        self._file = file.open("rb")
        self._frame: Any = _frame()
        self._rest, self._ready = b"", memoryview(b"")

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        self._file.close()
        super().close()

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            compressed = self._rest or self._file.read(1 << 17)
            if not compressed:
                if self._frame is not None:
                    raise EOFError("its last frame has no end")
                return 0
            if self._frame is None:
                self._frame = _frame()
            self._ready, self._rest = memoryview(self._frame.decompress(compressed)), b""
            if self._frame.eof:
                self._rest, self._frame = self._frame.unused_data, None
        count = min(len(buffer), len(self._ready))
        buffer[:count], self._ready = self._ready[:count], self._ready[count:]
        return count


def _frame() -> Any:
    return zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()  # what zstd --long=31 wrote, too


def _open(file: Path) -> io.BufferedIOBase:
    if file.suffix in COMPRESSED and not file.stat().st_size:
        raise EOFError("it has 0 bytes")
    if file.suffix == ".gz":
        return gzip.open(file, "rb")
    return io.BufferedReader(ZstdFile(file)) if file.suffix == ".zst" else file.open("rb")


def _without_bom(file: Path, start: bytes) -> bytes:
    for mark, name in WIDE.items():
        if start.startswith(mark):
            raise DataError(f"{file} is {name}, not UTF-8; convert it with iconv -f {name} -t UTF-8")
    return start.removeprefix(codecs.BOM_UTF8)


def _text(file: Path) -> str | BadRow:
    with _open(file) as stream:
        content = _without_bom(file, stream.read())
    if (at := content.find(b"\0")) >= 0:
        return BadRow(f"holds a NUL at byte {at}, so it is damaged or no text")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        line, column = content[: error.start].count(b"\n") + 1, error.start - content.rfind(b"\n", 0, error.start)
        return BadRow(f"not UTF-8 (byte {column} of line {line}); convert it with iconv")


def _json_rows(file: Path) -> Iterator[tuple[str, dict[str, Any] | BadRow]]:
    with _open(file) as stream:
        first = True
        for number, raw in enumerate(stream, start=1):
            line = _without_bom(file, raw) if number == 1 else raw
            if not line.strip():
                continue
            if first and line.lstrip()[:1] == b"[" and kind_of(file) == ".json":
                yield from _json_array(file, number, line + stream.read())
                return
            first = False
            row = parsed(line)
            if isinstance(row, BadRow) and not line.endswith(b"\n"):
                row.why += "; no newline ends it, so the file may be cut off here"
            yield f"{file}, line {number}", row


def _json_array(file: Path, start: int, content: bytes) -> Iterator[tuple[str, dict[str, Any] | BadRow]]:
    try:
        text = content.decode("utf-8")
        rows = json.loads(text)
    except UnicodeDecodeError as error:
        line = start + content[: error.start].count(b"\n")
        raise DataError(
            f"{file}, line {line}: not UTF-8, so none of its rows can be read; convert it with iconv"
        ) from None
    except json.JSONDecodeError as error:
        why = f"not JSON ({error.msg} at column {error.colno})"
        raise DataError(f"{file}, line {start + error.lineno - 1}: {why}, so none of its rows can be read") from None
    except (RecursionError, ValueError) as error:
        raise DataError(f"{file}: {_unparsable(error).why}, so none of its rows can be read") from None
    escaped = SURROGATE.search(text) is not None
    for number, row in enumerate(rows):
        yield f"{file}, row {number}", _checked(row, escaped)


def parsed(line: bytes) -> dict[str, Any] | BadRow:
    """The row that a line of JSON holds."""
    try:
        text = line.decode("utf-8")
        row = json.loads(text)
    except UnicodeDecodeError as error:
        return BadRow(f"not UTF-8 (byte {error.start} of the line)")
    except json.JSONDecodeError as error:
        return BadRow(f"not JSON ({error.msg} at column {error.colno})")
    except (RecursionError, ValueError) as error:
        return _unparsable(error)
    if isinstance(row, list):
        return BadRow("a JSON array, not a JSON object; a file that is one array is named .json")
    return _checked(row, SURROGATE.search(text) is not None)


def _unparsable(error: Exception) -> BadRow:
    return BadRow("nested too deep" if isinstance(error, RecursionError) else f"not JSON ({_reason(error)})")


def _checked(row: Any, escaped: bool) -> dict[str, Any] | BadRow:
    if not isinstance(row, dict):
        return BadRow("not a JSON object")
    if escaped:
        text = json.dumps(row, ensure_ascii=False)
        try:
            text.encode()
        except UnicodeEncodeError as error:
            around = text[max(0, error.start - 20) : error.start]
            return BadRow(
                f"half a character (\\u{ord(text[error.start]):x}) behind {around!r}; the text was cut inside it"
            )
    return row


def _table_rows(file: Path) -> Iterator[tuple[str, dict[str, Any] | BadRow]]:
    number = 0
    for batch in _parquet(file) if kind_of(file) == ".parquet" else _arrow(file):
        for row in _batch_rows(batch):
            yield f"{file}, row {number}", row
            number += 1


def _parquet(file: Path) -> Iterator[pyarrow.RecordBatch]:
    with pyarrow.parquet.ParquetFile(file, page_checksum_verification=True) as table:
        missing = table.metadata.num_rows
        for batch in table.iter_batches(batch_size=256):
            missing -= batch.num_rows
            yield batch
    if missing:
        raise EOFError(f"its number of rows is off by {missing:,}")


def _arrow(file: Path) -> Iterator[pyarrow.RecordBatch]:
    """Batches of Arrow's stream format (what ``datasets`` saves) or file format."""
    with file.open("rb") as stream:
        start = stream.read(6)
        stream.seek(-min(8, file.stat().st_size), io.SEEK_END)
        end = stream.read()
    if start != b"ARROW1" and end != ARROW_END:
        raise EOFError("its stream has no end")
    with pyarrow.memory_map(str(file)) as source:
        if start == b"ARROW1":
            table = pyarrow.ipc.open_file(source)
            yield from (table.get_batch(n) for n in range(table.num_record_batches))
        else:
            yield from pyarrow.ipc.open_stream(source)


def _batch_rows(batch: pyarrow.RecordBatch) -> Iterator[dict[str, Any] | BadRow]:
    for piece in (batch.slice(first, 256) for first in range(0, batch.num_rows, 256)):
        try:
            yield from piece.to_pylist(maps_as_pydicts="strict")
        except (UnicodeDecodeError, KeyError):
            yield from (_single_row(piece.slice(n, 1)) for n in range(piece.num_rows))


def _single_row(batch: pyarrow.RecordBatch) -> dict[str, Any] | BadRow:
    try:
        row: dict[str, Any] = batch.to_pylist(maps_as_pydicts="strict")[0]
    except UnicodeDecodeError as error:
        return BadRow(f"not UTF-8 (byte {error.start} of a text)")
    except KeyError as error:
        return BadRow(f"a map has the key {error} twice")
    return row


def without_nulls(value: Any) -> Any:
    """A value of Parquet or Arrow without the keys that are null: a struct has all keys that any row has."""
    if isinstance(value, dict):
        return {key: without_nulls(member) for key, member in value.items() if member is not None}
    return [without_nulls(member) for member in value] if isinstance(value, list) else value
