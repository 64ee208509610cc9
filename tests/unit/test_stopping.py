"""Signals and deadlines become one stop request, which all ranks see in the same step."""

import signal
import subprocess
import sys
import time

import pytest

from tests.command import environment
from trainer import stopping

LISTENING = "import ctypes, os, signal, sys, threading, time; from trainer import stopping; stopping.listen(); "
HANG = (
    "c, m = ctypes.CDLL(None), bytes(64); c.pthread_mutex_lock(m); print('ready', flush=True); c.pthread_mutex_lock(m)"
)
"""A call into C that never returns, as a collective that waits for another rank; other threads may run meanwhile."""


def listening(code: str) -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, "-c", LISTENING + code],
        env=environment(),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout.readline() == "ready\n"
    return process


def test_a_second_signal_ends_a_process_that_hangs_in_a_call():
    process = listening(f"stopping.SAME_REQUEST = 0.2; {HANG}")
    process.send_signal(signal.SIGUSR2)
    time.sleep(0.4)
    assert process.poll() is None
    process.send_signal(signal.SIGUSR2)
    assert process.wait(timeout=10) == 128 + signal.SIGUSR2
    said = process.stderr.read()
    assert "SIGUSR2: stopping after the step under way, then saving; a second signal ends at once" in said
    assert "second signal (SIGUSR2): ending at once, without saving" in said


def test_a_signal_that_a_launcher_passes_on_as_well_is_the_same_request():
    process = listening(
        "print('ready', flush=True)\nwhile not stopping.stop_request(): time.sleep(0.01)\ntime.sleep(0.5)"
    )
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGTERM):
        process.send_signal(number)
    assert process.wait(timeout=10) == 0
    assert process.stderr.read().count("onecurve:") == 1


def test_a_process_that_was_forked_dies_of_signals_as_usual():
    code = (
        "print('ready', flush=True)\nchild = os.fork()\nif not child: time.sleep(60)\n"
        "time.sleep(0.2); os.kill(child, signal.SIGTERM); print(os.waitpid(child, 0)[1])"
    )
    assert listening(code).communicate(timeout=20)[0].strip() == str(int(signal.SIGTERM))


def test_nothing_of_torch_is_imported_before_the_handlers_exist():
    code = "import sys; from trainer import cli, stopping; stopping.listen(); print([m for m in sys.modules if 'torch' in m])"
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize(("verb", "listens"), [("train", True), ("verify", False)])
def test_only_a_run_takes_signals_as_requests(verb, listens):
    code = (
        f"import runpy, signal, sys; sys.argv = ['trainer', {verb!r}, '--help']\n"
        "try: runpy.run_module('trainer', run_name='__main__')\n"
        "except SystemExit: pass\n"
        "print(signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL)"
    )
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == str(listens)


@pytest.mark.parametrize("name", stopping.DEADLINES)
def test_a_rank_asks_to_stop_when_fewer_seconds_are_left_than_a_save_is_given(name):
    stopping.StopConsensus(before_deadline=60)
    try:
        assert stopping.stop_request({name: str(time.time() + 30)}) == stopping.TIME_LIMIT
        assert stopping.stop_request({name: str(time.time() + 90)}) == 0
        assert stopping.stop_request({name: "UNLIMITED"}) == 0
        assert stopping.stop_request({}) == 0
        stopping.StopConsensus(before_deadline=0)
        assert stopping.stop_request({name: str(time.time() + 30)}) == 0
    finally:
        stopping.StopConsensus(before_deadline=0)


def test_the_first_wish_that_is_heard_counts():
    stop = stopping.StopConsensus(before_deadline=0)
    stop.update(0.0)
    assert not stop.reached
    stop.update(float(signal.SIGUSR1))
    stop.update(float(stopping.TIME_LIMIT))
    assert (stop.reached, stop.reason) == (True, "SIGUSR1")
