"""Folders of weights in few bits as the base of training: what is frozen may be rounded, what is trained may not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from trainer.models.adapter import Adapter
from trainer.models.hf_format import FormatError, WeightFiles
from trainer.models.lora import matches


def validate_base(
    path: str, adapter: Adapter, setting: str = "model.path", remedy: str = "use adapter=qlora or adapter=lora"
) -> Iterator[str]:
    """One sentence for weights that an adapter would train and that a folder stores in few bits.

    ``setting``: names the folder. ``remedy``: what to do instead.
    """
    try:
        stored = WeightFiles(Path(path)).quantized
    except FormatError:
        return  # whoever reads the folder says it
    labels = {name.removesuffix(".weight"): weight.packing.label for name, weight in stored.items()}
    if labels and not adapter.freezes_model:
        kind, count = Counter(labels.values()).most_common(1)[0]
        yield (
            f"{setting}={path}: {count} weights are stored as {kind}, and rounded weights are not trained further; "
            f"{remedy}, or the folder of plain weights that it was made from"
        )
    elif labels and adapter.merges_onto_original:
        yield (
            f"adapter.merge_onto=original: {setting}={path} has {next(iter(labels.values()))} weights and no original ones; "
            "use adapter.merge_onto=trained"
        )
    elif full := [name for name in labels if matches(name, getattr(adapter, "full", []))]:
        yield (
            f"adapter.full: {full[0]} of {path} is stored as {labels[full[0]]}, and rounded weights are not trained "
            "further; leave it out, and name it in adapter.targets"
        )


def remarks(files: WeightFiles, *, packs: bool) -> Iterator[str]:
    """A sentence for tensors that are not read, and for those that are not read as they are stored.

    ``packs``: whether they are packed in NF4 then.
    """
    if files.left_out is not None:
        yield files.left_out
    for kind, count in Counter(weight.packing.label for weight in files.quantized.values()).items():
        again = ", then rounded once more to NF4, which adapter=lora does not" if packs and "nf4" not in kind else ""
        yield f"{count} of {len(files.files)} weights are stored as {kind} and read as numbers{again}"
