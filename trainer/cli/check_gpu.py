"""Check that this framework is right and fast on this machine's GPU: in nine minutes, a line a section.

    onecurve check-gpu
    onecurve check-gpu varlen strategies --out check.jsonl

Compares attention, models, pipelines, strategies, generation and compilation with what they must give; counts where the host
waits; measures tokens a second, the part of the peak and memory. A section that fails does not stop the next; without a GPU
everything is small and runs on the CPU. Exit code 0: all sections are fine; 1: one failed, or the time was up.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

from trainer.cli.parsing import parser_of
from trainer.disk import writing
from trainer.gpu_check.sections import SECTIONS, run_sections


def main(arguments: Sequence[str]) -> int:
    """Run the sections; for each print a line for people and one for programs."""
    parser = parser_of("check-gpu", __doc__)
    parser.add_argument("sections", nargs="*", metavar="section", help=f"of {', '.join(SECTIONS)}; default: all")
    parser.add_argument("--minutes", type=float, default=9.0, help="after which no section begins or goes on")
    parser.add_argument("--out", type=Path, help="a file for the JSON lines, too")
    parser.add_argument(
        "--folder", type=Path, help="a new folder for what the sections write; default: a temporary one"
    )
    a = parser.parse_args(arguments)
    if unknown := [name for name in a.sections if name not in SECTIONS]:
        parser.error(f"{', '.join(unknown)} is not a section; use {', '.join(SECTIONS)}")
    os.environ.setdefault("WANDB_MODE", "disabled")
    failed = 0
    temporary = tempfile.TemporaryDirectory() if a.folder is None else nullcontext(a.folder)
    with temporary as folder:
        for outcome in run_sections(a.sections or list(SECTIONS), Path(folder).absolute(), 60 * a.minutes):
            print(f"{outcome.line()}\n{outcome.json()}", flush=True)
            failed += outcome.status != "ok"
            if a.out is not None:
                with writing(a.out), a.out.open("a") as file:
                    file.write(f"{outcome.json()}\n")
    return 1 if failed else 0
