"""What a run was made with: versions, commit, command, devices, and the exports that it starts from."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch

from trainer.models.hf_format import WeightFiles
from trainer.models.peft_format import AdapterFolder, is_adapter_folder

RECORD = "onecurve.json"
"""Of an export: what it was made with."""
PACKAGES = ("onecurve", "torch", "deepspeed", "datasets", "tokenizers", "safetensors", "wandb")


def environment_facts(ranks: int) -> dict[str, Any]:
    """Facts for ``config.yaml``, the tracker and the export; reading them starts nothing and needs no network."""
    return {
        "versions": {"python": platform.python_version(), **{p: v for p in PACKAGES if (v := version(p)) is not None}},
        "git": git_commit(Path.cwd()) or git_commit(Path(__file__).parent),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "ranks": ranks,
        "device": device_name(),
    }


def ancestry(config: Mapping[str, Any]) -> dict[str, Any]:
    """Every export or adapter that a configuration names, and those that they were made from.

    ``parents``: digest of each export by the setting that names it. ``ancestors``: by digest the record of each
    (configuration, fingerprints of data and tokenizer, versions, commit, its own parents), to the first of the line.
    """
    parents, ancestors = dict[str, str](), dict[str, Any]()
    for setting, value in _texts(config):
        record = os.path.join(value, RECORD)  # noqa: PTH118  (a text may be too long for a path, which pathlib refuses)
        if not value or not os.path.isfile(record):  # noqa: PTH113
            continue
        parent = json.loads(Path(record).read_text())
        source = AdapterFolder(Path(value)) if is_adapter_folder(Path(value)) else WeightFiles(Path(value))
        digest = source.fingerprint()
        ancestors |= {**parent.pop("ancestors", {}), digest: {**parent, "folder": value}}
        parents[setting] = digest
    return {"parents": parents, "ancestors": ancestors}


def make_room(folder: Path, step: int) -> bool:
    """Whether ``folder`` holds the result of ``step`` already; that of another is kept aside as ``<folder>-step-<step>``."""
    if not folder.exists():
        return False
    record = folder / RECORD
    before = json.loads(record.read_text())["step"] if record.is_file() else None
    if before == step:
        return True
    aside = Path(f"{folder}-step-{before:08d}" if before is not None else f"{folder}-before-{step:08d}")
    folder.rename(aside)
    return False


def _texts(node: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Every setting that is a text, by its full name."""
    if isinstance(node, Mapping):
        for key, value in node.items():
            yield from _texts(value, f"{path}.{key}" if path else str(key))
    elif isinstance(node, str) and path != "run_dir":
        yield path, node


def git_commit(folder: Path) -> str | None:
    """The commit that ``folder`` is checked out at, with ``+changes`` if files differ from it; None outside a repository."""
    commit = _git(folder, "rev-parse", "HEAD")
    if commit is None:
        return None
    return commit + ("+changes" if _git(folder, "status", "--porcelain", "--untracked-files=no") else "")


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", folder, *arguments], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def version(package: str) -> str | None:
    """The installed version of a package, None where it is not."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


@cache
def source_digest() -> str:
    """A digest of the package's own source files."""
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parents[1].rglob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


def device_name() -> str:
    """The GPU's name, or the kind of CPU."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()} CPU"
