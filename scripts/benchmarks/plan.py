"""A table for all strategies on 8 to 4,096 GPUs: what is exchanged, how long a step, a checkpoint and a start take.

    python scripts/benchmarks/plan.py experiment=7b

Takes the overrides of a run; docs/traffic.md has the formulas. Speeds of links and storage are options, in GB/s.
"""

from __future__ import annotations

import argparse
import dataclasses

import scaling

from trainer.cli.estimate import compose_without_data
from trainer.diagnostics.links import Links
from trainer.models.sizes import parameters_of
from trainer.parallel.ddp import DDP
from trainer.parallel.fsdp import FSDP
from trainer.parallel.zero import Zero1, Zero2, Zero3
from trainer.tracking.throughput import PEAKS


def main() -> None:
    """Print the table of all strategies that the optimizer can be used with, on all numbers of GPUs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="setting=value", help="of the run")
    parser.add_argument("--device", default="H100", choices=list(PEAKS), help="what the ranks run on")
    parser.add_argument("--gb", type=float, default=80.0, help="memory of a device, GB")
    parser.add_argument("--utilisation", type=float, default=0.4, help="part of the peak that is reached")
    parser.add_argument("--vocab", type=int, default=32000, help="tokens, where the model leaves them to the tokenizer")
    parser.add_argument("--gpus", type=int, nargs="+", default=[8, 64, 512, 4096], help="numbers of GPUs")
    parser.add_argument("--per-node", type=int, default=8, help="GPUs of a node")
    parser.add_argument("--within", type=float, default=450, help="GB/s of a GPU to others of its node, one direction")
    parser.add_argument("--between", type=float, default=50, help="GB/s of a GPU to other nodes, one direction")
    parser.add_argument("--storage", type=float, default=100, help="GB/s of the storage that all nodes share")
    parser.add_argument("--node-storage", type=float, default=10, help="GB/s of a node to the storage")
    a = parser.parse_intermixed_args()
    cfg = compose_without_data(a.overrides)
    shape = cfg.model.architecture(cfg.model.vocab_size or (a.vocab if cfg.model.path is None else 1))
    layouts = {
        strategy.name: dataclasses.replace(cfg, strategy=strategy).layout(shape, 1, cuda=True, limit=a.gb * 1e9)
        for strategy in (DDP(), Zero1(), Zero2(), Zero3(), FSDP())
        if not list(strategy.validate_optimizer(cfg.optimizer))
    }
    links = Links(a.per_node, a.within * 1e9, a.between * 1e9)
    cluster = scaling.Cluster(links, a.storage * 1e9, a.node_storage * 1e9)
    peak = 1e12 * PEAKS[a.device][0 if cfg.precision.dtype.itemsize == 2 else 1]
    # Norms, projections and biases of a block; what has a name of its own is a fragment of its own.
    tensors = shape.num_hidden_layers * 9 + 3
    plans = scaling.plan(shape, layouts, a.gpus, cfg.batch.size, peak, a.utilisation, cluster, tensors)
    print(
        f"{parameters_of(shape):,} parameters, batch.micro={cfg.batch.micro}, batch.length={cfg.batch.length}, "
        f"{a.device} at {a.utilisation:.0%} of its peak; links {a.within:g} GB/s within and {a.between:g} GB/s between nodes "
        f"of {a.per_node}, storage {a.storage:g} GB/s\n"
    )
    print("\n".join(scaling.table(plans, a.gb * 1e9)))


if __name__ == "__main__":
    main()
