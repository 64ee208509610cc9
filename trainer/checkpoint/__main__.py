"""``python -m trainer.checkpoint verify DIR``: say which checkpoints are whole, and what is wrong with the others."""

from __future__ import annotations

import sys
from pathlib import Path

from trainer.checkpoint.folder import MANIFEST, folder_name, read_manifest, steps_in, verify

USAGE = "usage: python -m trainer.checkpoint verify DIR   (a run, its checkpoints folder, or one checkpoint)"


def main(arguments: list[str]) -> int:
    """Verify what ``arguments`` name; 0 if all is whole, 1 if something is damaged, 2 if there is nothing to verify."""
    if len(arguments) != 2 or arguments[0] != "verify":
        print(USAGE, file=sys.stderr)
        return 2
    folder = Path(arguments[1])
    found = checkpoints_of(folder)
    if not found:
        print(f"{folder} holds no checkpoint\n{USAGE}", file=sys.stderr)
        return 2
    problems = 0
    for checkpoint in found:
        wrong = verify(checkpoint)
        problems += len(wrong)
        if wrong:
            print(f"{checkpoint.name}: DAMAGED")
            print("\n".join(f"  {problem}" for problem in wrong))
        else:
            manifest = read_manifest(checkpoint)
            size = sum(f["bytes"] for f in manifest.files.values())
            by = f"written by {manifest.ranks} rank{'s' if manifest.ranks > 1 else ''}"
            print(f"{checkpoint.name}: whole, {len(manifest.shapes)} tensors, {size / 1e6:.1f} MB, {by}")
    return 1 if problems else 0


def checkpoints_of(folder: Path) -> list[Path]:
    """The checkpoints in a run, in a checkpoints folder, or the one that ``folder`` is; newest first."""
    if (folder / MANIFEST).exists() or folder.name.startswith("step-"):
        return [folder] if folder.is_dir() else []
    inner = folder / "checkpoints" if (folder / "checkpoints").is_dir() else folder
    return [inner / folder_name(step) for step in steps_in(inner)]


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
