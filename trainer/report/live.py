"""A report that is written while its run goes on: cheaply, and never at the run's expense."""

from __future__ import annotations

import logging
import math
import time
from pathlib import Path

from trainer.report import write
from trainer.stopping import Stopped

log = logging.getLogger(__name__)

SHARE = 0.01
"""The part of the run's time that its reports may take."""


class LiveReport:
    """``report.html`` of a run, written at evaluations unless that would cost too much, and at the end always."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._next = -math.inf

    def write(self) -> None:
        """Write it, unless the last one took so long that it is too early for another."""
        if time.monotonic() >= self._next:
            self._write(None)

    def close(self, error: BaseException | None) -> None:
        """Write the last one; ``error``: what ended the run early, a failure or a stop request."""
        if isinstance(error, Stopped):
            self._write(None, error.reason)
        else:
            self._write(None if error is None else f"{type(error).__name__}: {error}".rstrip(": "))

    def _write(self, ended: str | None, stopped: str | None = None) -> None:
        started = time.monotonic()
        try:
            write(self.folder, ended, stopped)
        except Exception:  # a picture of a run must not end it
            log.exception("report.html could not be written; the run goes on (tracking.report=false leaves it out)")
        taken = time.monotonic() - started
        self._next = started + taken / SHARE
