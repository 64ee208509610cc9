"""An architecture as the metadata of a GGUF file, and what llama.cpp computes of such metadata as an architecture."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection, Iterator
from typing import Any

from trainer.models.architecture import Architecture, Layer
from trainer.models.families import FAMILIES
from trainer.models.gguf_architectures import GGUF_ARCHITECTURES, PROBES, Entry, GgufArchitecture, architecture_for
from trainer.models.gguf_rope import Metadata, read_rope, rounded, same_number, same_rope, written_ropes

COMMON = {
    "hidden_size": "embedding_length", "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count", "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length", "max_position_embeddings": "context_length",
}  # fmt: skip
CONFIG = "onecurve.config"
"""The key of what `config.json` says besides, such as the family among those that llama.cpp does not tell apart."""
DENSE = "leading_dense_block_count"
WINDOW, PERIOD = "attention.sliding_window", "attention.sliding_window_pattern"
PLAIN: dict[str, float] = {
    "attention.scale": 1.0, "logit_scale": 1.0, "embedding_scale": 1.0, "residual_scale": 1.0, "expert_count": 0,
    "expert_used_count": 0, "attn_logit_softcapping": 0, "final_logit_softcapping": 0, "attention.temperature_scale": 0,
    "expert_weights_scale": 1.0, "nextn_predict_layers": 0, DENSE: 0,
}  # fmt: skip
"""Keys that change what is computed, with the number at which they do not."""


def metadata_of(a: Architecture) -> dict[str, Any]:
    """The metadata that says most of an architecture in llama.cpp's words; `differences` tells what it does not."""
    name = architecture_for(a.family)
    assert name is not None, f"llama.cpp has no architecture for {a.family}"
    row = GGUF_ARCHITECTURES[name]
    metadata: dict[str, Any] = {"vocab_size": a.vocab_size, "block_count": a.num_hidden_layers}
    metadata |= {key: getattr(a, feature) for feature, key in COMMON.items()}
    metadata["attention.value_length"] = a.head_dim
    metadata[_epsilon(a.layer_norm)] = float(a.rms_norm_eps)
    for feature, entry in row.entries.items():
        if (value := _written(a, feature, entry)) is not None:
            metadata[entry.key] = value
    if row.dense_first:
        metadata[DENSE] = next((n for n, layer in enumerate(a.layers) if layer.sparse), 0)
    metadata |= _written_windows(row, a) | written_ropes(row, a)
    config = {"model_type": a.family, **FAMILIES[a.family].write(a)}
    return {**metadata, CONFIG: json.dumps(config)}


def read_metadata(name: str, metadata: Metadata, tensors: Collection[str]) -> Architecture:
    """What llama.cpp computes of a file of architecture ``name`` with these ``tensors``.

    Raises:
        ValueError: naming a key whose value cannot be computed.
        KeyError: naming a key that is missing.
    """
    row = GGUF_ARCHITECTURES[name]
    values = _features(row, metadata, tensors)
    _validate_plain(row, metadata, metadata.get("attention.key_length", values["head_dim"]))
    count = metadata["block_count"]
    dense = metadata.get(DENSE, 0) if row.dense_first else 0
    layers = tuple(
        dataclasses.replace(layer, sparse=values.get("experts", 0) > 0 and n >= dense)
        for n, layer in enumerate(_layers(row, metadata, count, values["head_dim"]))
    )
    a = Architecture(family=row.families[0], layers=layers, **values)
    fitting = (_of_family(a, family) for family in row.families)
    a = next((each for each in fitting if not FAMILIES[each.family].lost(each)), _of_family(a, row.families[0]))
    stated = _stated(metadata)
    return stated if stated and stated.family in row.families and not list(differences(stated, a)) else a


def _of_family(a: Architecture, family: str) -> Architecture:
    """As the model of a family, by which the rows of queries and keys are in its own order."""
    interleaved = FAMILIES[family].features.get("interleaved_rope", False)
    return dataclasses.replace(a, family=family, interleaved_rope=interleaved)


def _epsilon(layer_norm: bool) -> str:
    return f"attention.layer_norm_{'' if layer_norm else 'rms_'}epsilon"


def _written(a: Architecture, feature: str, entry: Entry) -> Any:
    value = getattr(a, feature)
    if value is None or (not value and (entry.inverse or value == entry.absent)):
        return None
    if entry.times:
        return value // max(getattr(a, entry.times), 1)
    return 1 / value if entry.inverse else value


def _features(row: GgufArchitecture, metadata: Metadata, tensors: Collection[str]) -> dict[str, Any]:
    heads = metadata["attention.head_count"]
    defaults = {
        "attention.head_count_kv": heads, "attention.key_length": metadata["embedding_length"] // heads,
    }  # fmt: skip
    values = {feature: {**defaults, **metadata}[key] for feature, key in COMMON.items()}
    values["vocab_size"] = metadata["vocab_size"]
    values["tie_word_embeddings"] = "output.weight" not in tensors
    for feature, entry in row.entries.items():
        value = rounded(metadata.get(entry.key))
        value = (1 / value if value else None) if entry.inverse else value
        value = entry.absent if value is None else value
        values[feature] = value * values[entry.times] if entry.times else value
    for feature, value in row.optional.items():
        if PROBES[feature] in tensors:
            values[feature] = value
    for feature, value in row.fixed.items():
        values[feature] = value({**values, "layers": metadata["block_count"]}) if callable(value) else value
    values["rms_norm_eps"] = rounded(metadata[_epsilon(values.get("layer_norm", False))])
    return {feature: value for feature, value in values.items() if value is not None}


def _validate_plain(row: GgufArchitecture, metadata: Metadata, size: int) -> None:
    """Nothing is computed in another way than the metadata says.

    Raises:
        ValueError: naming the key.
    """
    plain = {**PLAIN, "attention.value_length": size} | ({} if row.partial else {"rope.dimension_count": size})
    read = {entry.key for entry in row.entries.values()}
    read |= {DENSE} if row.dense_first else set()
    read |= {"attention.temperature_scale"} if "growth" in row.scaling else set()
    for key in plain.keys() - read:
        if (stored := metadata.get(key, plain[key])) not in (plain[key], 0):
            raise ValueError(f"{key}={stored} is not supported; only {plain[key]:g} is")


def _layers(row: GgufArchitecture, metadata: Metadata, count: int, size: int) -> Iterator[Layer]:
    windows = _windows(row, metadata, count)
    stated = _stated(metadata)
    rope = read_rope(row, metadata, size, stated.ropes if stated else [])
    local = row.local(rope, rounded(metadata.get("rope.freq_base_swa")))
    still = row.unturned and not metadata.get("rope.scaling.finetuned", True)
    for number, window in enumerate(windows):
        turns = not still and row.turns(number, window is not None, any(windows))
        yield Layer(window, (rope if window is None else local) if turns else None)


def _windows(row: GgufArchitecture, metadata: Metadata, count: int) -> list[int | None]:
    window = metadata.get(WINDOW, row.window) or None
    if not row.period or window is None or (row.depth and count != row.depth):
        return [None] * count
    period = metadata.get(PERIOD)
    if not isinstance(period, int) or isinstance(period, bool):  # llama.cpp reads no list there
        period = row.period
    return [window if period == 0 or (number + 1) % period else None for number in range(count)]


def _written_windows(row: GgufArchitecture, a: Architecture) -> dict[str, int]:
    slides = [layer.window is not None for layer in a.layers]
    window = next((layer.window for layer in a.layers if layer.window is not None), None)
    if not row.period or window is None:
        return {}
    candidates = (
        p for p in range(len(slides) + 1) if slides == [p == 0 or (n + 1) % p > 0 for n in range(len(slides))]
    )
    return {WINDOW: window, PERIOD: next(candidates, row.period)}


def _stated(metadata: Metadata) -> Architecture | None:
    """What our own files say besides; None where there is nothing, or it cannot be read."""
    try:
        config = json.loads(metadata[CONFIG])
        return FAMILIES[config["model_type"]].read(config)
    except (KeyError, TypeError, ValueError, AttributeError):
        return None


def differences(a: Architecture, b: Architecture) -> Iterator[str]:
    """The features in which two architectures do not compute the same, by their names."""
    ignored = {"family", "initializer_range", "layers", "interleaved_rope", "attention_scale"}
    names = [f.name for f in dataclasses.fields(a) if f.metadata.get("feature", True) and f.name not in ignored]
    yield from (name for name in names if not same_number(getattr(a, name), getattr(b, name)))
    scales = [each.attention_scale or each.head_dim**-0.5 for each in (a, b)]
    if not same_number(*scales):
        yield "attention_scale"
    if len(a.layers) != len(b.layers):
        yield "num_hidden_layers"
        return
    pairs = list(zip(a.layers, b.layers, strict=True))
    if any(_seen(one, a) != _seen(two, b) for one, two in pairs):
        yield "sliding_window"
    ropes = {(one.rope, two.rope) for one, two in pairs} if a.head_dim == b.head_dim else set()
    if not all(same_rope(one, a, two, b) for one, two in ropes):
        yield "rope_parameters"
    if any((one.sparse, one.delta) != (two.sparse, two.delta) for one, two in pairs):
        yield "kinds of layers"


def _seen(layer: Layer, a: Architecture) -> int | None:
    """A layer's window; None if it reaches as far as any document."""
    return layer.window if layer.window is not None and layer.window < a.max_position_embeddings else None
