"""What `onecurve estimate --plan` does: try every mesh that a run works on."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from trainer.config import ConfigError
from trainer.diagnostics.layout import Layout
from trainer.diagnostics.memory import USABLE
from trainer.diagnostics.mesh_plan import AXES, Cluster, account, best_of, choices, shown, table
from trainer.models.architecture import Architecture
from trainer.models.recompute import Recompute
from trainer.models.sizes import parameters_of
from trainer.parallel.ddp import DDP
from trainer.parallel.fsdp import FSDP
from trainer.parallel.strategy import Strategy
from trainer.parallel.zero import Zero1, Zero2
from trainer.run import Run

MICRO = (1, 2, 4, 8, 16)
"""Rows of a forward that are tried."""
MOST = 2**14
"""Ranks up to which it is looked for what would fit."""
VARIED = ("reshard", *AXES)
"""Settings of a strategy that are tried."""


@dataclass(frozen=True)
class Wish:
    """What the words of a command line ask of a plan.

    Args:
        nodes: How many there are.
        per_node: Devices of each.
        strategy: Settings of the strategy that stay as they are, as they are written; "" is its name.
        overrides: Of the run, without those of the strategy.
    """

    nodes: int
    per_node: int
    strategy: Mapping[str, str]
    overrides: Sequence[str]

    @classmethod
    def of(cls, words: Sequence[str]) -> Wish:
        """Those of a command line.

        Raises:
            ConfigError: naming what is missing, no number, or not varied.
        """
        given = {name: value for name, _, value in (word.partition("=") for word in words)}
        problems = [
            f"{name}={given[name]} is no number of 1 or more; write {name}=8"
            if name in given
            else f"{name} is required: --plan proposes a mesh for so many; write {name}=8"
            for name in ("nodes", "gpus_per_node")
            if not given.get(name, "").isdigit() or int(given[name]) < 1
        ]
        strategy = {
            name.partition(".")[2]: value for name, value in given.items() if name.partition(".")[0] == "strategy"
        }
        problems += [
            f"strategy.{name} is nothing that --plan chooses; leave it out, or use one of {', '.join(VARIED)}"
            for name in strategy
            if name not in ("", *VARIED)
        ]
        if problems:
            raise ConfigError(problems)
        own = ("nodes", "gpus_per_node", "strategy")
        overrides = [word for word in words if word.partition("=")[0].partition(".")[0] not in own]
        return cls(int(given["nodes"]), int(given["gpus_per_node"]), strategy, overrides)

    @property
    def named(self) -> set[str]:
        """Names of the settings of the run."""
        return {word.partition("=")[0] for word in self.overrides}

    def allows(self, strategy: Strategy) -> bool:
        """Whether a strategy has the settings that are named."""
        values = {"": strategy.name, **{name: str(getattr(strategy, name, None)).lower() for name in VARIED}}
        return all(values[name] == value.lower() for name, value in self.strategy.items())


def plan(cfg: Run, a: Architecture, cluster: Cluster, wish: Wish) -> Iterator[str]:
    """The lines of a plan.

    Raises:
        ConfigError: if nothing works, or nothing fits; with what would.
    """
    refused: dict[str, str] = {}
    layouts = list(layouts_of(cfg, a, cluster, wish, refused))
    if not layouts:
        raise ConfigError([_nothing_works(cfg, cluster.ranks, refused)])
    fitting, larger = choices(a, layouts, cluster, recompute_of(cfg, wish))
    links, batch = cluster.links, cfg.batch
    yield (
        f"{parameters_of(a):,} parameters, {batch.size:,} rows of {batch.length:,} tokens a step; "
        f"{cluster.nodes} node{'s' if cluster.nodes > 1 else ''} of {links.per_node} {cluster.device}, "
        f"{cluster.limit / 1e9:g} GB each; "
        f"links of a device {links.within / 1e9:g} GB/s within and {links.between / 1e9:g} GB/s between nodes, "
        f"{links.reached:.0%} of them reached; computing at {cluster.utilisation:.0%} of the peak"
    )
    yield from (f"without strategy.{axis}: {why}" for axis, why in refused.items())
    if not fitting:
        least = min(larger, key=lambda choice: choice.memory)
        need = f"{least.overrides} needs {least.memory / 1e9:,.0f} GB of {USABLE * cluster.limit / 1e9:.0f}"
        raise ConfigError([f"nothing fits: {need}; {_remedy(cfg, a, cluster, wish)}"])
    best = best_of(fitting)
    yield from ("", *table(a, shown(fitting, larger, best), best, cluster), "", f"use {best.overrides}")
    yield from account(a, best, cluster)


def recompute_of(cfg: Run, wish: Wish) -> list[Recompute]:
    """What the backward may compute again."""
    chosen = cfg.model.activation_checkpointing
    return [chosen] if chosen is not None and "model.activation_checkpointing" in wish.named else list(Recompute)


def layouts_of(
    cfg: Run, a: Architecture, cluster: Cluster, wish: Wish, refused: dict[str, str]
) -> Iterator[tuple[str, Layout]]:
    """Every layout that the run works on, with its strategy's overrides; into ``refused`` why an axis is not used at all."""
    base = cfg.layout(a, cluster.ranks, cuda=True)
    further = {key: getattr(base, key) for key in ("adapters", "packed", "auxiliary", "moment")}
    used: set[str] = set()
    for strategy in filter(wish.allows, strategies(a, cluster)):
        problems = [
            *strategy.problems(), *strategy.validate_optimizer(cfg.optimizer), *cfg.pipeline.validate_mesh(strategy.mesh),
            *(strategy.validate_compiled() if cfg.model.compile else ()),
            *dataclasses.replace(cfg, strategy=strategy).validate_division(a),
        ]  # fmt: skip
        axes = strategy.mesh.axes
        if problems:
            if len(axes) == 1:
                refused.setdefault(next(iter(axes)), problems[0])
            continue
        used |= set(axes)
        for micro in (cfg.batch.micro,) if "batch.micro" in wish.named else MICRO:
            batch = dataclasses.replace(cfg.batch, micro=micro)
            if not list(cfg.pipeline.validate_layout(batch, strategy.mesh, cluster.ranks)):
                yield words(strategy), Layout.of(strategy, cfg.precision, batch, cluster.ranks, cuda=True, **further)
    for axis in used & set(refused):
        del refused[axis]


def words(strategy: Strategy) -> str:
    """The overrides that choose a strategy, its mesh aside."""
    return f"strategy={strategy.name}" + ("" if getattr(strategy, "reshard", True) else " strategy.reshard=false")


def strategies(a: Architecture, cluster: Cluster) -> Iterator[Strategy]:
    """DDP, ZeRO, and FSDP on every mesh. ZeRO-3 is not among them: FSDP holds as much, and hides what it exchanges."""
    yield from (DDP(), Zero1(), Zero2(), *_meshes(a, cluster))


def _meshes(a: Architecture, cluster: Cluster) -> Iterator[FSDP]:
    ranks, per_node = cluster.ranks, cluster.links.per_node
    for tensor in _divisors(per_node):
        for sequence in (n for n in _divisors(ranks // tensor) if n <= 2 * per_node):
            for pipeline in (n for n in _divisors(ranks // (tensor * sequence)) if n <= a.num_hidden_layers):
                shards = ranks // (tensor * pipeline)
                for expert in (n for n in _divisors(shards) if n <= max(1, a.experts)):
                    for reshard in (True, False):
                        yield FSDP(reshard=reshard, tensor=tensor, sequence=sequence, expert=expert, pipeline=pipeline)


def _divisors(count: int) -> list[int]:
    return [n for n in range(1, count + 1) if count % n == 0]


def _nothing_works(cfg: Run, ranks: int, refused: dict[str, str]) -> str:
    if refused:
        return f"no mesh that was asked for works: {'; '.join(refused.values())}"
    below = cfg.batch.size // ranks * ranks
    near = f"{below} or {below + ranks}" if below else str(ranks)
    return f"batch.size={cfg.batch.size} divides among no mesh of {ranks} devices that was asked for; use {near}"


def _remedy(cfg: Run, a: Architecture, cluster: Cluster, wish: Wish) -> str:
    """What would fit: more nodes of the same kind, or a device with more memory."""
    nodes = cluster.nodes
    while (nodes := 2 * nodes) * cluster.links.per_node <= MOST:
        more = dataclasses.replace(cluster, nodes=nodes)
        # As many rows more as there are ranks more: each has one at least.
        rows = dataclasses.replace(cfg.batch, size=max(cfg.batch.size, more.ranks))
        larger = dataclasses.replace(cfg, batch=rows)
        if fitting := choices(a, layouts_of(larger, a, more, wish, {}), more, recompute_of(cfg, wish))[0]:
            batch = f" batch.size={rows.size}" if rows.size != cfg.batch.size else ""
            return f"nodes={nodes} would fit it: {best_of(fitting).overrides}{batch}"
    return (
        "no number of nodes up to 16,384 devices fits it; use a device with more memory, shorter rows, or adapter=lora"
    )
