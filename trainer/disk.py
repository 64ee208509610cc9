"""Files that are on the disk itself once they are said to be written, and files that are read as they were written."""

from __future__ import annotations

import errno
import glob
import hashlib
import json
import os
import re
import shutil
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from trainer.config import InputError, RunError

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
REFUSED = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG}
BROKEN = {errno.EIO, errno.ESTALE}
LARGE = 64_000_000
"""Bytes from which on a file's digest is remembered."""
SETTLED = 2.0
"""Seconds after which a file that changes again has another time of change on every file system."""
MAKER = "maker.lock"
"""In a folder that is not complete yet; locked by who makes it."""


class DiskError(RunError):
    """A file that cannot be written or read now: the disk is full or broken, and may be well at another attempt."""


class AccessError(DiskError, InputError):
    """A file that may not be written or read, as it may not be at another attempt."""


def disk_error(error: Exception, file: Path | str | None = None) -> DiskError | None:
    """A sentence about a disk that is full, closed or broken, with the file's name; None for an error of another kind.

    ``file``: what was written; None = as the error names it.
    """
    # safetensors has an exception of its own, which holds the number in words.
    number = re.search(r"\(os error (\d+)\)", str(error)) if isinstance(error, SafetensorError) else None
    code = error.errno if isinstance(error, OSError) else int(number[1]) if number else None
    name = file or getattr(error, "filename", None) or "a file"
    if code in FULL:
        return DiskError(f"{name} could not be written ({os.strerror(code)}); free space there, then run again")
    if code in BROKEN:
        return DiskError(f"{name} could not be written or read ({os.strerror(code)}); look at its disk, then run again")
    if code in REFUSED and name != "a file":
        return AccessError(f"{name} cannot be used ({os.strerror(code)}); allow it, or name another place")
    return None


@contextmanager
def writing(file: Path) -> Iterator[None]:
    """Within it, a disk that is full, closed or broken is an error that names ``file``: what fails to write does not.

    Raises:
        DiskError: a sentence with the remedy.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        if (known := disk_error(error, file)) is None:
            raise
        raise known from error


def sync(path: Path) -> None:
    """Wait until a file's bytes, or a folder's list of names, are on the disk itself."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with writing(path):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder of this name elsewhere, to be made and filled: ``folder`` appears when all of it is on the disk, or never.

    What a process that was killed left of it is removed by whoever makes it next.
    """
    for left in folder.parent.glob(f"{glob.escape(folder.name)}.tmp-*"):
        if _abandoned(left):
            shutil.rmtree(left, ignore_errors=True)
    partial = folder.with_name(f"{folder.name}.tmp-{uuid.uuid4().hex[:8]}")
    partial.mkdir(parents=True)
    inside = partial / folder.name
    lock = FileLock(partial / MAKER)
    try:
        with suppress(OSError, NotImplementedError):  # a file system without locks: nothing is removed there
            lock.acquire()
        yield inside
        for path in [*inside.iterdir(), inside]:
            sync(path)
        inside.rename(folder)
        sync(folder.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        lock.release()


def _abandoned(partial: Path) -> bool:
    """Whether the process that made a partial folder is gone: the system then takes its lock away."""
    if not (partial / MAKER).is_file():
        return False
    try:
        with FileLock(partial / MAKER, timeout=0):
            return True
    except (Timeout, OSError, NotImplementedError):
        return False


def write_text(file: Path, text: str) -> None:
    """Write a file, or replace it: whenever the machine dies, it holds all of the old text or all of the new one."""
    write_bytes(file, text.encode("utf-8", "surrogatepass"))


def write_bytes(file: Path, content: bytes) -> None:
    """As `write_text`."""
    # A new name: nothing that lies there, such as a link to elsewhere, is written to.
    partial = file.with_name(f"{file.name}.partial-{uuid.uuid4().hex[:8]}")
    try:
        with writing(file):
            with partial.open("xb") as stream:
                stream.write(content)
                stream.flush()
                os.fsync(stream.fileno())
            partial.replace(file)
            sync(file.parent)
    finally:
        partial.unlink(missing_ok=True)


def read_text(file: Path) -> str:
    """The text of a file that somebody wrote.

    Raises:
        InputError: if it is not UTF-8.
    """
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{file} is not UTF-8 (byte {error.start}); convert it with iconv") from None


def is_pointer(file: Path) -> bool:
    """Whether Git LFS left a pointer where the file belongs: so a clone looks without it."""
    with file.open("rb") as stream:
        return stream.read(40).startswith(b"version https://git-lfs.github.com/spec/")


def read_lines(file: Path) -> Iterator[tuple[bytes, dict[str, Any] | None]]:
    """Every line of a file of JSON objects with its object; None where it is damaged or was cut off.

    Only a line feed ends a line: a text may hold U+2028, at which ``str.splitlines`` would cut it.
    """
    with file.open("rb") as stream:
        for line in stream:
            try:
                value = json.loads(line) if line.endswith(b"\n") else None
            except (ValueError, RecursionError):
                value = None
            yield line, value if isinstance(value, dict) else None


def read_objects(file: Path) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines, without what is damaged; nothing where there is no file."""
    return [value for _, value in read_lines(file) if value is not None] if file.is_file() else []


def read_json(file: Path) -> dict[str, Any]:
    """The object in a file of JSON; empty where there is no file, or no object that can be read."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def digest(file: Path) -> str:
    """SHA-256 of all of a file; that of a large one is computed once for its (path, size, times, inode) and remembered.

    It is remembered under ``$ONECURVE_CACHE/digests`` (``~/.cache/onecurve``), so that the ranks of a machine read it once.
    """
    facts = file.stat()
    if facts.st_size < LARGE or time.time() - facts.st_mtime < SETTLED:
        return _digest(file)
    identity = [file.resolve(), facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns, facts.st_ino]
    folder = Path(os.environ.get("ONECURVE_CACHE", Path.home() / ".cache" / "onecurve")) / "digests"
    entry = folder / hashlib.sha256(repr(identity).encode()).hexdigest()[:32]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{entry}.lock"):
            if not entry.is_file():
                write_text(entry, _digest(file))
            return entry.read_text()
    except (OSError, DiskError):  # a home that cannot be written to
        return _digest(file)


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def save_tensors(tensors: Mapping[str, Tensor], file: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file, readable by whoever may read its folder: safetensors itself gives it to its owner alone."""
    with writing(file):
        save_file(dict(tensors), file, metadata=metadata)
    file.chmod(file.parent.stat().st_mode & 0o666)
