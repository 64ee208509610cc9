"""Which files of a folder are read: one split, no cards, no metadata. What is not read is said."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
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
SHARD = re.compile(r"(\d{3,})-of-(\d{3,})")
"""In the name of a file: its number among so many."""


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
        DataError: if it is what ``datasets`` saved and not all of it is there, a link in it leads nowhere, or there is no
            such split.
    """
    if (folder / "dataset_dict.json").is_file():
        splits = _named(folder / "dataset_dict.json", "splits")
        split, notes = one_split(f"{folder}", splits, "/", heldout=heldout)
        if not (folder / split).is_dir():
            raise DataError(f"{folder} lacks {split}, which its dataset_dict.json names; copy it again")
        part = select(folder / split, heldout=heldout)
        return Selection(part.files, notes + part.notes)
    if (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file():
        return Selection(_saved(folder), [])
    hidden = {p for p in folder.rglob("*") if any(part.startswith(".") for part in p.relative_to(folder).parts)}
    paths = [p for p in folder.rglob("*") if p not in hidden and readable(p)]
    if gone := sorted(str(p.relative_to(folder)) for p in paths if p.is_symlink() and not p.exists()):
        raise DataError(f"{folder}: {_listed(gone)} link to files that are gone; download it again")
    files = sorted(p for p in paths if p.is_file())
    data = [p for p in files if not METADATA.fullmatch(p.name)]
    named = {str(p.relative_to(folder)): split_of(p.relative_to(folder)) for p in data}
    if "train" not in named.values():  # titles of texts may hold such words
        named |= {name: None for name in named if kind_of(Path(name)) not in TABLES}
    chosen, others = _choose(folder, named, heldout)
    notes = [f"{_listed(others)} of {folder} are not read: their names are those of other splits"] if others else []
    notes += [f"only {there} are in {folder}; is all of it downloaded?" for there in _incomplete(chosen)]
    cards = [str(p.relative_to(folder)) for p in files if p not in data]
    notes += [f"{_listed(cards)} of {folder} are not read: a card or metadata"] if cards else []
    return Selection([folder / name for name in chosen], notes)


def one_split(where: str, splits: Iterable[str], joined: str, *, heldout: bool) -> tuple[str, list[str]]:
    """The one of ``splits`` that is learnt from, or with ``heldout`` measured on, and a sentence about the others.

    ``joined``: what stands between ``where`` and a split that is named.

    Raises:
        DataError: if there is none, or more than one.
    """
    chosen, others = _choose(where, {split: split_of(Path(split)) for split in splits}, heldout)
    if not chosen:
        raise DataError(f"{where} has no split; get it again")
    if len(chosen) > 1:
        raise DataError(
            f"{where} has the splits {_listed(chosen)}; name one of them, such as {where}{joined}{chosen[0]}"
        )
    return chosen[0], [f"the splits {', '.join(others)} of {where} are not read"] if others else []


def _choose(folder: Path | str, named: dict[str, str | None], heldout: bool) -> tuple[list[str], list[str]]:
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


def _incomplete(names: Iterable[str]) -> Iterator[str]:
    """Of every set of shards (3 of 7) that is not complete: what is there."""
    sets = Counter((name[: match.start(1)], match[2]) for name in names if (match := SHARD.search(name)))
    for (start, count), there in sets.items():
        if there < int(count):
            yield f"{there} of the {int(count):,} files {start}*-of-{count}"


def _saved(folder: Path) -> list[Path]:
    """The files of a data set that ``save_to_disk`` of ``datasets`` wrote."""
    state = folder / "state.json"
    facts = _json(state)
    if facts.get("_indices_files") or facts.get("_indices_data_files"):
        raise DataError(f"{folder} is a selection of rows; save it again behind flatten_indices()")
    names = _named(state, "_data_files", "filename")
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise DataError(f"{folder} lacks {_listed(missing)}, which its state.json names; copy it again")
    return [folder / name for name in names]


def _named(file: Path, key: str, within: str | None = None) -> list[str]:
    """Names of files or folders beside ``file``, which it lists under ``key``: texts, or objects that have one ``within``.

    Raises:
        DataError: if it lists none, or something else.
    """
    entries = _json(file).get(key)
    listed = entries if isinstance(entries, list) else []
    names = [entry.get(within) if within and isinstance(entry, dict) else entry for entry in listed]
    if not names or any(not isinstance(name, str) or Path(name).name != name or name[:1] == "." for name in names):
        raise DataError(f"{file} is damaged (under {key} it names nothing that lies beside it); copy its folder again")
    return [str(name) for name in names]


def _json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{file} is damaged ({error}); copy its folder again") from None
    return value if isinstance(value, dict) else {}


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
