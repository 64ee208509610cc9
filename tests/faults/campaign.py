"""Random faults against a run on two or four ranks, and what became of it.

    python -m tests.faults.campaign FOLDER --faults 26 --seed 1 --strategies ddp zero3 fsdp-tensor

For every strategy an undisturbed run is made first. Then another one is struck by fault after fault and started again, until
all have struck and it finishes. After each: the run continues from the newest checkpoint that is whole, nothing is lost but
the steps since then, every number that is logged is the undisturbed run's, bit for bit, and no process stays longer than the
watchdog allows. At the end the export, the weights and the optimizer's state are those of the undisturbed run, byte for byte.

A line a fault goes to FOLDER/faults.jsonl; --report FILE ... makes a table of several of them. The ranks are forked from this
process, which has imported everything: a start then costs no imports, and nothing of a run exists before it.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import sys
import time
from collections import Counter
from pathlib import Path

os.environ.update(OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu", WANDB_MODE="disabled")

from tests.command import TINY
from tests.faults.attempts import Attempts, nodes, small_disk
from tests.faults.kinds import LOCAL, Fault, Injector, planned
from trainer.checkpoint.folder import folder_name, read_manifest
from trainer.parallel.watchdog import EXIT_CODE

STRATEGIES = {
    "ddp": (2, ["strategy=ddp"]), "zero1": (2, ["strategy=zero1"]), "zero2": (2, ["strategy=zero2"]),
    "zero3": (2, ["strategy=zero3"]), "fsdp": (2, ["strategy=fsdp"]),
    "fsdp-tensor": (4, ["strategy=fsdp", "strategy.tensor=2"]),
    "fsdp-pipeline": (2, ["strategy=fsdp", "strategy.pipeline=2", "batch.micro=2"]),
}  # fmt: skip
"""Ranks and settings of what runs are tried on."""
EVERY = 5
"""Steps between checkpoints."""
STEPS = 100
"""Steps of a run for each fault: on a fast machine one that only pauses the ranks must not see its end. Whatever is left when
all have struck is run undisturbed."""
SLACK = 20.0
"""Seconds beyond the watchdog's limit in which a process must be gone: its stacks are written, on a machine that is busy."""
SAME = ("step", "loss", "grad_norm", "tokens", "lr", "skipped")
"""What of a logged step does not depend on the clock."""


def main() -> None:
    """Carry out what the command line says; exit code 1 where a check fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", help="of everything that the campaign leaves behind")
    parser.add_argument("--faults", type=int, default=25, help="for each strategy")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--strategies", nargs="+", default=STRATEGIES, choices=STRATEGIES)
    parser.add_argument("--kinds", nargs="+", help="of faults; all that are possible here, unless given")
    parser.add_argument("--watchdog", type=float, default=20.0, help="watchdog.seconds of the runs")
    parser.add_argument(
        "--minutes", type=float, default=1e6, help="after which no further fault strikes a run; it then finishes"
    )
    parser.add_argument("--report", type=Path, nargs="+", help="faults.jsonl of earlier campaigns, for their table")
    a = parser.parse_args()
    if a.report:
        print(report([json.loads(line) for file in a.report for line in file.read_text().splitlines()]))
        return
    import deepspeed  # noqa: F401 - imported once for all ranks, as is everything below

    import trainer.cli.train  # noqa: F401

    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup the ranks would rightly ignore it
    for strategy in a.strategies:
        campaign = Campaign(a.folder.resolve() / strategy, strategy, a.seed, a.faults, a.watchdog, a.kinds)
        campaign.carry_out(a.folder / "faults.jsonl", a.minutes)


class Campaign:
    """One strategy's undisturbed run, and the one that faults strike."""

    def __init__(
        self, folder: Path, strategy: str, seed: int, faults: int, watchdog: float, kinds: list[str] | None = None
    ) -> None:
        self.folder, self.strategy, self.seed, self.faults, self.wanted = folder, strategy, seed, faults, kinds
        self.ranks, settings = STRATEGIES[strategy]
        self.limit = watchdog + SLACK
        self.cache = folder / "cache"
        self.arguments = [
            *TINY, *settings, f"steps={STEPS * faults + 2 * EVERY}", f"checkpoint.every={EVERY}",
            "checkpoint.keep=2", "optimizer.lr=0.003", f"data.cache={self.cache}", f"watchdog.seconds={watchdog}",
            "evaluation.every=0",
        ]  # fmt: skip

    def carry_out(self, results: Path, minutes: float) -> None:
        """Strike, check and write a line a fault to ``results``."""
        with nodes() as two, small_disk(self.folder / "disk", 48) as own_disk:
            whole = Attempts(
                self.folder / "undisturbed", self.folder / "logs-undisturbed", self.arguments, two, self.ranks
            )
            whole.start()
            whole.wait_end(900)
            assert [rank.code for rank in whole.ranks] == [0] * self.ranks, whole.said()
            self.expected = logged(whole.run_dir)
            run = Attempts(self.folder / "disk" / "run", self.folder / "logs", self.arguments, two, self.ranks)
            injector = Injector(run, self.cache, self.limit, own_disk)
            possible = [
                kind for kind, why in injector.kinds().items() if why is None and kind in (self.wanted or [kind])
            ]
            for kind, why in injector.kinds().items():
                if why:
                    print(f"{kind}: skipped, {why}", flush=True)
            try:
                end = time.monotonic() + 60 * minutes
                for number, fault in enumerate(
                    planned(f"{self.seed} {self.strategy}", self.faults, possible, self.ranks)
                ):
                    if time.monotonic() > end:
                        print(f"{self.strategy}: {minutes:g} minutes are over after {number} faults", flush=True)
                        break
                    found = {"number": number, "strategy": self.strategy, "seed": self.seed, **vars(fault)}
                    print(
                        f"{self.strategy} {number + 1}/{self.faults}: {fault.kind} ({fault.moment}): ",
                        end="",
                        flush=True,
                    )
                    found |= self.one(run, injector, fault)
                    print(said(found), flush=True)
                    with results.open("a") as file:
                        file.write(json.dumps(found) + "\n")
                run.wait_end(900)
            finally:
                run.kill()
            assert [rank.code for rank in run.ranks] == [0] * self.ranks, run.said()
            self.check(run)
            same_files(whole.run_dir, run.run_dir)

    def one(self, run: Attempts, injector: Injector, fault: Fault) -> dict[str, object]:
        """Wait for the moment, strike, start again where the run has ended, and wait until it has made up for it."""
        if not run.running:
            run.start()
        if fault.moment == "start":
            run.kill()
            run.start()
            time.sleep(4 * fault.delay)
        else:
            wanted = run.resumed + fault.after
            run.wait_for(lambda: run.step() >= wanted, 120, f"step {wanted}")
            if fault.moment == "save":
                run.wait_for(run.saving, 120, "a checkpoint was being written")
            time.sleep(0.05 * fault.delay)
        struck = time.monotonic()
        detection = injector.strike(fault)
        ended = not run.running
        assert ended or fault.kind in ("pause", "network pause"), run.said()
        reached, codes = run.step(), [rank.code for rank in run.ranks]
        if fault.kind == "stop":
            assert EXIT_CODE in codes, run.said()
            assert "(watchdog.seconds); stacks of all threads follow" in run.said(10**6), run.said()
        if ended:
            # Half of the attempts write their checkpoints in the background.
            run.start(f"checkpoint.asynchronous={str(fault.draw < 0.5).lower()}")
        run.wait_for(lambda: run.step() > reached and (not ended or run.continued_after() is not None or not run.resumed),
                     180, f"step {reached + 1}")  # fmt: skip
        seconds = time.monotonic() - struck
        self.check(run)
        lost = 0
        if ended:
            assert (run.continued_after() or 0) == run.resumed, run.said()
            lost = reached - run.resumed
            if fault.kind == "damaged checkpoint":
                assert "is damaged and is passed over" in run.said(10**6), run.said()
            if fault.kind == "truncated cache":
                assert "prepared data is damaged and is prepared again" in run.said(10**6), run.said()
            for aside in (run.run_dir / "checkpoints").glob("*.damaged-*"):
                for file in aside.iterdir():
                    file.unlink()
                aside.rmdir()
        # Two intervals where the newest checkpoint was damaged or was still being written.
        assert lost <= 2 * EVERY, f"{lost} steps are lost"
        return {
            "reached": reached,
            "lost": lost,
            "ended": ended,
            "codes": codes,
            "detection": detection,
            "seconds": seconds,
        }

    def check(self, run: Attempts) -> None:
        """Everything that is logged is what the undisturbed run has logged."""
        for step, values in logged(run.run_dir).items():
            assert values == self.expected[step], f"step {step}: {values} instead of {self.expected[step]}"


def logged(run_dir: Path) -> dict[int, dict[str, float]]:
    """What does not depend on the clock, by step."""
    lines = [
        json.loads(line)
        for line in (run_dir / "metrics.jsonl").read_text().splitlines(keepends=True)
        if line.endswith("\n")
    ]
    return {line["step"]: {name: line[name] for name in SAME} for line in lines if "loss" in line}


def same_files(one: Path, other: Path) -> None:
    """Export, last checkpoint and its files are equal, byte for byte."""
    assert (one / "export/model.safetensors").read_bytes() == (other / "export/model.safetensors").read_bytes()
    name = (one / "checkpoints/latest").read_text().strip()
    manifests = [read_manifest(run / "checkpoints" / name) for run in (one, other)]
    assert manifests[0].files == manifests[1].files
    assert folder_name(manifests[0].step) == name


def said(found: dict[str, object]) -> str:
    """A fault and its consequences in a line."""
    gone = f"gone after {found['detection']:.1f} s with {found['codes']}, " if found["ended"] else "went on, "
    return f"{gone}{found['lost']} steps lost, made up for after {found['seconds']:.1f} s"


def report(rows: list[dict[str, object]]) -> str:
    """A table by kind of fault."""
    kinds = [k for k in (*LOCAL, "network pause", "network cut") if any(r["kind"] == k for r in rows)]
    lines = [
        "| fault | injected | recovered | lost steps | seconds until all ranks were gone | seconds until made up for |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for kind in [*kinds, "all"]:
        mine = [r for r in rows if kind in ("all", r["kind"])]
        lost, gone, seconds = ([float(r[key]) for r in mine] for key in ("lost", "detection", "seconds"))  # type: ignore[arg-type]
        spread = [f"{statistics.median(v):.{n}f} ({max(v):.{n}f})" for v, n in ((lost, 0), (gone, 1), (seconds, 1))]
        lines.append(f"| {kind} | {len(mine)} | {len(mine)} | {spread[0]} | {spread[1]} | {spread[2]} |")
    by = ", ".join(f"{name} {count}" for name, count in sorted(Counter(str(r["strategy"]) for r in rows).items()))
    return "\n".join([*lines, "", by])


if __name__ == "__main__":
    try:
        main()
    except AssertionError as failure:
        print(f"FAILED: {failure}", file=sys.stderr)
        sys.exit(1)
