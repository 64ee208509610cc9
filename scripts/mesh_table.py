"""Print the table of docs/scale.md: what `onecurve estimate --plan` proposes for models of 1B to 405B on 8 to 1,024 H100s.

python -m scripts.mesh_table
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

from trainer.cli.estimate import compose_without_data
from trainer.cli.plan import Wish, layouts_of, recompute_of
from trainer.config import ConfigError
from trainer.diagnostics.links import Links
from trainer.diagnostics.mesh_plan import Cluster, best_of, choices, utilisation
from trainer.tracking.throughput import PEAKS

MODELS = {
    "1b": (128256, 1024, 4096), "7b": (32000, 1024, 4096), "13b": (32000, 1024, 4096), "32b": (100352, 1024, 4096),
    "70b": (32000, 1024, 4096), "405b": (128256, 2048, 8192),
}  # fmt: skip
"""Vocabulary, rows of a step and tokens of a row: 4 million tokens a step, 16 million as Llama 3 405B had."""
NODES = (1, 8, 32, 128)
HEAD = """\
| model | GPUs | add to the command line | memory | step | MFU |
| --- | ---: | --- | ---: | ---: | ---: |"""


def cluster_of(nodes: int) -> Cluster:
    """So many nodes of eight H100s, with their vendor's links."""
    return Cluster(nodes, "H100", 1e12 * PEAKS["H100"][0], 0.45, 80e9, Links.of_device("H100", 8))


def overrides_of(model: str) -> list[str]:
    """The run that the table is about."""
    vocabulary, size, length = MODELS[model]
    batch = [f"batch.size={size}", f"batch.length={length}"]
    return ["experiment=7b", f"model={model}", f"model.vocab_size={vocabulary}", *batch]


def row(model: str, nodes: int) -> str:
    """The line of a model on so many nodes."""
    cluster = cluster_of(nodes)
    wish = Wish.of([f"nodes={nodes}", "gpus_per_node=8", *overrides_of(model)])
    cfg = compose_without_data(wish.overrides)
    shape = cfg.model.architecture(cfg.model.vocab_size)
    fitting, larger = choices(shape, layouts_of(cfg, shape, cluster, wish, {}), cluster, recompute_of(cfg, wish))
    if not fitting:
        least = min(choice.memory for choice in larger)
        return f"| {model} | {cluster.ranks:,} | nothing fits | {least / 1e9:,.0f} GB at least | | |"
    best = best_of(fitting)
    figures = f"{best.memory / 1e9:.0f} GB | {best.time.total:.2f} s | {utilisation(shape, best, cluster):.0%}"
    return f"| {model} | {cluster.ranks:,} | `{best.overrides}` | {figures} |"


def lines() -> Iterator[str]:
    """The table."""
    yield HEAD
    for model in MODELS:
        for nodes in NODES:
            yield row(model, nodes)
            print(model, nodes, file=sys.stderr)


if __name__ == "__main__":
    try:
        print("\n".join(lines()))
    except ConfigError as error:
        sys.exit(str(error))
