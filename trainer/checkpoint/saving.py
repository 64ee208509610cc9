"""One rank's share of a checkpoint on its way to the disk, in the foreground or by a thread."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainer.batch import room_for, unpacked
from trainer.checkpoint.folder import Stored, write_fragments
from trainer.parallel.boxes import Box
from trainer.parallel.engine import Fragment

FILE_BYTES = 2**30
"""A rank's fragments are written in files of about this size, so that a save needs little memory beside the model."""


@dataclass
class Written:
    """What one rank wrote.

    Args:
        files: Bytes and SHA-256 of each file, by name.
        shapes: Of the logical tensors that it wrote fragments of, by name.
        fragments: Where each fragment lies.
    """

    files: dict[str, dict[str, Any]]
    shapes: dict[str, list[int]]
    fragments: list[Stored]

    def as_json(self) -> dict[str, Any]:
        """For the other ranks."""
        return {**vars(self), "fragments": [list(vars(fragment).values()) for fragment in self.fragments]}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Written:
        """What `as_json` gave."""
        return cls(value["files"], value["shapes"], [Stored.of(row) for row in value["fragments"]])


class Save:
    """One rank's share of one checkpoint, on its way to the disk."""

    manifest: dict[str, Any]

    def __init__(self, step: int, partial: Path, prefix: str) -> None:
        self.step, self.partial, self.prefix = step, partial, prefix
        self._written = Written({}, {}, [])
        self._error: Exception | None = None
        self._thread: threading.Thread | None = None

    def start(self, copies: Iterable[Copies]) -> None:
        """Write in a thread, which talks to no other rank."""
        self._thread = threading.Thread(target=self.write, args=(copies,), name="checkpoint")
        self._thread.start()

    def write(self, copies: Iterable[Copies]) -> None:
        """Write each of ``copies`` into a file of its own; a failure is kept for `result`."""
        try:
            for together in copies:
                self._written.shapes.update(together.shapes)
                tensors: dict[str, Tensor] = {}
                for name, state, box, start, tensor in together.pieces():
                    key = str(len(self._written.fragments))
                    tensors[key] = tensor
                    self._written.fragments.append(Stored(self._file, key, name, state, box, start, tensor.numel()))
                self._write_file(tensors)
        except Exception as error:
            self._error = error

    @property
    def done(self) -> bool:
        """Whether nothing is left to write, for better or worse."""
        return self._thread is None or not self._thread.is_alive()

    def join(self) -> None:
        if self._thread is not None:
            self._thread.join()

    def result(self) -> Written:
        """What was written.

        Raises:
            DiskError: if something could not be.
        """
        if self._error is not None:
            raise self._error
        return self._written

    @property
    def _file(self) -> str:
        return f"{self.prefix}-{len(self._written.files):03d}.safetensors"

    def _write_file(self, tensors: dict[str, Tensor]) -> None:
        name = self._file
        self._written.files[name] = write_fragments(self.partial / name, tensors)


class Copies:
    """Copies of fragments in CPU memory that nobody else writes to, made while the device goes on.

    From CUDA into pinned memory and on a stream of their own. What writes to the fragments has to wait for them: see `wait`.

    Attributes:
        shapes: Of the logical tensors that the fragments are of, by name.
    """

    def __init__(self, fragments: Sequence[Fragment]) -> None:
        self.shapes = {f.name: list(f.shape) for f in fragments}
        self._places = [(f.name, f.state, f.box, f.start) for f in fragments]
        tensors = [f.tensor.detach() for f in fragments]
        self._copied: torch.cuda.Event | None = None
        if not any(tensor.is_cuda for tensor in tensors):
            self._tensors = [tensor.to("cpu", copy=True).contiguous() for tensor in tensors]
            return
        self._tensors = unpacked(room_for(tensors, pin=True), tensors)
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for copy, tensor in zip(self._tensors, tensors, strict=True):
                copy.copy_(tensor, non_blocking=True)
                if tensor.is_cuda:
                    tensor.record_stream(stream)  # a copy of state in 8 bits is nobody else's: its memory waits
        self._copied = stream.record_event()

    def wait(self, *_: Any) -> None:
        """Let what the device is asked from now on run after the copies; the host goes on."""
        if self._copied is not None:
            torch.cuda.current_stream().wait_event(self._copied)

    def pieces(self) -> Iterator[tuple[str, str, Box, int, Tensor]]:
        """(name, state, box, start, copy) of every fragment, once the copies are complete."""
        if self._copied is not None:
            self._copied.synchronize()
        for place, tensor in zip(self._places, self._tensors, strict=True):
            yield *place, tensor


def in_files(fragments: Iterable[Fragment]) -> Iterator[list[Fragment]]:
    """Fragments in their order, as many together as make a file."""
    together: list[Fragment] = []
    size = 0
    for fragment in fragments:
        if together and size + fragment.tensor.nbytes > FILE_BYTES:
            yield together
            together, size = [], 0
        together.append(fragment)
        size += fragment.tensor.nbytes
    if together:
        yield together
