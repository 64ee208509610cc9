"""Image-text models of whose folders the text part is read: where it stands in ``config.json``, and its tensors' names."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any

OUTER = ("tie_word_embeddings", "quantization_config")
"""Keys that hold for the text part, too, where they stand beside it."""
NESTED = ("language_model.model.", "model.language_model.", "language_model.")
"""What the names of the text part's tensors begin with in such folders, by release of ``transformers``."""
HEADS = ("lm_head.weight", "language_model.lm_head.weight")


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The configuration of a model that reads text: that of the text part, where there are others."""
    part = config.get("text_config")
    if not isinstance(part, Mapping):
        return config
    return {**part, **{key: config[key] for key in OUTER if config.get(key) is not None}}


def text_names(names: Collection[str]) -> dict[str, str]:
    """The stored name of each tensor by the one that a model that reads text has for it.

    Of an image-text model what is no text's is left out. Tensors that were saved without a head's model around them, as
    ``embed_tokens.weight``, are given ``model.``.
    """
    begin = next((p for p in ("model.", *NESTED, "") if f"{p}embed_tokens.weight" in names), "model.")
    if begin == "model.":
        return {name: name for name in names}
    text = {f"model.{name.removeprefix(begin)}": name for name in names if name.startswith(begin) and name not in HEADS}
    head = [name for name in HEADS if name in names]
    return {**text, HEADS[0]: head[0]} if head else text


def left_out(stored: Collection[str], used: Collection[str]) -> str | None:
    """One sentence for the tensors of other parts that are not read; None where all are."""
    parts = Counter(name.removeprefix("model.").partition(".")[0] for name in set(stored) - set(used))
    if not parts:
        return None
    listed = ", ".join(f"{part} {count}" for part, count in sorted(parts.items()))
    return f"only the text part is read: {sum(parts.values())} tensors of other parts are left out ({listed})"
