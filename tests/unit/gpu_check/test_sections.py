"""`onecurve check-gpu`: its sections run, reduced, on a CPU; one that fails, hangs or dies stops no other."""

import json
import os
import subprocess
import sys
import time

import pytest
import torch

from tests.command import environment, onecurve
from trainer.gpu_check import sections
from trainer.gpu_check.bench import Bench


@pytest.mark.slow
def test_every_section_runs_reduced_on_a_cpu(tmp_path):
    command = [sys.executable, "-m", "trainer", "check-gpu", "--folder", "check", "--out", "lines.jsonl"]
    done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=550)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [json.loads(line) for line in (tmp_path / "lines.jsonl").read_text().splitlines()]
    assert [line["section"] for line in lines] == list(sections.SECTIONS)
    assert all(line["figures"] for line in lines)


def fails(bench):
    bench.note("before", 12.3456)
    bench.at_most("error", float("nan"), 1)
    bench.attempt("part", lambda: 1 / 0)
    raise RuntimeError("a kernel is missing")


def test_a_section_that_fails_hangs_or_dies_stops_no_other(tmp_path, monkeypatch):
    changed = {
        "fails": fails,
        "dies": lambda bench: os._exit(11),
        "fine": lambda bench: bench.note("figure", 2),
        "hangs": lambda bench: time.sleep(600),
        "late": lambda bench: bench.note("figure", 3),
    }
    monkeypatch.setattr(sections, "SECTIONS", changed)
    failed, died, fine, hung, late = sections.run_sections(list(changed), tmp_path / "check", 4)
    assert (failed.status, failed.figures) == ("failed", {"before": 12.35, "error": "nan"})
    assert failed.problems[0] == "error is nan, above 1"
    assert failed.problems[1] == "part: ZeroDivisionError: division by zero"
    assert failed.problems[2].startswith("RuntimeError: a kernel is missing; see ")
    assert died.problems[0].startswith("its process ended with exit code 11; see ")
    assert (fine.status, fine.figures, fine.problems) == ("ok", {"figure": 2.0}, [])
    assert (hung.status, "it was not done after" in hung.problems[0]) == ("failed", True)
    assert (late.status, late.problems) == ("skipped", ["the time was up; give more --minutes, or name sections"])


def test_a_section_that_is_unknown_is_refused(tmp_path):
    code, _, errors = onecurve(tmp_path, "check-gpu", "varlin")
    assert (code, "varlin is not a section; use device, varlen" in errors) == (2, True)


def test_wrong_attention_is_a_problem(tmp_path, monkeypatch):
    bench = Bench(torch.device("cpu"), True, tmp_path)
    sections.SECTIONS["varlen"](bench)
    assert bench.problems == []
    assert 0 < bench.figures["output_error"] < 0.01
    right = sections.kernels.attend
    monkeypatch.setattr(sections.kernels, "attend", lambda q, *a, **kw: right(1.02 * q, *a, **kw))
    sections.SECTIONS["varlen"](bench)
    assert len(bench.problems) == 2


def test_the_process_that_starts_sections_asks_for_no_device():
    """One that has asked cannot be forked: its children could use no GPU."""
    show = (
        "import torch\n"
        "def asked(*a): raise SystemExit('asked for a device')\n"
        "torch.cuda.is_available = torch.cuda.device_count = torch.cuda._lazy_init = asked\n"
        "import trainer.cli.check_gpu"
    )
    done = subprocess.run([sys.executable, "-c", show], env=environment(), capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
