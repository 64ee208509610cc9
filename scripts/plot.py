"""Draw the loss curves of runs.

    python scripts/plot.py OUT.svg RUN [RUN ...]

The training loss, the evaluations and, where the data's entropy is known, the floor that no model gets below.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib as mpl

mpl.use("agg")
import matplotlib.pyplot as plt
import yaml


def draw(out: Path, runs: list[Path]) -> None:
    """Write ``out`` (PNG or SVG, by its ending)."""
    figure, axes = plt.subplots(figsize=(8, 4.5), constrained_layout=True)
    floors = set()
    for number, run in enumerate(runs):
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        color = f"C{number}"
        trained = [(line["step"], line["loss"]) for line in lines if "loss" in line]
        measured = [(line["step"], line["eval/loss"]) for line in lines if "eval/loss" in line]
        axes.plot(*zip(*trained, strict=True), color=color, alpha=0.35, linewidth=0.8, label=f"{run.name}: training")
        if measured:
            last = measured[-1][1]
            label = f"{run.name}: held out, {last:.4f}"
            axes.plot(*zip(*measured, strict=True), "o-", color=color, markersize=3.5, linewidth=1.4, label=label)
        floor = yaml.safe_load((run / "config.yaml").read_text())["facts"].get("floors", {}).get("eval/loss")
        if floor is not None:
            floors.add(floor)
    for floor in floors:
        axes.axhline(floor, color="black", linestyle="--", linewidth=1)
        axes.annotate(
            f"entropy of the language: {floor:.4f}", (0.99, floor), xycoords=("axes fraction", "data"),
            xytext=(0, -4), textcoords="offset points", ha="right", va="top", fontsize=9,
        )  # fmt: skip
    low, high = axes.get_ylim()
    if floors:
        axes.set_ylim(min(low, 0.75 * min(floors)), min(high, 2.2 * min(floors)))
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss, nats per token")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9)
    figure.savefig(out, dpi=150)
    plt.close(figure)


def main() -> None:
    """Draw what the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="a .png or .svg file")
    parser.add_argument("runs", type=Path, nargs="+", help="run folders")
    a = parser.parse_args()
    draw(a.out, a.runs)


if __name__ == "__main__":
    main()
