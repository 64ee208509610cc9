"""What a run was made with: versions, commit, command, devices, and the exports that it starts from."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import logging
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch

from trainer.disk import digest, read_json
from trainer.models.hf_format import WeightFiles
from trainer.models.peft_format import AdapterFolder, is_adapter_folder
from trainer.secrets import without_password

log = logging.getLogger(__name__)

RECORD = "onecurve.json"
"""Of an export: what it was made with."""
DECIDING = (".json", ".safetensors", ".model", ".jinja", ".txt")
"""Endings of the files of a model's folder that decide what it computes."""
PACKAGES = (
    "onecurve", "torch", "deepspeed", "datasets", "tokenizers", "safetensors", "wandb", "flash_attn_3", "bitsandbytes",
)  # fmt: skip


def environment_facts(ranks: int) -> dict[str, Any]:
    """Facts for ``config.yaml``, the tracker and the export; reading them starts nothing and needs no network."""
    return {
        "versions": {"python": platform.python_version(), **{p: v for p in PACKAGES if (v := version(p)) is not None}},
        "git": git_commit(Path.cwd()) or git_commit(Path(__file__).parent),
        "command": without_password(shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])),
        "ranks": ranks,
        "device": device_name(),
    }


def ancestry(texts: Mapping[str, tuple[str, str]]) -> dict[str, Any]:
    """Every export or adapter that a configuration names, and those that they were made from.

    ``texts``: the settings that hold a text, by name: the text, and how it is to be recorded.

    ``parents``: digest of each export by the setting that names it. ``ancestors``: by digest the record of each
    (configuration, fingerprints of data and tokenizer, versions, commit, its own parents), to the first of the line.
    """
    parents, ancestors = dict[str, str](), dict[str, Any]()
    for setting, (value, recorded) in texts.items():
        if not _is_file(value, RECORD):
            continue
        parent = read_json(Path(value) / RECORD)
        source = AdapterFolder(Path(value)) if is_adapter_folder(Path(value)) else WeightFiles(Path(value))
        fingerprint = source.fingerprint()
        ancestors |= {**parent.pop("ancestors", {}), fingerprint: {**parent, "folder": recorded}}
        parents[setting] = fingerprint
    return {"parents": parents, "ancestors": ancestors}


def make_room(folder: Path, facts: Mapping[str, Any], *settings: str) -> bool:
    """Whether ``folder`` holds what is to be written already; anything else that is there is moved aside.

    It is the same if run, step and ``settings`` (full names) are, as ``onecurve.json`` has them.
    """
    if not folder.exists():
        return False
    before = read_json(folder / RECORD)
    step = before.get("step")
    own, given = ([_setting(each.get("config", {}), name) for name in settings] for each in (before, facts))
    if (step, before.get("identity"), own) == (facts["step"], facts.get("identity"), given):
        log.info("%s holds the model after step %d already", folder, step)
        return True
    move_aside(folder, facts["step"])
    return False


def _setting(config: Any, name: str) -> Any:
    for key in name.split("."):
        config = config.get(key) if isinstance(config, Mapping) else None
    return config


def move_aside(folder: Path, now: int) -> None:
    """Give an exported folder the name of its step; of one that does not say it, that it was there before step ``now``."""
    step = read_json(folder / RECORD).get("step")
    aside = f"{folder}-step-{step:08d}" if isinstance(step, int) else f"{folder}-before-{now:08d}"
    names = (Path(aside if n == 1 else f"{aside}-{n}") for n in range(1, 1_000_000))
    folder.rename(next(name for name in names if not name.exists()))


def model_digests(texts: Mapping[str, tuple[str, str]]) -> dict[str, str]:
    """A digest of all of every model and adapter that a configuration names, by setting; ``texts`` as in `ancestry`.

    A tokenizer has a fingerprint of its own.
    """
    return {
        setting: model_digest(Path(value))
        for setting, (value, _) in texts.items()
        if setting != "tokenizer.path" and (_is_file(value, "config.json") or _is_file(value, "adapter_config.json"))
    }


def model_digest(folder: Path) -> str:
    """Of all files in a model's folder that decide what it computes, its tokenizer's included."""
    files = sorted(file for file in folder.iterdir() if file.suffix in DECIDING and file.is_file())
    return hashlib.sha256(json.dumps([[file.name, digest(file)] for file in files]).encode()).hexdigest()[:24]


def _is_file(folder: str, name: str) -> bool:
    return bool(folder) and os.path.isfile(os.path.join(folder, name))  # noqa: PTH113, PTH118 (it may be too long a text)


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
