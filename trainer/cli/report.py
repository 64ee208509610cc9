"""Write report.html.

    onecurve report runs/sft                 into the run's folder
    onecurve report runs/sft runs/dpo        one that compares them, into the folder that they share
    onecurve report runs/sweeps              the same for all runs inside, one for each sweep
    onecurve report runs/tinyworld           a recipe's folder, which has a lifecycle.json

One file that needs neither network nor server.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from trainer.cli.parsing import parser_of
from trainer.report import FILE, runs_in, write, write_comparison
from trainer.report.lifecycle import RECORD


def main(arguments: Sequence[str]) -> int:
    """Write what the command line names."""
    parser = parser_of("report", __doc__)
    parser.add_argument("folders", type=Path, nargs="+", metavar="RUN", help="folders of runs")
    parser.add_argument(
        "--out", type=Path, help="where to write a comparison; default: in the folder that the runs share"
    )
    a = parser.parse_args(arguments)
    if len(a.folders) == 1 and (a.folders[0] / RECORD).is_file():
        print(write(a.folders[0]))
        return 0
    runs = [run for folder in a.folders for run in runs_in(folder)]
    if missing := [str(folder) for folder in a.folders if not any(runs_in(folder))]:
        parser.error(f"{', '.join(missing)}: no run is there (a run has a config.yaml and a metrics.jsonl)")
    if len(runs) == 1 and a.out is None:
        print(write(runs[0]))
        return 0
    sweeps = {run.parent for run in runs if (run.parent / "points").is_dir()}
    if len(sweeps) > 1 and a.out is None and all(run.parent in sweeps for run in runs):
        for sweep in sorted(sweeps):  # points of different sweeps are not compared
            print(write_comparison(sweep / FILE, [run for run in runs if run.parent == sweep]))
        return 0
    shared = Path(os.path.commonpath([run.resolve() for run in runs]))
    # A lifecycle's folder has a report of its own.
    name = "comparison.html" if (shared / RECORD).is_file() or shared in [r.resolve() for r in runs] else FILE
    print(write_comparison(a.out or shared / name, runs))
    return 0
