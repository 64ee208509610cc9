"""Files that are on the disk itself once they are said to be written."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor


def sync(path: Path) -> None:
    """Wait until a file's bytes, or a folder's list of names, are on the disk itself."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def save_tensors(tensors: Mapping[str, Tensor], file: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file, readable by whoever may read its folder: safetensors itself gives it to its owner alone."""
    save_file(dict(tensors), file, metadata=metadata)
    file.chmod(file.parent.stat().st_mode & 0o666)
