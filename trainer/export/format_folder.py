"""A folder in another format, made of a finished one: whole or not at all, with its lineage and what it cost."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from trainer.disk import new_folder, read_json, write_text
from trainer.export.cost import Heldout, measured, room_problem, size_of
from trainer.export.cost_table import table_lines
from trainer.export.formats import FORMATS, Calibration
from trainer.export.lineage import RECORD, ancestry, environment_facts, move_aside
from trainer.models.header import read_shape
from trainer.models.hf_format import WeightFiles
from trainer.models.sizes import parameters_of

log = logging.getLogger(__name__)

INHERITED = ("step", "identity", "config", "reward", "license")
"""What the record of a folder in another format has of its source's: scores are normalised by ``reward``."""
SAME = ("format", "parents", "calibration", "step", "identity")
"""What is equal in the record of a folder that holds what is to be written already."""

NO_ROWS = "there are no held-out rows (data.eval, --data), or export.cost_tokens is 0"


def facts_of(source: Path, name: str, calibration: Calibration) -> dict[str, Any]:
    """The record of a format: what it was made of and how; ``source``: the Hugging Face folder."""
    before, lineage = read_json(source / RECORD), ancestry({"source": (str(source), str(source))})
    parents = lineage["parents"] or {"source": WeightFiles(source).fingerprint()}
    facts = {key: before[key] for key in INHERITED if key in before}
    return {
        **facts, **environment_facts(1), **lineage, "parents": parents, "format": name,
        "calibration": digest_of(calibration) if FORMATS[name].calibrated else None,
    }  # fmt: skip


def digest_of(rows: Calibration) -> dict[str, Any]:
    """How many rows and tokens there are, and a digest of them."""
    text = json.dumps([list(row) for row in rows]).encode()
    return {"rows": len(rows), "tokens": sum(map(len, rows)), "digest": hashlib.sha256(text).hexdigest()[:24]}


def write_format(name: str, source: Path, out: Path, calibration: Calibration) -> list[str]:
    """Make the folder ``out`` of ``source``; it appears when all of it is on the disk. Gives what is to be said about it.

    Raises:
        FileExistsError: nothing is overwritten.
    """
    if out.exists():
        raise FileExistsError(f"{out} exists already; move it away first")
    with new_folder(out) as folder:  # files may be called after it
        remarks = FORMATS[name].write(source, folder, calibration)
        facts = {**facts_of(source, name, calibration), "remarks": remarks}
        write_text(folder / RECORD, json.dumps(facts, indent=2) + "\n")
    return remarks


def write_formats(
    source: Path,
    outs: Mapping[str, Path],
    calibration: Calibration,
    heldout: Heldout | None,
    say: Callable[[Sequence[str]], None],
) -> None:
    """Write ``source`` in every format of ``outs`` and measure what each cost; says both.

    ``outs``: the folder of each format. One that holds it already stays; another that is there is moved aside.
    ``heldout``: what is measured on; None = the size on disk alone is said.
    """
    for name, out in outs.items():
        if out.exists() and holds(out, facts_of(source, name, calibration)):
            log.info("%s holds this model already", out)
            continue
        if out.exists():
            move_aside(out, read_json(source / RECORD).get("step", 0))
        say([f"{out}: writing {name}"])
        started = time.monotonic()
        remarks = write_format(name, source, out, calibration)
        say([f"{out}: written in {time.monotonic() - started:.0f} s", *(f"{out}: {remark}" for remark in remarks)])
    add_costs(source, outs, heldout, say)


def holds(out: Path, facts: Mapping[str, Any]) -> bool:
    """Whether a folder is in this format, of this model, calibrated on these rows."""
    before = read_json(out / RECORD)
    return all(before.get(key) == facts.get(key) for key in SAME)


def add_costs(
    source: Path, outs: Mapping[str, Path], heldout: Heldout | None, say: Callable[[Sequence[str]], None]
) -> None:
    """Write into the record of every format what it cost, unless it has that of these rows; say all of them as a table."""
    records = {name: read_json(out / RECORD) for name, out in outs.items()}
    problem = NO_ROWS if heldout is None else room_problem(read_shape(source))
    heldout = None if problem else heldout
    digest = None if heldout is None else heldout.digest
    missing = {n: out for n, out in outs.items() if records[n].get("cost", {}).get("measured_on", "") != digest}
    if missing:
        say(
            [
                f"only sizes are measured: {problem}"
                if heldout is None
                else f"measuring what {', '.join(missing)} cost on {heldout.described}"
            ]
        )
    models = {name: (out, FORMATS[name].open) for name, out in missing.items()}
    for name, cost in measured(source, models, heldout):
        records[name]["cost"] = {**sizes(source, outs[name]), **cost, "measured_on": digest}
        write_text(outs[name] / RECORD, json.dumps(records[name], indent=2) + "\n")
    say(table_lines({name: record["cost"] for name, record in records.items()}))


def sizes(source: Path, out: Path) -> dict[str, float]:
    """Bytes of the weights' files before and now, and bits for each weight of the model."""
    weights = parameters_of(read_shape(source))
    before, now = size_of(source), size_of(out)
    bits = {"bits_per_weight": 8 * now / weights, "original_bits_per_weight": 8 * before / weights}
    return {"size": now, "original_size": before, **bits}
