"""Splits of a data set that keep near-equal prompts on one side: who remembers a prompt gains nothing on its twin."""

from __future__ import annotations

import math
import random
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from trainer.config import InputError

WORDS = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W\u3040-\u30ff\u3400-\u9fff]+")
"""Words, and single characters of scripts that write none."""
PROMPTS = ("prompt", "messages", "conversations", "question", "chosen", "text")
"""Columns that hold what is asked, the first that a row has; the answer's words would tell twins apart."""


def prompt_text(row: Mapping[str, Any], column: str | None = None) -> str:
    """What a row asks: the text of ``column``, else of the usual one, or what the user says in its messages."""
    if column is None and row.get("instruction"):
        return f"{row['instruction']} {row.get('input') or ''}"
    name = column or next((name for name in PROMPTS if row.get(name)), None)
    if name is None or not row.get(name):
        raise InputError(
            f"a row has no {column or 'column that is known to ask'}; name one of {', '.join(row)} by --column"
        )
    value = row[name]
    if not isinstance(value, list):
        return str(value)
    turns = [turn for turn in value if isinstance(turn, Mapping)]
    asked = [turn for turn in turns if (turn.get("role") or turn.get("from")) in ("user", "human")]
    return " ".join(str(turn.get("content") or turn.get("value") or "") for turn in asked or turns)


def split(prompts: Sequence[str], count: int, alike: float, seed: int) -> set[int]:
    """Numbers of at least ``count`` prompts to hold out, none of which is near-equal to one that is not among them.

    ``alike``: the part of the words of two prompts that near-equal ones share (Jaccard index).

    Raises:
        InputError: if too few can be held out; the largest cluster is always learnt from.
    """
    groups = clusters([frozenset(WORDS.findall(prompt.lower())) for prompt in prompts], alike)
    random.Random(seed).shuffle(groups)
    largest = max(groups, key=len, default=[])
    heldout = set[int]()
    for group in groups:
        if len(heldout) < count and group is not largest:
            heldout |= set(group)
    if not 0 < count <= len(heldout) < len(prompts):
        rest = len(prompts) - len(largest)
        raise InputError(
            f"{count} of {len(prompts):,} rows cannot be held out with all prompts near-equal to theirs: {len(largest):,} "
            f"hang together, which leaves {rest:,}; ask for fewer, or for a larger --alike than {alike:g}"
        )
    return heldout


def clusters(prompts: Sequence[frozenset[str]], alike: float) -> list[list[int]]:
    """Numbers of prompts that hang together, by the first of each.

    Only prompts that share one of their rarest words can be near-equal (the prefix filter of Chaudhuri et al. 2006, "A
    Primitive Operator for Similarity Joins"), so few pairs are compared and none is missed.
    """
    leader = list(range(len(prompts)))

    def lead(n: int) -> int:
        while leader[n] != n:
            leader[n] = leader[leader[n]]
            n = leader[n]
        return n

    frequency = Counter(word for prompt in prompts for word in prompt)
    holders: dict[str, list[int]] = defaultdict(list)
    for n, prompt in enumerate(prompts):
        rarest_first = sorted(prompt, key=lambda word: (frequency[word], word))
        prefix = rarest_first[: len(prompt) - math.ceil(alike * len(prompt)) + 1]
        for other in {other for word in prefix for other in holders[word]}:
            if lead(n) != lead(other) and len(prompt & prompts[other]) >= alike * len(prompt | prompts[other]):
                leader[lead(n)] = lead(other)
        for word in prefix:
            holders[word].append(n)
    groups: dict[int, list[int]] = defaultdict(list)
    for n in range(len(prompts)):
        groups[lead(n)].append(n)
    return list(groups.values())
