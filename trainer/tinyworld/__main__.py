"""Write the tasks of tiny world: what SFT, reward modelling, DPO and PPO learn from, with right answers that are known.

    python -m trainer.tinyworld data/tinyworld

    sft_{train,held}.jsonl          prompt, completion, ideal (all right answers), kind (where, what, sum, wish)
    preference_{train,held}.jsonl   prompt, chosen, rejected, differs (what tells them apart)
    prompts_{train,held}.jsonl      prompt, ideal (the answer that the gold reward likes best)

The gold reward is trainer.tinyworld.tasks.gold_reward. No prompt comes twice in all files.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from trainer.config import InputError
from trainer.disk import write_text
from trainer.tinyworld.tasks import SIZES, files


def main() -> None:
    """Write every file, or none where one would be overwritten."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    for kind, (learnt, heldout) in SIZES.items():
        parser.add_argument(
            f"--{kind}", type=int, nargs=2, default=[learnt, heldout], metavar=("TRAIN", "HELD"), help="rows"
        )
    parser.add_argument("--world", type=int, default=0, help="the seed of the world")
    a = parser.parse_args()
    sizes = {kind: tuple(getattr(a, kind)) for kind in SIZES}
    if taken := [
        str(f) for kind in SIZES for part in ("train", "held") if (f := a.folder / f"{kind}_{part}.jsonl").exists()
    ]:
        sys.exit(f"error: {', '.join(taken)} would be overwritten; name another folder")
    a.folder.mkdir(parents=True, exist_ok=True)
    try:
        every = dict(files(a.world, sizes))
    except InputError as error:
        sys.exit(f"error: {error}")
    for name, rows in every.items():
        write_text(a.folder / name, "".join(json.dumps(row) + "\n" for row in rows))
        print(f"{a.folder / name}  {len(rows)} rows")


if __name__ == "__main__":
    main()
