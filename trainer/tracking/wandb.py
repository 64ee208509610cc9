"""W&B as a place for the numbers of a run: online, offline, and what to do while its server is away."""

from __future__ import annotations

import http.client
import logging
import netrc
import os
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, cast

from trainer.config import Node, setting
from trainer.secrets import without_password

log = logging.getLogger(__name__)

BINS = 40
"""Of histograms."""
LATER = "this attempt is recorded offline and uploaded when the run ends or continues"


class Mode(StrEnum):
    """Where W&B records a run."""

    auto = "auto"
    online = "online"
    offline = "offline"
    disabled = "disabled"


@dataclass
class WandB(Node):
    """Weights & Biases."""

    mode: Mode = setting(Mode.auto, "auto: online where a key is at hand, else offline")
    project: str = setting("onecurve", "the project that runs are listed under")
    entity: str | None = setting(None, "user or team; null = the key's default")
    group: str | None = setting(None, "what belongs together, such as the runs of a sweep")
    tags: list[str] = setting(list, "labels")
    timeout: float = setting(
        30.0, "seconds to wait for the server, before the run and after it; then go on, and upload later", above=0
    )


class WandBSink:
    """The same W&B run through all attempts: its id is recorded when the run folder is begun.

    A W&B outage does not interrupt training: the run is recorded offline then, and uploaded when it ends or continues.
    """

    def __init__(self, config: WandB, mode: str, folder: Path, facts: Mapping[str, Any]) -> None:
        import wandb

        self._wandb, self._folder, self.timeout = wandb, folder, config.timeout
        # Where W&B's tables look for settings, there are the run's own: "defaults" are those of changed ones.
        how = {key: value for key, value in facts.items() if key not in ("config", "defaults", "ancestors")}
        self._settings = {**facts.get("config", {}), "run": how}
        self.mode = mode
        if mode == "online" and not is_reachable(wandb.Settings().base_url, config.timeout):
            log.warning("W&B does not answer; %s", LATER)
            self.mode = "offline"
        if self.mode == "online":
            self.catch_up()
        try:
            self._run = self._begin(config, folder, facts)
        except wandb.errors.CommError as error:
            log.warning("W&B does not answer (%s); %s", str(error).splitlines()[0], LATER)
            # What could not begin still holds the run's id.
            run_with_timeout(self.timeout, wandb.teardown)
            self.mode = "offline"
            self._run = self._begin(config, folder, facts)
        # A resumed run logs some steps again; on an axis of their own they land where they belong.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")
        self._configured_mode = mode

    def _begin(self, config: WandB, folder: Path, facts: Mapping[str, Any]) -> Any:
        settings = self._wandb.Settings(silent=True, console="off", init_timeout=self.timeout)
        words, sys.argv = sys.argv, [without_password(word) for word in sys.argv]  # W&B records them
        try:
            return self._wandb.init(
                id=facts["identity"],
                name=folder.name,
                project=config.project,
                entity=config.entity,
                group=config.group,
                tags=config.tags or None,
                dir=str(folder),
                mode=cast(Any, self.mode),
                resume="allow",
                config=self._settings,
                settings=settings,
            )
        finally:
            sys.argv = words

    def catch_up(self) -> None:
        """Upload what attempts have recorded offline, in their order, as far as there is time."""
        end = time.monotonic() + self.timeout
        left = sorted(d for d in (self._folder / "wandb").glob("offline-run-*") if not any(d.glob("*.synced")))
        reachable = bool(left) and is_reachable(self._wandb.Settings().base_url, self.timeout)
        for folder in left:
            if not (reachable and upload(folder, end - time.monotonic())):
                log.warning("W&B does not answer; %s is uploaded later, or by: wandb sync %s", folder.name, folder)
                return

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({"step": step, **values})

    def histogram(self, step: int, name: str, values: Sequence[float]) -> None:
        self._run.log({"step": step, f"{name}/histogram": self._wandb.Histogram(list(values), num_bins=BINS)})

    def table(self, step: int, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        columns = list(rows[0])
        table = self._wandb.Table(columns=columns, data=[[row[c] for c in columns] for row in rows])
        self._run.log({"step": step, name: table})

    def close(self) -> None:
        if not run_with_timeout(self.timeout, self._run.finish):
            log.warning("W&B does not answer; upload the rest by: wandb sync %s", Path(self._run.dir).parent)
        elif self._configured_mode == "online" != self.mode:
            self.catch_up()


def is_reachable(url: str, seconds: float) -> bool:
    """Whether a server answers in time, with whatever status."""
    try:
        urllib.request.urlopen(url, timeout=seconds).close()
    except urllib.error.HTTPError:
        return True
    except (OSError, http.client.HTTPException):
        return False
    return True


def upload(folder: Path, seconds: float) -> bool:
    """Upload what was recorded offline; False if that failed or took longer than ``seconds``."""
    command = [sys.executable, "-m", "wandb", "sync", str(folder)]
    try:
        return subprocess.run(command, capture_output=True, timeout=max(1.0, seconds)).returncode == 0
    except subprocess.TimeoutExpired:
        return False


def run_with_timeout(seconds: float, action: Callable[[], object]) -> bool:
    """Call ``action`` in a daemon thread and wait ``seconds`` for it; False if it has not returned by then."""
    thread = threading.Thread(target=action, daemon=True)
    thread.start()
    thread.join(seconds)
    return not thread.is_alive()


def wandb_mode(mode: Mode) -> str:
    """The mode to use. ``auto`` is ``WANDB_MODE`` where it is set, else online with an API key and offline without one."""
    if mode is not Mode.auto:
        return mode.value
    if override := os.environ.get("WANDB_MODE"):
        return override
    return "online" if os.environ.get("WANDB_API_KEY") or _in_netrc("api.wandb.ai") else "offline"


def _in_netrc(host: str) -> bool:
    try:
        return netrc.netrc().authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False
