"""What `make demo` runs: pretraining on tiny world, from nothing to an exported model and a picture, in minutes."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import yaml

ROOT = Path(__file__).resolve().parent.parent
RUN = Path("runs/demo")


def main() -> int:
    """Train, measure, draw; 0 if the loss came within 3% of the entropy of the language."""
    started = time.monotonic()
    # Two processes of one thread each share the machine's cores better than one process of two threads.
    ranks = max(1, min(2, os.cpu_count() or 1))
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(ranks),
        "-m",
        "trainer",
    ]
    overrides = ["experiment=tinyworld", f"run_dir={RUN}", "name=demo", *sys.argv[1:]]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    print("$ torchrun", *command[3:], *overrides, flush=True)
    done = subprocess.run([*command, *overrides], env=environment)
    if done.returncode:
        return done.returncode
    picture = RUN / "loss.png"
    plot().draw(picture, [RUN])
    facts = yaml.safe_load((RUN / "config.yaml").read_text())["facts"]
    lines = [json.loads(line) for line in (RUN / "metrics.jsonl").read_text().splitlines()]
    loss, floor = (
        next(line["eval/loss"] for line in reversed(lines) if "eval/loss" in line),
        facts["floors"]["eval/loss"],
    )
    above = f"{100 * (loss / floor - 1):.1f}%"
    print(
        f"\nheld-out loss {loss:.4f} nats a token, {above} above the entropy of the language, {floor:.4f}\n"
        f"picture  {picture}\nmodel    {RUN / 'export'}  (a Hugging Face folder)\ntime     {time.monotonic() - started:.0f} s"
    )
    return 0 if loss < 1.03 * floor else 1


def plot() -> ModuleType:
    """scripts/plot.py, which is no package."""
    spec = importlib.util.spec_from_file_location("plot", ROOT / "scripts" / "plot.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    raise SystemExit(main())
