"""How a family's ``config.json`` says what differs between layers: windows, rotations, experts, recurrence."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from trainer.models.architecture import Architecture, Layer, Rope

FULL, SLIDING, LINEAR = "full_attention", "sliding_attention", "linear_attention"
LISTED, STEP = "mlp_only_layers", "decoder_sparse_step"
"""Keys with the numbers of the layers that have an MLP, and of which of the others every n-th has experts (Qwen)."""
MOST = 10_000
"""Layers: more than any model has, and few enough to be read."""
WITH_ORIGINAL = ("yarn", "longrope", "llama3")
"""Kinds of scaling that know how long the documents were before."""


@dataclass(frozen=True)
class Layers:
    """A family's words for its layers.

    ``slide``: whether ``sliding_window`` means anything; ``window``: its value where it is absent.
    ``switched``: whether it does so only with ``use_sliding_window``, and from ``max_window_layers`` on (Qwen).
    ``full_every``: without ``layer_types`` every n-th layer sees all and the others are of type ``other``; 0 = all are
    alike. ``rope``: "same"; "by_type": a rotation each for both types of attention; "sliding": only layers with a window
    turn; "listed": those of ``no_rope_layers``; "named": all with ``position_embedding_type`` rope, else none.
    ``dense``: the key with the number of first layers that have an MLP though the family has experts, or `LISTED`; "" if
    none has, None without experts.
    ``thetas`` (of full and of sliding layers) and ``fraction`` (of a head that turns): where absent. ``local_theta``: an
    earlier key for that of sliding layers. ``mixed``: whether ``layer_types`` is written only where layers differ.
    ``scaling``: the ``rope_parameters`` of a configuration without any; a null in it is what the configuration says.
    """

    slide: bool = False
    window: int | None = None
    switched: bool = False
    full_every: int = 0
    other: str = SLIDING
    rope: str = "same"
    dense: str | None = None
    thetas: tuple[float, float] = (10000.0, 10000.0)
    fraction: float = 1.0
    local_theta: str = "rope_theta"
    mixed: bool = False
    scaling: Mapping[str, Any] = field(default_factory=dict)

    def read(self, config: Mapping[str, Any]) -> Iterator[Layer]:
        """Every layer.

        Raises:
            ValueError: naming a key and what in it is of the wrong kind or not known.
        """
        count = config["num_hidden_layers"]
        if type(count) is not int or not 0 < count <= MOST:
            raise ValueError(f"num_hidden_layers={json.dumps(count)} is not a positive integer below {MOST}")
        window = self._window(config)
        turning = self._turning(config, count)
        kinds, dense = self._kinds(config, count, window, turning), self._dense(config, count)
        for n, kind in enumerate(kinds):
            slides, delta = kind == SLIDING and window is not None, kind == LINEAR
            still = delta or (self.rope == "listed" and not turning[n])
            still |= self.rope == "sliding" and window is not None and not slides
            still |= self.rope == "named" and config.get("position_embedding_type") != "rope"
            rope = None if still else self._rope(config, slides)
            yield Layer(window if slides else None, rope, n not in dense, delta)

    def _dense(self, config: Mapping[str, Any], count: int) -> Collection[int]:
        """The layers that have no experts."""
        if not self.dense:
            return range(count if self.dense is None else 0)
        if self.dense != LISTED:
            first = config.get(self.dense, 1)
            if type(first) is not int or first < 0:
                raise ValueError(f"{self.dense}={json.dumps(first)[:80]} is not a number of layers; correct the file")
            return range(first)
        listed, step = config.get(LISTED) or [], config.get(STEP, 1)
        if not isinstance(listed, list) or any(type(n) is not int for n in listed):
            raise ValueError(f"{LISTED}={json.dumps(listed)[:80]} is not a list of layers' numbers; correct the file")
        if type(step) is not int or step < 1:
            raise ValueError(f"{STEP}={json.dumps(step)[:80]} is not a positive integer; correct the file")
        return {*listed, *(n for n in range(count) if (n + 1) % step)}

    def _window(self, config: Mapping[str, Any]) -> int | None:
        if not self.slide or (self.switched and not config.get("use_sliding_window")):
            return None
        window = config.get("sliding_window", self.window)
        if window is not None and (type(window) is not int or window < 1):
            raise ValueError(f"sliding_window={json.dumps(window)} is not a positive integer; null = no window")
        return window

    def _turning(self, config: Mapping[str, Any], count: int) -> Sequence[Any]:
        every = config.get("no_rope_layer_interval") or 4
        given = config.get("no_rope_layers") if self.rope == "listed" else None
        turning = [(n + 1) % every != 0 for n in range(count)] if given is None else given
        if not isinstance(turning, list) or len(turning) != count:
            raise ValueError(f"no_rope_layers={json.dumps(turning)[:80]} is not a list of {count}")
        return turning

    def _kinds(
        self, config: Mapping[str, Any], count: int, window: int | None, turning: Sequence[Any]
    ) -> Sequence[str]:
        """The type of every layer."""
        kinds = config.get("layer_types")
        if kinds is None:
            return self._default_kinds(config, count, window, turning)
        if not isinstance(kinds, list) or len(kinds) != count:
            raise ValueError(f"layer_types={json.dumps(kinds)[:80]} is not a list of {count}, one for every layer")
        known = {FULL: FULL, "attention": FULL}
        known |= {SLIDING: SLIDING} if self.slide else {}
        known |= {LINEAR: LINEAR} if self.other == LINEAR else {}
        if unknown := [kind for kind in kinds if kind not in known]:
            needs = {"mamba": " (it needs mamba2)", LINEAR: " (it needs a recurrence that is not built)"}.get(
                unknown[0], ""
            )
            raise ValueError(f"layer_types: {unknown[0]} cannot be computed{needs}; only {', '.join(known)} can")
        return [known[kind] for kind in kinds]

    def _default_kinds(
        self, config: Mapping[str, Any], count: int, window: int | None, turning: Sequence[Any]
    ) -> Sequence[str]:
        pattern = config.get("sliding_window_pattern") or config.get("full_attention_interval") or self.full_every
        if isinstance(pattern, str):  # EXAONE: L for a window, G for none, over and over; the last layer sees all
            return [SLIDING if pattern[n % len(pattern)] == "L" and n < count - 1 else FULL for n in range(count)]
        if self.full_every:
            return [FULL if (n + 1) % pattern == 0 else self.other for n in range(count)]
        if self.rope == "listed":
            return [FULL if turns else SLIDING for turns in turning]
        first = config.get("max_window_layers", 28) if self.switched else 0
        return [SLIDING if n >= first else FULL for n in range(count)]

    def _rope(self, config: Mapping[str, Any], slides: bool) -> Rope:
        """As transformers 5 writes it (``rope_parameters``), or earlier releases did (``rope_scaling``), which wins."""
        for key in ("rope_parameters", "rope_scaling"):
            if not isinstance(config.get(key) or {}, dict):
                raise ValueError(f"{key}={json.dumps(config[key])[:80]} is not an object; correct the file")
        parameters, scaling = config.get("rope_parameters") or {}, config.get("rope_scaling") or {}
        if not parameters and not scaling:
            parameters = {key: config.get(key) if value is None else value for key, value in self.scaling.items()}
        apart = self.rope == "by_type" and slides
        if FULL in parameters or SLIDING in parameters:
            parameters = parameters.get(SLIDING if slides else FULL) or {}
        elif apart:
            parameters = {}
        given = {} if apart else dict(scaling)
        given = given or dict(parameters)
        old = config.get(self.local_theta if apart else "rope_theta")
        theta = given.pop("rope_theta", None) or old or parameters.get("rope_theta") or self.thetas[slides]
        fraction = given.pop("partial_rotary_factor", None) or config.get("partial_rotary_factor")
        fraction = fraction or parameters.get("partial_rotary_factor") or self.fraction
        given_here = [(key, config[key]) for key in ("rope_theta", self.local_theta) if config.get(key) is not None]
        for key, value in (*given_here, ("rope_theta", theta), ("partial_rotary_factor", fraction)):
            if type(value) not in (int, float) or not math.isfinite(value) or value <= 0:
                raise ValueError(f"{key}={json.dumps(value)} is not a positive number; correct the file")
        return Rope(float(theta), float(fraction), resolved(given, config))

    def write(self, a: Architecture) -> dict[str, Any]:
        """Keys of ``config.json`` for an architecture's layers."""
        kinds = [LINEAR if layer.delta else FULL if layer.window is None else SLIDING for layer in a.layers]
        window = max((layer.window or 0 for layer in a.layers), default=0) or None
        config: dict[str, Any] = {"num_hidden_layers": len(a.layers), **self._written_ropes(a, kinds)}
        if self.slide:
            config["sliding_window"] = window
        if self.switched and self.rope != "listed":
            config["max_window_layers"] = kinds.index(SLIDING) if window else len(kinds)
        differ = len(set(kinds)) > 1
        if differ if self.mixed else (self.slide and self.layered) or self.full_every or self.other == LINEAR:
            config["layer_types"] = kinds
        if self.switched:
            config["use_sliding_window"] = window is not None
        if self.rope == "named":
            config["position_embedding_type"] = "rope" if any(layer.rope for layer in a.layers) else None
        if self.rope == "listed":
            config["no_rope_layers"] = [int(layer.rope is not None) for layer in a.layers]
        dense = [n for n, layer in enumerate(a.layers) if not layer.sparse]
        if self.dense == LISTED:
            config |= {LISTED: dense, STEP: 1}
        elif self.dense:
            config[self.dense] = next((n for n, layer in enumerate(a.layers) if layer.sparse), len(dense))
        return config

    @property
    def layered(self) -> bool:
        """Whether its ``transformers`` class knows types of layers."""
        return self.switched or self.full_every > 0 or self.rope == "listed"

    def _written_ropes(self, a: Architecture, kinds: Sequence[str]) -> dict[str, Any]:
        ropes = {kind: layer.rope for kind, layer in zip(kinds, a.layers, strict=True) if layer.rope is not None}
        written = {kind: self._written_rope(rope) for kind, rope in ropes.items()}
        if self.rope == "by_type":
            # Of a type that no layer has, too: else the class puts its own there.
            default = {
                kind: {"rope_type": "default", "rope_theta": self.thetas[kind == SLIDING]} for kind in (FULL, SLIDING)
            }
            return {"rope_parameters": {**default, **written}}
        if not ropes:
            return {}
        rope = next(iter(ropes.values()))
        config = {
            "rope_parameters": next(iter(written.values())),
            # Releases before transformers 5 read these two.
            "rope_theta": rope.theta,
            "rope_scaling": dict(rope.scaling) or None,
        }
        if rope.fraction != 1.0 or self.fraction != 1.0:
            config["partial_rotary_factor"] = rope.fraction
        if rope.scaling.get("rope_type") == "longrope":
            # Phi-3's default there wins over what is in the parameters.
            config["original_max_position_embeddings"] = rope.scaling["original_max_position_embeddings"]
        return config

    def _written_rope(self, rope: Rope) -> dict[str, Any]:
        parameters = {"rope_theta": rope.theta, **(rope.scaling or {"rope_type": "default"})}
        return (
            parameters
            if rope.fraction == self.fraction == 1.0
            else {**parameters, "partial_rotary_factor": rope.fraction}
        )


def resolved(given: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """A rotation's scaling with everything in it that ``config.json`` says of it elsewhere; empty = none."""
    scaling = {key: value for key, value in given.items() if value is not None and key not in ("type", "rope_type")}
    kind = given.get("rope_type") or given.get("type") or "default"
    if kind == "su" or (kind == "yarn" and "long_factor" in scaling):  # Phi-3's first names
        kind = "longrope"
    if kind == "default":
        return {}
    scaling = {"rope_type": kind, **scaling}
    longest = config.get("max_position_embeddings", 2048)
    if kind in WITH_ORIGINAL:
        original = config.get("original_max_position_embeddings") or scaling.get("original_max_position_embeddings")
        if original is None and kind != "llama3":
            original = longest
        if original is not None:
            scaling["original_max_position_embeddings"] = original
    if (kind == "yarn" and "factor" in given and "factor" not in scaling) or (
        kind == "longrope" and "factor" not in scaling
    ):
        scaling["factor"] = longest / scaling["original_max_position_embeddings"]
    return scaling
