"""A checkpoint on disk: safetensors files of fragments, and a manifest that says what they hold and their digests.

    step-00000100/manifest.json               step, engine and loader state, fragments, sizes and SHA-256 of the files
    step-00000100/rank-00000-000.safetensors  fragments of logical tensors, flat, by number
    latest                                    the name of the newest one

A folder is written under another name and renamed when it is whole; what is not whole never has a checkpoint's name.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, product
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from trainer.config import InputError, RunError
from trainer.disk import save_tensors, sync, write_text
from trainer.parallel.boxes import Box, box_of, boxes_of, intersection, part_of, volume

FORMAT = 2
WITHOUT_BOXES = 1
"""The format before, whose fragments are intervals of the tensors themselves."""
MANIFEST = "manifest.json"
NAME = re.compile(r"step-(\d{8,})")


class CheckpointError(RunError):
    """A checkpoint that cannot be written, or is damaged; the message names it."""


class RestoreError(CheckpointError, InputError):
    """No checkpoint that this run could continue from: damaged ones alone, or one of another model."""


@dataclass(frozen=True)
class Stored:
    """Where a fragment lies: key ``key`` of ``file`` holds elements ``start`` .. ``start + size`` of a box of a tensor."""

    file: str
    key: str
    name: str
    state: str
    box: Box
    start: int
    size: int

    @classmethod
    def of(cls, row: Sequence[Any]) -> Stored:
        """As JSON says it."""
        file, key, name, state, box, start, size = row
        return cls(file, key, name, state, tuple((first, last) for first, last in box), start, size)


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint holds. ``shapes``: of whole logical tensors, by name. ``files``: bytes and SHA-256, by name."""

    step: int
    ranks: int
    files: dict[str, dict[str, Any]]
    shapes: dict[str, list[int]]
    fragments: list[Stored]
    optimizer_steps: dict[str, float]
    engine: dict[str, Any]
    parts: dict[str, Any]
    facts: dict[str, Any]


def folder_name(step: int) -> str:
    """The name of the checkpoint of a step."""
    return f"step-{step:08d}"


def steps_in(folder: Path) -> list[int]:
    """Steps of all checkpoints in ``folder``, newest first, damaged ones too."""
    if not folder.is_dir():
        return []
    matches = (NAME.fullmatch(p.name) for p in folder.iterdir() if p.is_dir())
    return sorted((int(m.group(1)) for m in matches if m), reverse=True)


def write_fragments(file: Path, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Write one file of fragments to the disk itself; gives its ``bytes`` and ``sha256``.

    Raises:
        DiskError: naming the file and why it could not be written (a full disk, for one).
    """
    save_tensors(tensors, file)
    sync(file)
    return {"bytes": file.stat().st_size, "sha256": _digest(file)}


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest, with its own digest, to the disk itself."""
    body = {
        "format": FORMAT,
        **{key: value for key, value in vars(manifest).items() if key != "fragments"},
        "fragments": [list(vars(f).values()) for f in manifest.fragments],
    }
    text = json.dumps(body, sort_keys=True)
    document = {"sha256": hashlib.sha256(text.encode()).hexdigest(), "body": body}
    write_text(folder / MANIFEST, json.dumps(document, sort_keys=True))


def commit(partial: Path, folder: Path) -> None:
    """Give a whole checkpoint its name, and make ``latest`` say so.

    A damaged checkpoint of the same name is kept beside it as ``<name>.damaged-<id>``.
    """
    sync(partial)
    if os.path.lexists(folder):
        folder.rename(folder.with_name(f"{folder.name}.damaged-{uuid.uuid4().hex[:8]}"))
    partial.rename(folder)
    sync(folder.parent)
    write_text(folder.with_name("latest"), f"{folder.name}\n")


def remove(folder: Path) -> None:
    """Delete a checkpoint; it loses its name first, so that half of one is never taken for a damaged one."""
    doomed = folder.with_name(f"{folder.name}.tmp-delete-{uuid.uuid4().hex[:8]}")
    folder.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def clean_partial(folder: Path) -> None:
    """Delete what saves and deletions that were killed have left: folders that never were a checkpoint, or no more."""
    for left in folder.glob("step-*.tmp-*"):
        shutil.rmtree(left, ignore_errors=True)


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a checkpoint.

    Raises:
        CheckpointError: if it cannot be read, is damaged, or is of a format that this release does not know.
    """
    file = folder / MANIFEST
    try:
        document = json.loads(file.read_bytes())
        body, digest = document["body"], document["sha256"]
        text = json.dumps(body, sort_keys=True)
    except FileNotFoundError:
        raise CheckpointError(f"{file} is missing") from None
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read ({error.strerror})") from None
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{file} is damaged ({type(error).__name__}: {error})") from None
    if hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest() != digest:
        raise CheckpointError(f"{file} is damaged: its digest does not match")
    try:
        if (written := body.pop("format")) not in (WITHOUT_BOXES, FORMAT):
            raise CheckpointError(f"{file} was written by another release of onecurve")
        rows, shapes = body.pop("fragments"), body["shapes"]
        if written == WITHOUT_BOXES:
            rows = [[*row[:4], box_of(shapes[row[2]]), *row[4:]] for row in rows]
        manifest = Manifest(**body, fragments=[Stored.of(row) for row in rows])
        wrong = next(incomplete(shapes, manifest.fragments), None)
        wanted = {name: (int(facts["bytes"]), str(facts["sha256"])) for name, facts in manifest.files.items()}
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise CheckpointError(f"{file} was written by another release of onecurve ({error})") from None
    if wrong:
        raise CheckpointError(f"{file} does not make up a model: {wrong}")
    # What is not named there has no digest, and what lies elsewhere is not part of the checkpoint.
    named = {*wanted, *(fragment.file for fragment in manifest.fragments)}
    if foreign := sorted(name for name in named if name not in wanted or Path(name).name != name or name in ("", "..")):
        raise CheckpointError(f"{file} names {', '.join(map(repr, foreign))}, which is no file of this checkpoint")
    return manifest


def verify(folder: Path, share: Callable[[Sequence[str]], Sequence[str]] = list) -> list[str]:
    """What is wrong with a checkpoint, a sentence each; empty if it is whole.

    ``share``: which of the files to look at, so that the ranks verify disjoint ones.
    """
    try:
        manifest = read_manifest(folder)
    except CheckpointError as error:
        return [str(error)]
    return [p for name in share(sorted(manifest.files)) for p in _problems(folder / name, manifest.files[name])]


def _problems(file: Path, wanted: Mapping[str, Any]) -> Iterator[str]:
    try:
        size = file.stat().st_size
        if not file.is_file():
            yield f"{file} is not a file"
        elif size != wanted["bytes"]:
            yield f"{file} has {size} bytes instead of {wanted['bytes']}"
        elif _digest(file) != wanted["sha256"]:
            yield f"{file} is damaged: its digest does not match"
    except FileNotFoundError:
        yield f"{file} is missing"
    except OSError as error:
        yield f"{file} cannot be read ({error.strerror})"


class FragmentFiles:
    """Fragments of a checkpoint, read only where they are asked for."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder, self.manifest = folder, manifest
        self._open: dict[str, Any] = {}
        self._by_tensor: dict[tuple[str, str], list[Stored]] = {}
        for stored in manifest.fragments:
            self._by_tensor.setdefault((stored.name, stored.state), []).append(stored)

    @property
    def tensors(self) -> set[tuple[str, str]]:
        """(name, state) of everything that is there."""
        return set(self._by_tensor)

    def read(self, name: str, state: str, box: Box, start: int, out: Tensor) -> None:
        """Fill ``out`` ``(size,)`` with elements from ``start`` on of a box of a tensor's state, however it was divided.

        Raises:
            CheckpointError: if the checkpoint does not hold all of them.
        """
        missing, end = out.numel(), start + out.numel()
        for stored in self._by_tensor.get((name, state), ()):
            if stored.box != box:
                missing -= self._read_other(stored, box, start, out)
                continue
            first, last = max(start, stored.start), min(end, stored.start + stored.size)
            if first < last:
                piece = self._slice(stored)[first - stored.start : last - stored.start]
                out[first - start : last - start].copy_(piece)
                missing -= last - first
        if missing:
            raise CheckpointError(f"{self.folder} lacks {missing} of {out.numel()} elements of {name} ({state})")

    def _read_other(self, stored: Stored, box: Box, start: int, out: Tensor) -> int:
        """Fill what an interval of another box has in common with an interval of ``box``; gives how many elements that is."""
        count = 0
        ours, theirs = (
            list(_with_places(boxes_of(*interval)))
            for interval in ((box, start, start + out.numel()), (stored.box, stored.start, stored.start + stored.size))
        )
        for (part, at), (other, there) in product(ours, theirs):
            if (both := intersection(part, other)) is not None:
                source = self._slice(stored)[there : there + volume(other)]
                part_of(out[at : at + volume(part)], part, both).copy_(part_of(source, other, both))
                count += volume(both)
        return count

    def full_tensor(self, name: str, state: str, shape: Sequence[int]) -> Tensor:
        """A whole tensor, in the format that it was written in.

        Raises:
            CheckpointError: if a part of it is not there.
        """
        pieces = self._by_tensor.get((name, state))
        dtype = self._slice(pieces[0])[:0].dtype if pieces else torch.float32
        full = torch.empty(*shape, dtype=dtype)
        self.read(name, state, box_of(shape), 0, full.view(-1))
        return full

    def _slice(self, stored: Stored) -> Any:
        if stored.file not in self._open:
            self._open[stored.file] = safe_open(self.folder / stored.file, framework="pt")
        return self._open[stored.file].get_slice(stored.key)


def incomplete(shapes: Mapping[str, Sequence[int]], fragments: Sequence[Stored]) -> Iterator[str]:
    """What fragments of all ranks together leave out or hold twice: a writer's mistake, found before it is believed."""
    tensors: dict[tuple[str, str], dict[Box, list[tuple[int, int]]]] = {}
    for f in fragments:
        boxes = tensors.setdefault((f.name, f.state), {})
        boxes.setdefault(f.box, []).append((f.start, f.start + f.size))
    for (name, state), boxes in tensors.items():
        for box, spans in boxes.items():
            at = 0
            for first, last in sorted(spans):
                if first != at:
                    there = "twice" if first < at else "not"
                    yield f"{name} ({state}): elements {min(at, first)} .. {max(at, first)} are {there} there"
                at = last
            if at != volume(box):
                yield f"{name} ({state}): {at} of {volume(box)} elements are there"
        for one, other in combinations(boxes, 2):
            if intersection(one, other) is not None:
                yield f"{name} ({state}): {one} and {other} have elements in common"
        size, there_are = torch.Size(shapes[name]).numel(), sum(map(volume, boxes))
        if there_are != size:
            yield f"{name} ({state}): boxes of {there_are} of {size} elements are there"


def _with_places(boxes: Iterable[Box]) -> Iterator[tuple[Box, int]]:
    """Boxes that follow each other, each with the place of its first element."""
    at = 0
    for box in boxes:
        yield box, at
        at += volume(box)


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
