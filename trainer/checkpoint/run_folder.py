"""The folder of a run: which one it is, what may be in it, and the record of how the run was made."""

from __future__ import annotations

import dataclasses
import enum
import json
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from filelock import BaseFileLock, FileLock, Timeout
from omegaconf import MISSING

from trainer.config import ConfigError
from trainer.export.lineage import environment_facts
from trainer.parallel import distributed
from trainer.stopping import Stopped

RECORD = "config.yaml"
STOPPED = "stopped.json"
"""What a run leaves that stopped early and waits to be continued; whoever starts the run again looks for it."""
LEFT_BY_LAUNCHERS = ("logs", "submissions", STOPPED, ".lock", f"{RECORD}.partial")
"""What may lie in the folder before the run begins."""
LOCK_TIMEOUT = 5.0
"""Seconds to wait for the folder: a launcher may restart a run while the attempt before is still going down."""
FREE_TO_CHANGE = (
    "name", "run_dir", "resume", "steps", "epochs", "imports", "strategy", "batch.micro", "tracking", "checkpoint",
    "evaluation", "export", "profile", "watchdog", "preflight",
    "estimate", "sweep", "data.cache", "guard.max_bad_steps", "guard.first_step",
    "model.compile",
    "model.activation_checkpointing",
)  # fmt: skip
"""Settings that a resumed run may change: they decide how the work is done and for how long, not what is computed."""


def choose(run_dir: str, policy: str, config: Mapping[str, Any], made_from: Mapping[str, Any]) -> Path:
    """The folder to use under a ``resume`` policy, free or begun with what matters of ``config``; nothing is created.

    ``made_from``: fingerprints of data and tokenizer, which must be those that the folder was begun with.

    Raises:
        ConfigError: if the policy is ``never`` and the folder holds something, or one problem for every difference.
    """
    folder = Path(run_dir)
    taken = folder.exists() and (
        not folder.is_dir() or any(entry.name not in LEFT_BY_LAUNCHERS for entry in folder.iterdir())
    )
    if policy == "never" and taken:
        raise ConfigError(
            [f"run_dir={run_dir} holds a run already and resume=never; use another run_dir, or resume=new"]
        )
    if policy == "new" and taken:
        return next(p for p in (Path(f"{run_dir}-{n}") for n in range(2, 1_000_000)) if not p.exists())
    if taken and not (folder / RECORD).is_file():
        raise ConfigError([f"run_dir={run_dir} is not a run directory; use another run_dir, or resume=new"])
    if taken:
        _refuse_changes(folder, config, made_from)
    return folder


@contextmanager
def begin(
    folder: Path, config: Mapping[str, Any], made_from: Mapping[str, Any], ranks: int
) -> Iterator[dict[str, Any]]:
    """Hold the folder for this run, and write its record if it has none; gives the facts of the run. Collective.

    The facts (versions, commit, device, and the run's identity for trackers) are those of the first attempt; each further
    attempt is added under ``attempts``. A run that stops early leaves the marker ``stopped.json``.

    Raises:
        RankError: if another process holds the folder.
    """
    lock = FileLock(folder / ".lock", timeout=LOCK_TIMEOUT)
    facts = distributed.run_on_main(lambda: _begin(folder, lock, config, made_from, ranks))
    try:
        yield facts
    except Stopped as stop:
        # Together: by now rank 0 has closed its trackers, and a launcher may end all ranks when the first one exits.
        distributed.run_on_main(partial(_mark, folder, stop))
        raise
    finally:
        lock.release()


def _begin(
    folder: Path, lock: BaseFileLock, config: Mapping[str, Any], made_from: Mapping[str, Any], ranks: int
) -> dict[str, Any]:
    folder.mkdir(parents=True, exist_ok=True)
    try:
        lock.acquire()
    except Timeout:
        raise RuntimeError(f"run_dir={folder} is in use by another process; wait for it or use resume=new") from None
    (folder / STOPPED).unlink(missing_ok=True)
    now = environment_facts(ranks)
    file = folder / RECORD
    if file.is_file():
        facts: dict[str, Any] = yaml.safe_load(file.read_text())["facts"]
        facts.setdefault("attempts", []).append(now)
    else:
        facts = {**made_from, **now, "identity": uuid.uuid4().hex[:12]}
    text = yaml.safe_dump({"config": dict(config), "facts": facts}, sort_keys=False, allow_unicode=True)
    unfinished = folder / f"{RECORD}.partial"
    unfinished.write_text(text)
    unfinished.replace(file)
    return {key: value for key, value in facts.items() if key != "attempts"}


def _mark(folder: Path, stop: Stopped) -> None:
    unfinished = folder / f"{STOPPED}.partial"
    unfinished.write_text(json.dumps({"step": stop.step, "last": stop.last, "reason": stop.reason}) + "\n")
    unfinished.replace(folder / STOPPED)


def _refuse_changes(folder: Path, config: Mapping[str, Any], made_from: Mapping[str, Any]) -> None:
    before = yaml.safe_load((folder / RECORD).read_text())
    problems = [
        f"{key} was {old!r} when {folder} was begun and is {new!r} now; set it back, or start afresh with resume=new"
        for key, old, new in differences(before["config"], config)
        if not any(key == free or key.startswith(f"{free}.") for free in FREE_TO_CHANGE)
    ]
    for what in ("data", "tokenizer", "model"):
        if before["facts"].get(what) != made_from.get(what) and not problems:
            problems.append(f"the {what} changed since {folder} was begun; restore it, or start afresh with resume=new")
    if problems:
        raise ConfigError(problems)


def plain(node: Any) -> Any:
    """A configuration object as plain YAML values."""
    if dataclasses.is_dataclass(node) and not isinstance(node, type):
        return {field.name: plain(getattr(node, field.name)) for field in dataclasses.fields(node)}
    if isinstance(node, enum.Enum):
        return node.value
    if isinstance(node, dict):
        return {key: plain(value) for key, value in node.items()}
    if isinstance(node, list | tuple):
        return [plain(value) for value in node]
    return node


def defaults(node: Any, path: str = "") -> dict[str, Any]:
    """The defaults of all settings that have another value, by full name; None for those without a default."""
    changed: dict[str, Any] = {}
    for field in dataclasses.fields(node):
        value, name = getattr(node, field.name), f"{path}{field.name}"
        if dataclasses.is_dataclass(value):
            changed |= defaults(value, f"{name}.")
            continue
        made = field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
        default = None if made in (dataclasses.MISSING, MISSING) else plain(made)
        if plain(value) != default:
            changed[name] = default
    return changed


def differences(old: Any, new: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Settings that two configurations hold different values of: full name, old value, new value."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        # A setting that the record does not know came with a later release.
        for key in old:
            yield from differences(old.get(key), new.get(key), f"{path}.{key}" if path else str(key))
    elif old != new:
        yield path, old, new
