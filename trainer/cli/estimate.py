"""Memory and time of a run on other machines than this one, before it is started.

    onecurve estimate --ranks 8 --device H100 --gb 80 experiment=1b strategy=zero2 batch.micro=8
    onecurve estimate --ranks 8 experiment=sft_7b model.path=DIR
    onecurve estimate --plan nodes=16 gpus_per_node=8 experiment=7b model=70b

Takes the overrides of the run (paths of data and tokenizer may be left out). Memory is a rank's peak; where it does not fit,
the nearest configuration that does is named. Time is what the operations need at --utilisation of the device's peak, and what
exchanges add that they do not hide.

--plan tries every mesh of nodes x gpus_per_node devices, and proposes the fastest that fits, with the overrides to paste.
Settings of the strategy, batch.micro and model.activation_checkpointing that are named stay as they are. Speeds of links are
the vendors'; give measured ones (onecurve preflight) as --within and --between, with --reached 1.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
from collections.abc import Iterator, Sequence

from trainer.cli.parsing import add_run_arguments, parser_of
from trainer.cli.plan import Wish, plan
from trainer.compose import compose
from trainer.config import ConfigError
from trainer.diagnostics.advice import advice
from trainer.diagnostics.links import Links
from trainer.diagnostics.memory import host_memory, memory
from trainer.diagnostics.mesh_plan import Choice, Cluster, account
from trainer.diagnostics.step_time import seconds_per_step, step_time
from trainer.models.architecture import Architecture
from trainer.models.sizes import parameters_of
from trainer.parallel.environment import imagined
from trainer.parallel.zero import Zero1, Zero2, Zero3
from trainer.pipelines.pretrain import Pretrain
from trainer.run import Run
from trainer.tracking.throughput import PEAKS

DEVICE_GB = {
    "GB300": 288, "GB200": 192, "B300": 288, "B200": 180, "GH200": 96, "H200": 141, "H200 NVL": 141, "H100": 80,
    "H100 NVL": 94, "H100 PCIe": 80, "H800": 80, "H20": 96, "A100": 80, "A100 PCIe": 80, "A40": 48, "A30": 24, "A10G": 24,
    "A10": 24, "L40S": 48, "L40": 48, "L4": 24, "RTX 5090": 32, "RTX 4090": 24, "RTX 3090": 24, "V100": 32, "V100 PCIe": 32,
    "T4": 16, "MI300X": 192, "MI250X": 64, "cpu": 80,
}  # fmt: skip
"""Memory of a device as its vendor sells it (of several sizes the largest); of a CPU any."""


def main(arguments: Sequence[str]) -> int:
    """Print the estimate of what the command line describes."""
    parser = parser_of("estimate", __doc__)
    add_run_arguments(parser)
    parser.add_argument("--ranks", type=int, default=1, help="data-parallel ranks")
    parser.add_argument("--device", default="H100", choices=[*PEAKS, "cpu"], help="what the ranks run on")
    parser.add_argument("--gb", type=float, help="memory of a device, GB; default: the device's own")
    parser.add_argument(
        "--utilisation", type=float, help="part of the peak that computing reaches; default 0.4, --plan 0.45"
    )
    parser.add_argument("--plan", action="store_true", help="propose a mesh for nodes=N gpus_per_node=N")
    parser.add_argument("--per-node", type=int, default=8, help="devices of a node")
    parser.add_argument("--within", type=float, help="GB/s of a device to others of its node, one direction")
    parser.add_argument("--between", type=float, help="GB/s of a device to other nodes, one direction")
    parser.add_argument("--reached", type=float, default=0.8, help="part of both that exchanges get")
    parser.add_argument("--vocab", type=int, default=32000, help="tokens, where the model leaves them to the tokenizer")
    a = parser.parse_intermixed_args(arguments)
    gb = a.gb or DEVICE_GB[a.device]
    if a.plan:
        return print_plan(a, gb * 1e9)
    with imagined(a.ranks):
        cfg, shape = opened(a, a.overrides)
        layout, *sharded = (
            c.layout(shape, a.ranks, cuda=a.device != "cpu", limit=gb * 1e9) for c in (cfg, *sharding_more(cfg))
        )
    peak = memory(shape, layout)
    print(f"{parameters_of(shape):,} parameters; a rank of {a.ranks} under strategy={cfg.strategy.name}:")
    print("\n".join(peak.lines()))
    if cfg.model.activation_checkpointing is None:
        print(f"with model.activation_checkpointing={layout.recompute.value}, the least that fits")
    if host := host_memory(shape, layout):
        where = f"strategy.offload={layout.offload} keeps {host / 1e9:.2f} GB of each rank in CPU memory"
        print(f"{where}, {a.ranks * host / 1e9:.2f} GB of all")
    fits = peak.total <= gb * 1e9
    print(f"fits {gb:g} GB" if fits else f"does not fit {gb:g} GB: {advice(shape, layout, gb * 1e9, sharded)}")
    if a.device in PEAKS:
        flops = 1e12 * PEAKS[a.device][0 if cfg.precision.dtype.itemsize == 2 else 1]
        tokens = cfg.batch.size * cfg.batch.length
        utilisation = a.utilisation or 0.4
        seconds = seconds_per_step(shape, layout, tokens, flops, utilisation)
        print(f"{seconds:.2f} s a step of {tokens:,} tokens on {a.device} at {utilisation:.0%} of its peak", end="")
        print(f"; {cfg.steps:,} steps: {cfg.steps * seconds / 3600:.1f} h" if cfg.steps else "")
        cluster = Cluster(-(-a.ranks // a.per_node), a.device, flops, utilisation, gb * 1e9, links_of(a, a.per_node))
        took = step_time(shape, layout, peak=flops, utilisation=utilisation, links=cluster.links)
        print("\n".join(account(shape, Choice(cfg.strategy.name, layout, peak.total, took), cluster)))
    return 0


def opened(a: argparse.Namespace, overrides: Sequence[str]) -> tuple[Run, Architecture]:
    """The run that is to be estimated, and its model's shape.

    Raises:
        ConfigError: if it names no model.
    """
    cfg = compose_without_data(overrides, a.config_dir)
    shaped = any(override.startswith(("model=", "model.hidden_size=")) for override in overrides)
    if cfg.model.path is None and not shaped and type(cfg.pipeline) is not Pretrain:
        raise ConfigError(["model.path is required: the run starts from a model; or name a shape, such as model=7b"])
    if cfg.model.path is None and not cfg.model.vocab_size:
        print(f"a vocabulary of {a.vocab:,} tokens is assumed; give the tokenizer's as --vocab")
    return cfg, cfg.model.architecture(cfg.model.vocab_size or (a.vocab if cfg.model.path is None else 1))


def links_of(a: argparse.Namespace, per_node: int) -> Links:
    """Those of the device, and what the command line says of them."""
    known = Links.of_device(a.device, per_node)
    within, between = (1e9 * speed if speed else None for speed in (a.within, a.between))
    return dataclasses.replace(
        known, within=within or known.within, between=between or known.between, reached=a.reached
    )


def print_plan(a: argparse.Namespace, limit: float) -> int:
    """Print which mesh to run on.

    Raises:
        ConfigError: if there is none.
    """
    if a.device not in PEAKS:
        raise ConfigError([f"--plan is for GPUs, and --device is {a.device}; use one of {', '.join(PEAKS)}"])
    wish = Wish.of(a.overrides)
    cfg, shape = opened(a, wish.overrides)
    peak = 1e12 * PEAKS[a.device][0 if cfg.precision.dtype.itemsize == 2 else 1]
    cluster = Cluster(wish.nodes, a.device, peak, a.utilisation or 0.45, limit, links_of(a, wish.per_node))
    for line in plan(cfg, shape, cluster, wish):
        print(line)
    return 0


def sharding_more(cfg: Run) -> Iterator[Run]:
    """The run under the strategies that shard more than its own and that its optimizer works under, the least first."""
    for strategy in (Zero1(), Zero2(), Zero3()):
        if strategy.stage > cfg.strategy.stage and not list(strategy.validate_optimizer(cfg.optimizer)):
            yield dataclasses.replace(cfg, strategy=strategy)


def compose_without_data(overrides: Sequence[str], config_dirs: Sequence[str] = ()) -> Run:
    """Compose a run, with any text in the place of data that is not named: it does not decide memory."""
    try:
        return compose(overrides, config_dirs=config_dirs, name="estimate")
    except ConfigError as error:
        if all(problem.startswith("data.") for problem in error.problems):
            with tempfile.NamedTemporaryFile(suffix=".txt") as text:
                named = [*overrides, f"data.train=[{text.name}]", "data.eval=[]"]
                return compose(named, config_dirs=config_dirs, name="estimate")
        raise ConfigError([p for p in error.problems if not p.startswith("data.")]) from None
