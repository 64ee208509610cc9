"""Split JSON lines into those to learn from and those to hold out, so that near-equal prompts stay on one side.

    python scripts/split_preferences.py pairs.jsonl train.jsonl held.jsonl --held 500

Two prompts are near-equal if they share at least half of the words that either has (Jaccard index), names and numbers
included; chains of such prompts are one cluster. A model that remembers a prompt then gains nothing on its twin.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
from collections import Counter, defaultdict
from pathlib import Path


def main() -> None:
    """Cluster, shuffle, split."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path)
    parser.add_argument("train", type=Path)
    parser.add_argument("held", type=Path)
    parser.add_argument("--held", dest="count", type=int, default=500, help="rows to hold out at least")
    parser.add_argument("--alike", type=float, default=0.5, help="part of the words that near-equal prompts share")
    parser.add_argument("--seed", type=int, default=0)
    a = parser.parse_args()
    if taken := [str(file) for file in (a.train, a.held) if file.exists()]:
        sys.exit(f"error: {' and '.join(taken)} would be overwritten; move it away first")
    lines = a.rows.read_text().splitlines()
    found = clusters([words(json.loads(line)) for line in lines], a.alike)
    random.Random(a.seed).shuffle(found)
    held = set[int]()
    while found and len(held) < a.count:
        held |= set(found.pop())
    a.train.write_text("".join(f"{line}\n" for n, line in enumerate(lines) if n not in held))
    a.held.write_text("".join(f"{line}\n" for n, line in enumerate(lines) if n in held))
    print(f"{len(lines) - len(held)} rows to learn from, {len(held)} held out")


def words(row: dict[str, object]) -> frozenset[str]:
    """The words of a row's prompt."""
    prompt = row.get("prompt")
    text = prompt if isinstance(prompt, str) else " ".join(str(m["content"]) for m in prompt)  # type: ignore[attr-defined]
    return frozenset(re.findall(r"\w+", text.lower()))


def clusters(prompts: list[frozenset[str]], alike: float) -> list[list[int]]:
    """Numbers of prompts that hang together, by the first of each."""
    leader = list(range(len(prompts)))

    def lead(n: int) -> int:
        while leader[n] != n:
            leader[n] = leader[leader[n]]
            n = leader[n]
        return n

    holders: dict[str, list[int]] = defaultdict(list)
    for n, prompt in enumerate(prompts):
        shared = Counter(other for word in prompt for other in holders[word])
        for other, count in shared.items():
            if count >= alike * (len(prompt) + len(prompts[other]) - count):
                leader[lead(n)] = lead(other)
        for word in prompt:
            holders[word].append(n)
    groups: dict[int, list[int]] = defaultdict(list)
    for n in range(len(prompts)):
        groups[lead(n)].append(n)
    return list(groups.values())


if __name__ == "__main__":
    main()
