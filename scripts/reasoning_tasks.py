"""Write small reasoning tasks with one right answer each, as rows for SFT and for GRPO; needs `pip install reasoning-gym`.

    python scripts/reasoning_tasks.py FOLDER [--train 2400] [--held 200] [--seed 0] [--kinds coin_flip,gcd]

`sft_train.jsonl`, `sft_held.jsonl`: prompt, completion, ideal. `tasks_train.jsonl`, `tasks_held.jsonl`: prompt, ideal, kind.
No prompt that is learnt from is held out. A right answer is what the generator itself says, letter for letter.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

KINDS: dict[str, dict[str, Any]] = {
    "coin_flip": {}, "syllogism": {}, "products": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1},
    "gcd": {"min_numbers": 2, "max_numbers": 2, "min_value": 1, "max_value": 10},
    "chain_sum": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1},
    "spell_backward": {"min_word_len": 3, "max_word_len": 3},
}  # fmt: skip
"""Tasks that a model of a hundred million weights can learn, with their settings."""


def main() -> None:
    """Write the four files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where to write; files that are there are refused")
    parser.add_argument("--train", type=int, default=2400, help="tasks to learn from, of SFT and of GRPO each")
    parser.add_argument("--held", type=int, default=200, help="tasks to measure on")
    parser.add_argument("--seed", type=int, default=0, help="of the generators")
    parser.add_argument("--kinds", default=",".join(KINDS), help="tasks by name")
    a = parser.parse_args()
    unknown = [kind for kind in a.kinds.split(",") if kind not in KINDS]
    if unknown:
        sys.exit(f"--kinds={a.kinds}: {', '.join(unknown)} is not known; use {', '.join(KINDS)}")
    names = ("sft_train", "sft_held", "tasks_train", "tasks_held")
    files = [a.folder / f"{name}.jsonl" for name in names]
    if there := [str(file) for file in files if file.exists()]:
        sys.exit(f"{', '.join(there)} is there already; choose another folder")
    a.folder.mkdir(parents=True, exist_ok=True)
    rows = tasks(a.kinds.split(","), a.seed)
    held = [next(rows) for _ in range(a.held)]
    taken = {row["prompt"] for row in held}
    fresh = (row for row in rows if row["prompt"] not in taken)
    train = [next(fresh) for _ in range(2 * a.train)]
    for file, part in zip(files, (train[: a.train], held, train[a.train :], held), strict=True):
        chats = file.name.startswith("sft")
        lines = (json.dumps({**row, "completion": row["ideal"]} if chats else row, ensure_ascii=False) for row in part)
        file.write_text("".join(f"{line}\n" for line in lines))
        print(f"{file}: {len(part):,} rows")


def tasks(kinds: list[str], seed: int) -> Iterator[dict[str, str]]:
    """Tasks of all kinds in turn, endlessly."""
    try:
        import reasoning_gym
    except ImportError:
        sys.exit("reasoning-gym is not installed; pip install reasoning-gym==0.1.25")
    size, turn = 1000, 0
    while True:
        made = [reasoning_gym.create_dataset(kind, size=size, seed=seed + 1000 * turn, **KINDS[kind]) for kind in kinds]
        for n in range(size):
            for kind, dataset in zip(kinds, made, strict=True):
                yield {"prompt": dataset[n]["question"], "ideal": dataset[n]["answer"], "kind": kind}
        turn += 1


if __name__ == "__main__":
    main()
