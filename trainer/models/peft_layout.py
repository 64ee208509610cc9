"""Adapters as PEFT lays them over a family's own modules: what is one tensor there is several here."""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from collections.abc import Mapping

import torch
from torch import Tensor

from trainer.models.architecture import Architecture
from trainer.models.families import FAMILIES
from trainer.models.family import Tensors, split_layer
from trainer.models.lora import is_adapter
from trainer.models.lora_experts import is_of_experts, parameters_in_peft, to_peft
from trainer.models.peft_format import Settings

Sides = dict[str, Tensor]
"""An adapter's matrices by "A" and "B"."""


def in_peft_layout(
    settings: Settings, trained: Mapping[str, Tensor], a: Architecture, shapes: Mapping[str, tuple[int, ...]]
) -> tuple[Settings, dict[str, Tensor]]:
    """Adapters, and what is trained with them, under the names of the family's modules.

    Where q, k, v are one tensor their adapters of rank r are one of rank 3 r: A below each other, B block by block.
    ``shapes``: of the model's own parameters by our names.
    """
    family = FAMILIES[a.family]
    of_experts = to_peft({name: tensor for name, tensor in trained.items() if is_of_experts(name)})
    parameters = parameters_in_peft(trained)
    trained = {name: tensor for name, tensor in trained.items() if not is_of_experts(name)}
    placed = of_experts | dict(family.stored(iter({n: t for n, t in trained.items() if not is_adapter(n)}.items()), a))
    modules: dict[str, Sides] = defaultdict(dict)
    for name, tensor in trained.items():
        if is_adapter(name):
            stem, _, side = name.removesuffix(".weight").rpartition(".lora_")
            modules[stem][side] = tensor
    fused: dict[str, tuple[Tensors, dict[str, Sides]]] = {}
    adapted, ranks = dict[str, Sides](), dict[str, int]()
    for stem, sides in modules.items():
        start, rule = family.rule_of(f"{stem}.weight")
        theirs = stem if rule is None else start + rule.theirs[0].removesuffix(".weight")
        if rule is None or len(rule.ours) == 1:
            adapted[theirs] = sides
        else:
            fused.setdefault(theirs, (rule, {}))[1][split_layer(stem)[1]] = sides
    for theirs, (rule, parts) in fused.items():
        start = split_layer(theirs)[0]
        blocks = []
        for ours in rule.ours:
            sides = parts.get(ours.removesuffix(".weight"), {})
            blocks.append(sides["B"] if sides else torch.zeros(shapes[start + ours][0], 0))
        down = [parts[n]["A"] for n in (ours.removesuffix(".weight") for ours in rule.ours) if n in parts]
        adapted[theirs] = {"A": torch.cat(down), "B": torch.block_diag(*blocks)}  # type: ignore[no-untyped-call]
        ranks[theirs] = settings.rank * len(down)
    for theirs, sides in adapted.items():
        placed |= {f"{theirs}.lora_{side}.weight": tensor for side, tensor in sides.items()}
    if parameters:
        # By their whole names: PEFT takes some names of projections for those of experts, too.
        settings = dataclasses.replace(settings, targets=tuple(adapted), parameters=tuple(parameters))
    if adapted.keys() == modules.keys():
        return settings, placed
    # Its output is scaled by alpha / rank, or by alpha / sqrt(rank).
    grown = {n: rank / settings.rank for n, rank in ranks.items()}
    alphas = {n: settings.alpha * (math.sqrt(g) if settings.rslora else g) for n, g in grown.items()}
    return dataclasses.replace(settings, targets=tuple(adapted), ranks=ranks, alphas=alphas), placed
