"""A run as its own folder records it: how it was made, and its configuration composed again."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trainer.checkpoint.record import read_record
from trainer.checkpoint.run_folder import PRIVATE, RECORD
from trainer.cli.train import split_config_dirs
from trainer.compose import compose
from trainer.config import InputError
from trainer.run import Run


def record_of(run_dir: Path) -> dict[str, Any]:
    """How a run was made, by its record.

    Raises:
        InputError: if the folder is no run's.
    """
    if not (run_dir / RECORD).is_file():
        raise InputError(f"{run_dir} is not a run directory (it has no {RECORD}); give the run_dir of a run")
    facts: dict[str, Any] = read_record(run_dir / RECORD)["facts"]
    return {key: value for key, value in facts.items() if key not in PRIVATE}


def compose_recorded(command: str, run_dir: Path, more: Sequence[str] = ()) -> Run:
    """The configuration that a run's command line described, with further overrides."""
    words = shlex.split(command)[1:]
    config_dirs, overrides = split_config_dirs(words[1:] if words[:1] == ["train"] else words)
    return compose([*overrides, f"run_dir={run_dir}", *more], config_dirs=config_dirs)
