"""How a family's ``config.json`` and tensors map to the features and parameters of the one decoder, in either direction."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from trainer.models.architecture import Architecture
from trainer.models.layers import Layers
from trainer.models.mlp import ALIASES

Turn = Callable[[list[Tensor], Architecture], list[Tensor]]
REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads")
"""Features that every ``config.json`` must name, but where a row says what they are if it does not."""


@dataclass(frozen=True)
class Key:
    """A key of ``config.json``.

    ``name``: as it is written. ``absent``: its value where it is not there. ``alias``: another name that is read.
    ``read``, ``write``: the way to a feature's value, and back.
    """

    name: str
    absent: Any = None
    alias: str = ""
    read: Callable[[Any], Any] = lambda value: value
    write: Callable[[Any], Any] = lambda value: value

    def value(self, config: Mapping[str, Any], feature: str) -> Any:
        """What a configuration says of ``feature``, of the kind that it is of.

        Raises:
            ValueError: if it is of another kind.
        """
        name = self.name if self.name in config or self.alias not in config else self.alias
        value, kind = config.get(name, self.absent), KINDS[feature]
        if value is None and "None" not in kind:
            value = self.absent
        if value is None:
            return None
        _validate(name, value, type(self.absent).__name__ if self.absent is not None else kind, feature)
        return self.read(value)

    def written(self, a: Architecture, feature: str) -> Any:
        """Its value for an architecture's ``feature``."""
        return self.write(getattr(a, feature))


KINDS = {f.name: str(f.type) for f in fields(Architecture)}
FROM_ZERO = ("experts", "experts_per_token", "expert_size", "shared_size")
"""Features whose numbers may be 0."""


def _validate(name: str, value: Any, kind: str, feature: str) -> None:
    """Whatever else stood there would be computed with."""
    least = 0 if feature in FROM_ZERO else 1
    number = type(value) in (int, float) and math.isfinite(value) and value > 0
    rules = {
        "int": ("a positive integer", type(value) is int and value >= least),
        "float": ("a positive number", number),
        "bool": ("true or false", isinstance(value, bool)),
        "str": ("a name", isinstance(value, str)),
    }
    # A float that is written without its point, as json writes some.
    kind = "float" if kind.startswith("float") or KINDS[feature].startswith("float") else kind.split(" ")[0]
    words, holds = rules.get(kind, ("", True))
    if not holds:
        raise ValueError(f"{name}={json.dumps(value)[:80]} is not {words}; correct the file")


def power(name: str, exponent: float, absent: float = 1.0) -> Key:
    """A key that becomes a feature by raising it to a power."""

    def write(value: float | None) -> float:
        if value is None:
            return absent  # reading it back tells the difference
        number = float(round(value ** (1 / exponent), 9))
        return int(number) if number.is_integer() else number

    return Key(name, absent, "", lambda value: value**exponent, write)


def switch(name: str, chosen: str, absent: bool = False) -> Key:
    """A truth value that stands for a feature's value ``chosen``, or for none."""
    return Key(name, absent, "", lambda value: chosen if value else "", bool)


def _activation(name: Any) -> Any:
    return ALIASES.get(name, name)


ACTIVATION = Key("hidden_act", "silu", "hidden_activation", _activation)
COMMON = {
    "vocab_size": Key("vocab_size"),
    "hidden_size": Key("hidden_size"),
    "intermediate_size": Key("intermediate_size"),
    "num_attention_heads": Key("num_attention_heads"),
    "num_key_value_heads": Key("num_key_value_heads"),
    "head_dim": Key("head_dim"),
    "max_position_embeddings": Key("max_position_embeddings", 2048),
    "rms_norm_eps": Key("rms_norm_eps", 1e-6),
    "tie_word_embeddings": Key("tie_word_embeddings", False),
    "initializer_range": Key("initializer_range", 0.02),
    "activation": ACTIVATION,
}
"""Keys that a row need not name."""


@dataclass(frozen=True)
class Tensors:
    """Tensors of a layer that have other names, or another layout, on disk than here.

    ``ours``, ``theirs``: names without what begins them for a layer; ``{}`` in one of theirs: one for every expert.
    ``load``, ``store``: make ours of theirs, and theirs of ours.
    """

    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    load: Turn = lambda tensors, a: tensors
    store: Turn = lambda tensors, a: tensors

    def disk(self, a: Architecture) -> list[str]:
        """Their names, expert by expert."""
        return [name.format(e) for name in self.theirs for e in (range(a.experts) if "{}" in name else [0])]


def renamed(pairs: Mapping[str, str]) -> tuple[Tensors, ...]:
    """Modules of ours by names of theirs: their weights and biases."""
    return tuple(Tensors((f"{o}.{kind}",), (f"{t}.{kind}",)) for o, t in pairs.items() for kind in ("weight", "bias"))


def fused(theirs: str, *ours: str) -> Tensors:
    """Several of ours are one of theirs, one below the other."""

    def rows(name: str, a: Architecture) -> int:
        heads = {"q_proj": a.num_attention_heads, "k_proj": a.num_key_value_heads, "v_proj": a.num_key_value_heads}
        known = heads.get(name.split(".")[-2])
        return known * a.head_dim if known else a.intermediate_size

    def load(tensors: list[Tensor], a: Architecture) -> list[Tensor]:
        return list(torch.split(tensors[0], [rows(name, a) for name in ours]))

    return Tensors(ours, (theirs,), load, lambda tensors, a: [torch.cat(tensors)])


@dataclass(frozen=True)
class Family:
    """An architecture of Hugging Face's, by its features.

    ``classes``: what the names of its classes begin with, as in ``LlamaForCausalLM``.
    ``features``: those that all its models have; the others are Llama's.
    ``keys``: keys of ``config.json`` by feature, where they differ from `COMMON`.
    ``layers``: how it says what differs between layers.
    ``tensors``: what has another name or layout on disk; of two rules for one of ours the first is written.
    ``only``: keys of which one value can be computed.
    ``written``: keys that ``transformers`` wants though they mean nothing.
    ``peft_experts``: whether PEFT's adapters of its experts are of matrices as they are stacked here.
    ``quantized``: methods whose tensors ``tensors`` makes numbers of.
    """

    classes: str
    features: Mapping[str, Any] = field(default_factory=dict)
    keys: Mapping[str, Key] = field(default_factory=dict)
    layers: Layers = Layers()
    tensors: tuple[Tensors, ...] = ()
    only: Mapping[str, Any] = field(default_factory=dict)
    written: Mapping[str, Any] = field(default_factory=dict)
    peft_experts: bool = False
    quantized: tuple[str, ...] = ()

    @property
    def named(self) -> dict[str, Key]:
        """Keys of ``config.json`` by feature."""
        return {**COMMON, **self.keys}

    def read(self, config: Mapping[str, Any]) -> Architecture:
        """The architecture that a ``config.json`` describes.

        Raises:
            ValueError: naming a key and what is missing in it, of the wrong kind, or cannot be computed.
        """
        for key, value in self.only.items():
            if (config.get(key, value) or None) != (value or None):
                raise ValueError(f"{key}={json.dumps(config[key])} cannot be computed; only {json.dumps(value)} can")
        keys = [self.named[feature] for feature in REQUIRED]
        missing = [key.name for key in keys if config.get(key.name) is None and key.absent is None]
        missing += [] if "num_hidden_layers" in config else ["num_hidden_layers"]
        if missing:
            raise ValueError(f"missing keys {', '.join(missing)}")
        values = {feature: key.value(config, feature) for feature, key in self.named.items()}
        values["num_key_value_heads"] = values["num_key_value_heads"] or values["num_attention_heads"]
        values["head_dim"] = values["head_dim"] or values["hidden_size"] // values["num_attention_heads"]
        layers = tuple(self.layers.read(config))
        return Architecture(family=config["model_type"], **{**values, **self.features}, layers=layers)

    def write(self, a: Architecture) -> dict[str, Any]:
        """Its ``config.json``.

        Raises:
            ValueError: naming the features that this family has no words for.
        """
        config = self._written(a)
        if lost := self.lost(a):
            raise ValueError(f"{', '.join(lost)} cannot be written as family {a.family}")
        return config

    def lost(self, a: Architecture) -> list[str]:
        """The features that this family has no words for: those that are others when what is written is read again."""
        try:
            back = self.read({**self._written(a), "model_type": a.family})
        except ValueError as error:
            return [str(error)]
        differing = [f.name for f in fields(a) if f.metadata.get("feature", True)]
        differing = [name for name in differing if getattr(a, name) != getattr(back, name)]
        if "layers" in differing:
            differing.remove("layers")
            words = {"window": "sliding_window", "rope": "rope_scaling", "sparse": "experts", "delta": "delta"}
            for name, word in words.items():
                if [getattr(layer, name) for layer in a.layers] != [getattr(layer, name) for layer in back.layers]:
                    differing.append(word)
        return differing

    def _written(self, a: Architecture) -> dict[str, Any]:
        config = {key.name: key.written(a, feature) for feature, key in self.named.items()}
        return {**config, **self.layers.write(a), **self.only, **self.written}

    def rule_of(self, name: str) -> tuple[str, Tensors | None]:
        """What begins the name of one of our parameters (its layer), and the rule for the rest, if there is one."""
        start, rest = split_layer(name)
        return start, next((rule for rule in self.tensors if start and rest in rule.ours), None)

    def source(self, name: str, a: Architecture, stored: Collection[str]) -> Origin:
        """Where one of our parameters comes from in a folder with the tensors ``stored``."""
        start, rest = split_layer(name)
        rules = [rule for rule in self.tensors if start and rest in rule.ours]
        for rule in rules:
            names = [start + theirs for theirs in rule.disk(a)]
            if rule is rules[-1] or all(theirs in stored for theirs in names):
                return Origin(names, rule.load, rule.ours.index(rest))
        return Origin([name], lambda tensors, a: tensors, 0)

    def stored(self, weights: Iterator[tuple[str, Tensor]], a: Architecture) -> Iterator[tuple[str, Tensor]]:
        """Tensors as they are on disk, made of ours one by one; no more than a layer's are kept waiting."""
        waiting: dict[tuple[str, str], dict[str, Tensor]] = {}
        for name, tensor in weights:
            start, rule = self.rule_of(name)
            if rule is None:
                yield name, tensor
                continue
            arrived = waiting.setdefault((start, rule.ours[0]), {})
            arrived[name.removeprefix(start)] = tensor if len(rule.ours) == 1 else tensor.clone()
            if len(arrived) == len(rule.ours):
                tensors = waiting.pop((start, rule.ours[0]))
                names = [start + theirs for theirs in rule.disk(a)]
                yield from zip(names, rule.store([tensors[n] for n in rule.ours], a), strict=True)
        assert not waiting, f"{', '.join(start for start, _ in waiting)} lack tensors"


@dataclass(frozen=True)
class Origin:
    """``names``: tensors of a folder. ``load`` makes of them, among others, the one at ``place``."""

    names: list[str]
    load: Turn
    place: int


def split_layer(name: str) -> tuple[str, str]:
    """``model.layers.3.`` and the rest of a parameter's name; "" and the name where it is none of a layer's."""
    parts = name.split(".", 3)
    if len(parts) == 4 and parts[:2] == ["model", "layers"]:
        return f"model.layers.{parts[2]}.", parts[3]
    return "", name
