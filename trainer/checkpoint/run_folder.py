"""The folder of a run: which one it is, what may be in it, and the record of how the run was made."""

from __future__ import annotations

import json
import logging
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from filelock import BaseFileLock, FileLock, Timeout

from trainer.checkpoint.folder import steps_in
from trainer.checkpoint.record import (
    KIND,
    differences,
    environment_digests,
    flat,
    is_free,
    plain,
    read_record,
    settings,
)
from trainer.config import ConfigError, InputError
from trainer.disk import disk_error, write_text
from trainer.export.lineage import environment_facts
from trainer.parallel import distributed
from trainer.stopping import Stopped

RECORD = "config.yaml"
STOPPED = "stopped.json"
"""What a run leaves that stopped early and waits to be continued; whoever starts the run again looks for it."""
LEFT_BY_LAUNCHERS = ("logs", "submissions", STOPPED, ".lock")
"""What may lie in the folder before the run begins."""
CHECKPOINTS = "checkpoints"
"""The folder of checkpoints in it; empty, it may be there, too: what ended before it had begun has left it."""
LEFTOVERS = ("*.partial", "*.partial-*", ".shared-*", "export*.tmp-*", "adapter*.tmp-*")
"""What an attempt that was killed leaves behind, half written."""
FINGERPRINTS = {"data": "the data", "tokenizer": "the tokenizer", "models": "the model in {}"}
"""What a run must find unchanged, beside its settings: the facts of its record that say so, in words."""
PRIVATE = ("attempts", "environment")
"""Facts that are in the record alone, not in checkpoints, exports and trackers."""
LOCK_TIMEOUT = 5.0
"""Seconds to wait for the folder: a launcher may restart a run while the attempt before is still going down."""

log = logging.getLogger(__name__)


def choose(run_dir: str, policy: str, config: Any, made_from: Mapping[str, Any]) -> Path:
    """The folder to use under a ``resume`` policy, free or begun with what matters of ``config``; nothing is created.

    ``config``: the configuration object.
    ``made_from``: fingerprints of data, tokenizer and models, which must be those that the folder was begun with.

    Raises:
        ConfigError: if the policy is ``never`` and the folder holds something, if it cannot be one, or one problem for every
            difference.
    """
    folder = Path(run_dir)
    try:
        taken = folder.exists() and (not folder.is_dir() or any(_counts(entry) for entry in folder.iterdir()))
        above = next((p for p in folder.parents if p.exists() and not p.is_dir()), None)
    except OSError as error:
        raise _unusable(folder, error) from None
    if above is not None:
        raise ConfigError([f"run_dir={run_dir} lies below {above}, which is no folder; use another run_dir"])
    if policy == "never" and taken:
        raise ConfigError(
            [f"run_dir={run_dir} holds a run already and resume=never; use another run_dir, or resume=new"]
        )
    if policy == "new" and taken:
        return next(p for p in (Path(f"{run_dir}-{n}") for n in range(2, 1_000_000)) if not p.exists())
    if taken and not (folder / RECORD).exists():
        raise ConfigError([f"run_dir={run_dir} is not a run directory; use another run_dir, or resume=new"])
    if taken:
        refuse_changes(folder, config, made_from)
    return folder


def _unusable(folder: Path, error: OSError) -> ConfigError:
    return ConfigError([f"run_dir={folder} cannot be used ({error.strerror}); use another run_dir"])


def _counts(entry: Path) -> bool:
    """Whether something in a folder is more than what is left before a run begins."""
    if entry.name in LEFT_BY_LAUNCHERS or any(entry.match(pattern) for pattern in LEFTOVERS):
        return False
    return entry.name != CHECKPOINTS or not entry.is_dir() or bool(steps_in(entry))


@dataclass(frozen=True)
class Attempt:
    """A process group's hold of a run's folder.

    facts: versions, commit, device and the run's identity for trackers, all of the first attempt
    folder: of the run
    record: the content of ``config.yaml`` with this attempt
    """

    facts: dict[str, Any]
    folder: Path
    record: dict[str, Any]

    def accept(self, done: int, last: int) -> None:
        """Write the record; collective. Before it, an attempt that is refused or fails has changed nothing.

        Raises:
            InputError: where the run is to end after step ``last``, and ``done`` steps are taken already.
        """
        if done > last:
            raise InputError(
                f"steps={last} is fewer than the {done} steps that {self.folder} has taken, and their weights are all that "
                f"there is; use steps={done} or more, or start afresh with resume=new"
            )
        text = yaml.safe_dump(self.record, sort_keys=False, allow_unicode=True)
        distributed.run_on_main(lambda: write_text(self.folder / RECORD, text))


@contextmanager
def begin(folder: Path, config: Any, made_from: Mapping[str, Any], ranks: int) -> Iterator[Attempt]:
    """Hold the folder for this attempt, whose record is to be written by `Attempt.accept`. Collective.

    Each attempt after the first is added to the facts under ``attempts``. A run that stops early leaves the marker
    ``stopped.json``.

    Raises:
        InputError: if another process holds the folder, or began another run in it.
        RunError: if the disk is full.
    """
    lock = FileLock(folder / ".lock", timeout=LOCK_TIMEOUT)
    record = distributed.run_on_main(lambda: _begin(folder, lock, config, made_from, ranks))
    facts = {key: value for key, value in record["facts"].items() if key not in PRIVATE}
    try:
        yield Attempt(facts, folder, record)
    except Stopped as stop:
        # Together: by now rank 0 has closed its trackers, and a launcher may end all ranks when the first one exits.
        distributed.run_on_main(partial(_mark, folder, stop))
        raise
    finally:
        lock.release()


def _begin(folder: Path, lock: BaseFileLock, config: Any, made_from: Mapping[str, Any], ranks: int) -> dict[str, Any]:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        raise InputError(f"run_dir={folder} is in use by another process; wait for it or use resume=new") from None
    except OSError as error:
        known = disk_error(error, folder)
        raise _unusable(folder, error) if known is None or isinstance(known, InputError) else known from None
    for left in (path for pattern in LEFTOVERS for path in folder.glob(pattern)):
        shutil.rmtree(left) if left.is_dir() and not left.is_symlink() else left.unlink()
    (folder / STOPPED).unlink(missing_ok=True)
    now, record = environment_facts(ranks), plain(config)
    if not (folder / RECORD).exists():
        identity = uuid.uuid4().hex[:12]
        secret = {"environment": environment_digests(config, identity)}
        return {"config": record, "facts": {**made_from, **now, "identity": identity, **secret}}
    # It may have been begun while this attempt waited for the lock.
    refuse_changes(folder, config, made_from)
    before = read_record(folder / RECORD)
    facts = before["facts"]
    if "models" not in facts:
        log.warning("%s was begun by an earlier release; its models are compared from now on", folder)
    if (kinds := _kinds(record)) and not _kinds(before["config"]):
        log.warning(
            "%s was begun by an earlier release, whose record does not say the kind of %s: that it is the same is not known, "
            "and compared from now on", folder, ", ".join(kinds),
        )  # fmt: skip
    environment = {**environment_digests(config, facts["identity"]), **facts.get("environment", {})}
    facts = {"models": made_from.get("models", {}), **facts, "environment": environment}
    return {"config": record, "facts": {**facts, "attempts": [*facts.get("attempts", []), now]}}


def _kinds(record: Mapping[str, Any]) -> list[str]:
    """Whose kind a record says, of all settings that are a choice."""
    return [name.removesuffix(f".{KIND}") for name in flat(record) if name.endswith(f".{KIND}")]


def _mark(folder: Path, stop: Stopped) -> None:
    content = {"step": stop.step, "last": stop.last, "reason": stop.reason}
    write_text(folder / STOPPED, json.dumps(content) + "\n")


def refuse_changes(folder: Path, config: Any, made_from: Mapping[str, Any] | None = None) -> None:
    """Compare a configuration with the one that a folder was begun with, and what it is made from with what it was.

    Raises:
        ConfigError: with a sentence for every difference that makes another run.
    """
    before = read_record(folder / RECORD)
    problems = [
        f"{key} was {old!r} when {folder} was begun and is {new!r} now; set it back, or start afresh with resume=new"
        for key, old, new in differences(flat(before["config"]), settings(config))
        if not is_free(key)
    ]
    known = before["facts"].get("environment", {})
    now = environment_digests(config, before["facts"]["identity"]) if known else {}
    problems += [
        f"{setting.name} is {setting.value} as it was when {folder} was begun, but the environment variable has another "
        "value now; set it back, or start afresh with resume=new"
        for setting in settings(config)
        if setting.name in known.keys() & now.keys() and known[setting.name] != now[setting.name]
    ]
    if made_from is not None and not problems:
        remedy = f"changed since {folder} was begun; restore it, or start afresh with resume=new"
        problems = [f"{what} {remedy}" for what in _changed(before["facts"], made_from)]
    if problems:
        raise ConfigError(problems)


def _changed(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """What has another fingerprint, in words."""
    for key, words in FINGERPRINTS.items():
        old, new = before.get(key), now.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            yield from (
                words.format(part) for part in sorted(old.keys() | new.keys()) if old.get(part) != new.get(part)
            )
        elif old != new and (old is not None or key != "models"):
            yield words.format("")
