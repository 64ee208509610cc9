"""What of a folder is a model that reads text: where an image-text model has it, and what predicts tokens further ahead."""

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


def ahead(names: Collection[str], config: Mapping[str, Any]) -> set[str]:
    """The tensors of layers behind the model's last one, which predict tokens further ahead (arXiv:2412.19437, 2.2)."""
    first, more = config.get("num_hidden_layers"), config.get("num_nextn_predict_layers")
    if type(first) is not int or type(more) is not int:
        return set()
    numbers = {name: name.removeprefix("model.layers.").partition(".")[0] for name in names}
    return {name for name, n in numbers.items() if n.isdecimal() and first <= int(n) < first + more}


def left_out(stored: Collection[str], used: Collection[str], predicting: Collection[str] = ()) -> str | None:
    """One sentence for the tensors that are not read, those ``predicting`` further ahead among them; None where all are."""
    parts = Counter(name.removeprefix("model.").partition(".")[0] for name in {*stored} - {*used} - {*predicting})
    listed = ", ".join(f"{part} {count}" for part, count in sorted(parts.items()))
    sentences = [f"only the text part is read: {parts.total()} tensors of other parts are left out ({listed})"] * bool(
        parts
    )
    if predicting:
        sentences.append(f"{len(predicting)} tensors of layers that predict tokens further ahead are left out")
    return "; ".join(sentences) or None
