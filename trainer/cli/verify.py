"""Verify the checkpoints of a run: every file's size and digest.

    onecurve verify runs/pretrain

Exit code 0: all are intact; 1: at least one is damaged.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from trainer.checkpoint.folder import MANIFEST, folder_name, read_manifest, steps_in, verify
from trainer.cli.parsing import parser_of


def main(arguments: Sequence[str]) -> int:
    """Verify what the command line names: 0 if all is intact, 1 if something is damaged, 2 if there is no checkpoint."""
    parser = parser_of("verify", __doc__)
    parser.add_argument("folder", type=Path, help="a run, its checkpoints folder, or one checkpoint")
    folder = parser.parse_args(arguments).folder
    checkpoints = checkpoints_of(folder)
    if not checkpoints:
        parser.error(f"{folder} holds no checkpoint; give a run, its checkpoints folder, or one checkpoint")
    damaged = False
    for checkpoint in checkpoints:
        if problems := verify(checkpoint):
            damaged = True
            print("\n".join([f"{checkpoint.name}: DAMAGED", *(f"  {problem}" for problem in problems)]))
        else:
            manifest = read_manifest(checkpoint)
            size = sum(f["bytes"] for f in manifest.files.values())
            by = f"written by {manifest.ranks} rank{'s' if manifest.ranks > 1 else ''}"
            print(f"{checkpoint.name}: intact, {len(manifest.shapes)} tensors, {size / 1e6:.1f} MB, {by}")
    return int(damaged)


def checkpoints_of(folder: Path) -> list[Path]:
    """The checkpoints in a run, in a checkpoints folder, or the one that ``folder`` is; newest first."""
    if (folder / MANIFEST).exists() or folder.name.startswith("step-"):
        return [folder] if folder.is_dir() else []
    inner = folder / "checkpoints" if (folder / "checkpoints").is_dir() else folder
    return [inner / folder_name(step) for step in steps_in(inner)]
