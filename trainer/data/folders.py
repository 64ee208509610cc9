"""Which files of a folder are read: one split, no cards, no metadata. What is not read is said."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from trainer.data.files import TABLES, DataError, kind_of, readable

SPLITS = {
    "train": {"train", "training"},
    "validation": {"validation", "valid", "val", "dev", "eval", "evaluation", "held", "heldout"},
    "test": {"test", "testing"},
}
"""Words in the name of a file or a folder, and the splits that they name."""
METADATA = re.compile(
    r"(readme|license|licence|notice)(\..*)?|(dataset_infos?|state|dataset_dict|croissant)\.json", re.I
)
"""Files that say something about a data set and are none of it."""


class Selection(NamedTuple):
    """Files to read in this order, and sentences about what is not read."""

    files: list[Path]
    notes: list[str]


def split_of(path: Path) -> str | None:
    """The split that a path names: its last part that names exactly one."""
    for part in reversed(path.parts):
        words = set(re.split(r"[^a-z]+", part.lower()))
        if len(named := [split for split, names in SPLITS.items() if words & names]) == 1:
            return named[0]
    return None


def select(folder: Path, *, heldout: bool) -> Selection:
    """What of a folder is learnt from, or with ``heldout`` measured on.

    Raises:
        DataError: if it is what ``datasets`` saved and not all of it is there, or there is no such split.
    """
    if (folder / "dataset_dict.json").is_file():
        splits = _json(folder / "dataset_dict.json").get("splits") or []
        chosen, others = _choose(folder, {split: split_of(Path(str(split))) for split in map(str, splits)}, heldout)
        if len(chosen) > 1:
            raise DataError(
                f"{folder} has the splits {_listed(chosen)}; name one of them, such as {folder / chosen[0]}"
            )
        parts = [select(folder / split, heldout=heldout) for split in chosen]
        notes = [f"the splits {', '.join(others)} of {folder} are not read"] if others else []
        return Selection([f for part in parts for f in part.files], notes + [n for part in parts for n in part.notes])
    if (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file():
        return Selection(_saved(folder), [])
    hidden = {p for p in folder.rglob("*") if any(part.startswith(".") for part in p.relative_to(folder).parts)}
    files = sorted(p for p in folder.rglob("*") if p not in hidden and p.is_file() and readable(p))
    data = [p for p in files if not METADATA.fullmatch(p.name)]
    named = {str(p.relative_to(folder)): split_of(p.relative_to(folder)) for p in data}
    if "train" not in named.values():  # titles of texts may hold such words
        named |= {name: None for name in named if kind_of(Path(name)) not in TABLES}
    chosen, others = _choose(folder, named, heldout)
    notes = [f"{_listed(others)} of {folder} are not read: their names are those of other splits"] if others else []
    cards = [str(p.relative_to(folder)) for p in files if p not in data]
    notes += [f"{_listed(cards)} of {folder} are not read: a card or metadata"] if cards else []
    return Selection([folder / name for name in chosen], notes)


def _choose(folder: Path, named: dict[str, str | None], heldout: bool) -> tuple[list[str], list[str]]:
    """Names to read, and names that are not read."""
    present = set(named.values())
    if not heldout:
        wanted = {"train", None} if present & {"train", None} else present
    elif "validation" in present or "test" in present:
        wanted = {"validation"} if "validation" in present else {"test"}
    elif "train" in present:
        raise DataError(
            f"{folder} has no split to measure on, only {_listed(named)}; name a file or a folder of its own"
        )
    else:
        wanted = {None}
    return [n for n, split in named.items() if split in wanted], [n for n, s in named.items() if s not in wanted]


def _saved(folder: Path) -> list[Path]:
    """The files of a data set that ``save_to_disk`` of ``datasets`` wrote."""
    state = _json(folder / "state.json")
    if state.get("_indices_files") or state.get("_indices_data_files"):
        raise DataError(f"{folder} is a selection of rows; save it again behind flatten_indices()")
    files = [folder / str(entry["filename"]) for entry in state.get("_data_files") or []]
    if missing := [file.name for file in files if not file.is_file()]:
        raise DataError(f"{folder} lacks {_listed(missing)}, which its state.json names; copy it again")
    return files


def _json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{file} is damaged ({error}); copy its folder again") from None
    return value if isinstance(value, dict) else {}


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
