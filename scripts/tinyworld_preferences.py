"""Write preferences of tiny world: which of two sentences does what the prompt asks.

    python scripts/tinyworld_preferences.py train.jsonl held.jsonl --rows 4000 --held 300

The rejected sentence breaks exactly one of five things that were asked for, named in the column "breaks"; everything else,
the free deed too, tells the answers apart only by chance. No prompt to learn from is held out.
"""

from __future__ import annotations

import argparse
import json
import sys
from itertools import count, islice
from pathlib import Path

from trainer.data.tinyworld_tasks import Preference, preference


def main() -> None:
    """Draw pairs, each prompt once."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("train", type=Path)
    parser.add_argument("held", type=Path)
    parser.add_argument("--rows", type=int, default=4000, help="pairs to learn from")
    parser.add_argument("--held", dest="heldout", type=int, default=300, help="pairs to hold out")
    parser.add_argument("--world", type=int, default=0, help="the seed of the world")
    a = parser.parse_args()
    if taken := [str(file) for file in (a.train, a.held) if file.exists()]:
        sys.exit(f"error: {' and '.join(taken)} would be overwritten; move it away first")
    unique: dict[str, Preference] = {}
    for found in (preference(a.world, n) for n in count()):
        unique.setdefault(found.prompt, found)
        if len(unique) == a.rows + a.heldout:
            break
    pairs = iter(unique.values())
    for file, rows in ((a.held, a.heldout), (a.train, a.rows)):
        file.write_text("".join(json.dumps(pair._asdict()) + "\n" for pair in islice(pairs, rows)))
    print(f"{a.rows} pairs to learn from, {a.heldout} held out")


if __name__ == "__main__":
    main()
