"""Adapters on disk in PEFT's layout: what it writes is started from, and what is written it opens."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from trainer.disk import digest, new_folder, save_tensors, write_text
from trainer.models.hf_format import FormatError, damaged, read_object
from trainer.models.lora_experts import peft_source

CONFIG, WEIGHTS, PREFIX = "adapter_config.json", "adapter_model.safetensors", "base_model.model."
UNUSED = {
    "use_dora": False, "fan_in_fan_out": False, "bias": "none", "rank_pattern": {}, "alpha_pattern": {}, "lora_bias": False,
    "layers_to_transform": None, "trainable_token_indices": None, "layer_replication": None,
}  # fmt: skip
"""Settings of PEFT's that change what an adapter computes and that we do not have, each with the value that is no change."""


@dataclass(frozen=True)
class Settings:
    """What an adapter's configuration says.

    ``rank``: rows of A and columns of B.
    ``alpha``: what its output is scaled by, times the rank or the rank's root.
    ``rslora``: whether it is the root.
    ``targets``: names of the adapted linear layers, or their last parts.
    ``full``: modules whose own weights are saved with it.
    ``dropout``: part of its inputs that is dropped in training.
    ``ranks``, ``alphas``: of layers that have others, by name.
    ``parameters``: ends of the names of adapted parameters that are stacks of experts' matrices.
    """

    rank: int
    alpha: float
    rslora: bool
    targets: tuple[str, ...]
    full: tuple[str, ...] = ()
    dropout: float = 0.0
    ranks: Mapping[str, int] = field(default_factory=dict)
    alphas: Mapping[str, float] = field(default_factory=dict)
    parameters: tuple[str, ...] = ()


class AdapterFolder:
    """An adapter that was written by PEFT or by us.

    Raises:
        FormatError: if it is none, or uses what we do not have.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in (CONFIG, WEIGHTS):
            if not (folder / name).is_file():
                raise FormatError(f"{folder} holds no {name}; give a folder that PEFT or Onecurve wrote")
        config = read_object(folder / CONFIG)
        if config.get("peft_type") != "LORA":
            raise FormatError(f"{CONFIG} is of type {config.get('peft_type')}; only LORA is read")
        for key, plain in UNUSED.items():
            if config.get(key) not in (plain, None):
                raise FormatError(f"{CONFIG} has {key}={config[key]!r}, which is not read; only {plain!r} is")
        targets = config.get("target_modules")
        if not isinstance(targets, list):
            raise FormatError(f"{CONFIG} names target_modules by an expression ({targets}); only a list is read")
        # Ours by whole names, so that they fit no other layer.
        targets = [*targets, *(f"*.{name}" for name in config.get("target_parameters") or ())]
        try:
            self.settings = Settings(
                int(config["r"]), float(config["lora_alpha"]), bool(config.get("use_rslora", False)), tuple(sorted(targets)),
                tuple(config.get("modules_to_save") or ()), float(config.get("lora_dropout") or 0.0),
            )  # fmt: skip
        except (KeyError, TypeError, ValueError) as error:
            raise FormatError(
                f"{folder / CONFIG} is damaged ({type(error).__name__}: {error}); write it again"
            ) from None
        try:
            with safe_open(folder / WEIGHTS, framework="pt") as file:
                self.shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
        except Exception as error:
            raise damaged(folder / WEIGHTS, error) from None

    def shape_problem(self, needed: Mapping[str, tuple[int, ...]]) -> str | None:
        """What keeps the adapter's matrices from being those that a model needs, by name and shape."""
        stored = {key.removeprefix(PREFIX): shape for key, shape in self.shapes.items() if ".lora_" in key}
        if missing := sorted(needed.keys() - stored.keys()):
            return f"missing keys, {missing[0]} among them, so it is of another model"
        if unexpected := sorted(stored.keys() - needed.keys()):
            return f"unexpected keys, {unexpected[0]} among them, so it is of another model"
        wrong = [n for n in needed if needed[n] != stored[n]]
        return f"{wrong[0]} is {stored[wrong[0]]} and should be {needed[wrong[0]]}" if wrong else None

    @property
    def base_format(self) -> str | None:
        """What the weights beside which it was trained were held in, where its record says so."""
        record = self.folder / "onecurve.json"
        base = read_object(record).get("adapter_base") if record.is_file() else None
        return base.get("format") if isinstance(base, Mapping) else None

    def fingerprint(self) -> str:
        """Of the adapter's weights."""
        return digest(self.folder / WEIGHTS)[:24]

    def tensor(self, name: str) -> Tensor | None:
        """A tensor by the model's name for it, as PEFT lays it out; None if the adapter does not hold it."""
        source = PREFIX + peft_source(name, {key.removeprefix(PREFIX) for key in self.shapes})
        if source not in self.shapes:
            return None
        with safe_open(self.folder / WEIGHTS, framework="pt") as file:
            tensor: Tensor = file.get_tensor(source)
        return tensor


def is_adapter_folder(folder: Path) -> bool:
    """Whether a folder is an adapter's, not a model's."""
    return (folder / CONFIG).is_file()


def write_adapter(
    folder: Path,
    settings: Settings,
    tensors: Mapping[str, Tensor],
    base: str | None,
    tokenizer: Any,
    facts: Mapping[str, Any],
    card: str | None = None,
) -> None:
    """Write a folder that PEFT opens, tokenizer included; it appears whole or not at all.

    ``base``: the folder of the model that it belongs to. ``facts``: kept in ``onecurve.json``: where it comes from.
    ``card``: its README.
    """
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": settings.rank, "lora_alpha": settings.alpha,
        "base_model_name_or_path": None if base is None else str(Path(base).resolve()),
        "lora_dropout": settings.dropout, "use_rslora": settings.rslora, "target_modules": list(settings.targets),
        "modules_to_save": list(settings.full) or None, "bias": "none", "fan_in_fan_out": False, "init_lora_weights": True,
        "inference_mode": True, "rank_pattern": dict(settings.ranks), "alpha_pattern": dict(settings.alphas),
        "target_parameters": list(settings.parameters) or None,
    }  # fmt: skip
    with new_folder(folder) as partial:
        partial.mkdir()
        tokenizer.save(partial)
        weights = {PREFIX + name: tensor.contiguous() for name, tensor in tensors.items()}
        save_tensors(weights, partial / WEIGHTS, metadata={"format": "pt"})
        write_text(partial / CONFIG, json.dumps(config, indent=2) + "\n")
        write_text(partial / "onecurve.json", json.dumps(dict(facts), indent=2) + "\n")
        if card is not None:
            write_text(partial / "README.md", card)
