"""Memory and time of a run on other machines than this one, before it is started.

    python scripts/estimate.py --ranks 8 --device H100 --gb 80 experiment=1b strategy=zero2 batch.micro=8

takes the overrides of the run (paths of data and tokenizer may be left out). Memory is a rank's peak; where it does not fit,
the nearest configuration that does is named. Time is what the operations need at --utilisation of the device's peak.

    python scripts/estimate.py --plan experiment=7b

is a table for all strategies on 8 to 4,096 GPUs: what is exchanged, how long a step, a checkpoint and a start take
(docs/traffic.md has the formulas). Speeds of links and storage are options, in GB/s.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile


def main() -> None:
    """Print the estimate of what the command line describes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=1, help="data-parallel ranks")
    parser.add_argument("--device", default="H100", help="a device of trainer/tracking/throughput.py's table, or cpu")
    parser.add_argument("--gb", type=float, default=80.0, help="memory of a device, GB")
    parser.add_argument("--utilisation", type=float, default=0.4, help="part of the peak that is reached")
    parser.add_argument("--vocab", type=int, default=32000, help="tokens, where the model leaves them to the tokenizer")
    parser.add_argument("--plan", action="store_true", help="a table over strategies and numbers of GPUs instead")
    parser.add_argument("--gpus", type=int, nargs="+", default=[8, 64, 512, 4096], help="of the plan")
    parser.add_argument("--per-node", type=int, default=8, help="GPUs of a node")
    parser.add_argument("--within", type=float, default=450, help="GB/s of a GPU to others of its node, one direction")
    parser.add_argument("--between", type=float, default=50, help="GB/s of a GPU to other nodes, one direction")
    parser.add_argument("--storage", type=float, default=100, help="GB/s of the storage that all nodes share")
    parser.add_argument("--node-storage", type=float, default=10, help="GB/s of a node to the storage")
    a, overrides = parser.parse_known_args()
    os.environ.update(RANK="0", WORLD_SIZE=str(a.ranks), MASTER_ADDR="localhost", MASTER_PORT="1")

    from trainer.cli import refusal
    from trainer.config import ConfigError
    from trainer.diagnostics import memory as estimate
    from trainer.tracking.throughput import PEAKS

    try:
        cfg = compose_without_data(overrides)
    except ConfigError as error:
        print(refusal(error), file=sys.stderr)
        sys.exit(2)
    cuda = a.device != "cpu"
    shape = cfg.model.architecture(cfg.model.vocab_size or (a.vocab if cfg.model.path is None else 1))
    layout = cfg.layout(shape, a.ranks, cuda=cuda)
    if a.plan:
        print_plan(a, cfg, shape, layout)
        return
    found = estimate.memory(shape, layout)
    print(f"{estimate.parameters_of(shape):,} parameters; a rank of {a.ranks} under strategy={cfg.strategy.name}:")
    print("\n".join(found.lines()))
    if found.total > a.gb * 1e9:
        print(f"does not fit {a.gb:g} GB: {estimate.advice(shape, layout, a.gb * 1e9)}")
    if a.device in PEAKS:
        peak = 1e12 * PEAKS[a.device][0 if cfg.precision.dtype.itemsize == 2 else 1]
        tokens = cfg.batch.size * cfg.batch.length
        seconds = estimate.seconds_per_step(shape, layout, tokens, peak, a.utilisation)
        print(f"{seconds:.2f} s a step of {tokens:,} tokens on {a.device} at {a.utilisation:.0%} of its peak", end="")
        print(f"; {cfg.steps:,} steps: {cfg.steps * seconds / 3600:.1f} h" if cfg.steps else "")


def print_plan(a, cfg, shape, layout):  # type: ignore[no-untyped-def]
    """The table of all strategies that the optimizer can be used with, on all numbers of GPUs."""
    from trainer.diagnostics import scaling
    from trainer.diagnostics.memory import parameters_of
    from trainer.parallel.precision import Compute
    from trainer.tracking.throughput import PEAKS

    if a.device not in PEAKS:
        sys.exit(f"--plan is about GPUs, and --device {a.device} is none of {', '.join(PEAKS)}")
    cluster = scaling.Cluster(a.per_node, a.within * 1e9, a.between * 1e9, a.storage * 1e9, a.node_storage * 1e9)
    stages = [0] if type(cfg.optimizer).__name__ == "Muon" else [0, 1, 2, 3]
    low = cfg.precision.compute is Compute.bf16 and not getattr(cfg.strategy, "autocast", None)
    peak = 1e12 * PEAKS[a.device][0 if cfg.precision.dtype.itemsize == 2 else 1]
    # Norms, projections and biases of a block; what has a name of its own is a fragment of its own.
    tensors = shape.num_hidden_layers * 9 + 3
    found = scaling.plan(
        shape, layout, low, stages, a.gpus, cfg.batch.size, peak, a.utilisation, cluster, tensors
    )  # fmt: skip
    print(
        f"{parameters_of(shape):,} parameters, batch.micro={layout.micro}, batch.length={layout.length}, "
        f"{a.device} at {a.utilisation:.0%} of its peak; links {a.within:g} GB/s within and {a.between:g} GB/s between nodes "
        f"of {a.per_node}, storage {a.storage:g} GB/s\n"
    )
    print("\n".join(scaling.table(found, a.gb * 1e9)))


def compose_without_data(overrides):  # type: ignore[no-untyped-def]
    """The configuration, with any text in the place of data that is not named: it does not decide memory."""
    from trainer.compose import compose
    from trainer.config import ConfigError

    try:
        return compose(overrides, name="estimate")
    except ConfigError as error:
        if not all(problem.startswith("data.") for problem in error.problems):
            raise
    with tempfile.NamedTemporaryFile(suffix=".txt") as any_text:
        return compose([*overrides, f"data.train=[{any_text.name}]", "data.eval=[]"], name="estimate")


if __name__ == "__main__":
    main()
