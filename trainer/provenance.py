"""What a run was made with: versions, commit, command, devices."""

from __future__ import annotations

import importlib.metadata
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("onecurve", "torch", "deepspeed", "datasets", "tokenizers", "safetensors", "wandb")


def environment_facts(ranks: int) -> dict[str, Any]:
    """Facts for ``config.yaml``, the tracker and the export; reading them starts nothing and needs no network."""
    return {
        "versions": {"python": platform.python_version(), **{p: v for p in PACKAGES if (v := _version(p)) is not None}},
        "git": git_commit(Path.cwd()) or git_commit(Path(__file__).parent),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "ranks": ranks,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine() + " CPU",
    }


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


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
