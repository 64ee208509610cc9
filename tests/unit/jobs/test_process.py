"""Ranks as processes: what they know, how they end, and who hears of a signal."""

import os
import signal
import socket
import threading
import time

import pytest
from torch.distributed import TCPStore

from trainer.jobs import process
from trainer.jobs.process import ExitStatus, places, run_ranks

TELL = "import os; print(os.environ['RANK'], 'of', os.environ['WORLD_SIZE'], os.environ['LOCAL_WORLD_SIZE'])"
FAIL_OR_SLEEP = "import os, sys, time; sys.exit(3) if os.environ['RANK'] == '1' else time.sleep(60)"
SAVE_AND_STOP = """
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
print("ready", flush=True)
time.sleep(60)
"""
IGNORE = (
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('ready', flush=True); time.sleep(60)"
)


def test_every_rank_knows_its_place_and_has_a_log_of_its_own(tmp_path):
    with places(2) as here:
        status = run_ranks(["-c", TELL], here, lambda where: tmp_path / "logs" / f"rank{where.rank}.log")
    assert status == ExitStatus(0, signalled=False)
    assert [(tmp_path / "logs" / f"rank{n}.log").read_text() for n in (0, 1)] == ["0 of 2 2\n", "1 of 2 2\n"]


def test_the_port_that_ranks_meet_at_is_theirs_alone():
    with places(2) as here, socket.socket() as other:
        port = here[0].master[1]
        with pytest.raises(OSError, match="in use"):
            other.bind(("127.0.0.1", port))
        store = TCPStore("127.0.0.1", port, 1, is_master=True, wait_for_workers=False)
        store.set("step", "3")
        assert store.get("step") == b"3"


def test_a_rank_that_fails_ends_the_others(tmp_path, monkeypatch):
    monkeypatch.setattr(process, "GRACE", 0.2)
    started = time.monotonic()
    with places(2) as here:
        assert run_ranks(["-c", FAIL_OR_SLEEP], here, lambda _: tmp_path / "log").code == 3
    assert time.monotonic() - started < 30


def test_a_failure_that_another_process_saw_ends_the_ranks(tmp_path, monkeypatch):
    monkeypatch.setattr(process, "GRACE", 0.2)
    with places(1) as here:
        status = run_ranks(
            ["-c", "import time; time.sleep(60)"], here, lambda _: tmp_path / "log", failed_elsewhere=lambda: True
        )
    assert status.code == -signal.SIGKILL


def terminated_when_ready(tmp_path, script: str, **options) -> ExitStatus:
    """Run a script and tell this process to stop as soon as it is ready."""

    def stop() -> None:
        while not (tmp_path / "log").exists() or "ready" not in (tmp_path / "log").read_text():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop, daemon=True).start()
    with places(1) as here:
        return run_ranks(["-c", script], here, lambda _: tmp_path / "log", **options)


def test_a_signal_is_passed_on_and_the_ranks_may_save(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    assert terminated_when_ready(tmp_path, SAVE_AND_STOP) == ExitStatus(75, signalled=True)
    assert signal.getsignal(signal.SIGTERM) is before


def test_ranks_that_do_not_stop_in_time_are_killed(tmp_path):
    assert terminated_when_ready(tmp_path, IGNORE, save_seconds=0.3) == ExitStatus(-signal.SIGKILL, signalled=True)
