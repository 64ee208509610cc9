"""SentencePiece's normalisation rules as normalizers of the ``tokenizers`` library that give what SentencePiece gives.

SentencePiece replaces the longest string that has a rule, from left to right. `normalizers.Precompiled`, made for the same
rules, goes by what a reader sees as one character: of ``\\r\\n``, or of a letter with several marks, it takes the rule of the
beginning and drops the rest. So such characters are cut up before, and what a rule joins is joined by NFC behind it.
"""

from __future__ import annotations

import unicodedata
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator
from itertools import groupby
from typing import Any

import numpy as np
import tokenizers
from tokenizers import normalizers

APART, CUT = "\U000e0ffe", "\U000e0fff"
"""Unassigned characters that no text has, at which a visible character ends: between what no rule joins, and everywhere."""
JOINING = r"\n\p{M}\p{Cf}\u1100-\u11FF\uA960-\uA97C\uAC00-\uD7FB\uFF9E\uFF9F\x{1F1E6}-\x{1F1FF}\x{1F3FB}-\x{1F3FF}"
"""Characters that may be part of the visible character before them (Unicode Standard Annex 29)."""
INSIDE = r"(?!\A)"
"""Not at the beginning of a text: the library fails at what is put there."""
SYLLABLES = frozenset(map(chr, range(0xAC00, 0xD7A4)))
"""Hangul's."""
Classes = tuple[frozenset[str], ...]


def normalizers_of(blob: bytes) -> list[Any]:
    """The steps for a model's ``precompiled_charsmap``."""
    rules = dict(_rules(blob))
    single = {source: target for source, target in rules.items() if len(source) == 1}
    joined = [
        source
        for source, target in rules.items()
        if len(source) > 1
        and unicodedata.normalize("NFC", "".join(single.get(c, c) for c in source)) == target != source
    ]
    one_by_one = [
        normalizers.Replace(tokenizers.Regex(f"{INSIDE}(?=[{JOINING}])"), CUT),
        normalizers.Precompiled(blob),
        normalizers.Replace(CUT, ""),
    ]
    if not joined:
        return one_by_one
    # NFC joins the letters of a syllable as the rules do, and there are 200,000 of these.
    others = [source for source in joined if rules[source] not in SYLLABLES]
    apart = normalizers.Replace(tokenizers.Regex(_not_joined(others)), APART)
    return [apart, *one_by_one, normalizers.NFC(), normalizers.Replace(APART, "")]


def _not_joined(joined: Iterable[str]) -> str:
    """A pattern for places that are in none of ``joined``, before marks and what else such strings go on with."""
    places: dict[tuple[int, int], set[Classes]] = defaultdict(set)
    later = set[str]()
    for source in joined:
        later.update(source[1:])
        for cut in range(1, len(source)):
            places[len(source), cut].add(tuple(frozenset(c) for c in source))
    inside = [
        f"(?<={''.join(map(_set, classes[:cut]))})(?={''.join(map(_set, classes[cut:]))})"
        for (_, cut), strings in sorted(places.items())
        for classes in sorted(_merged(strings), key=lambda c: [sorted(s) for s in c])
    ]
    marks = rf"{INSIDE}(?=[\p{{M}}{_ranges(later)}])" + (f"(?!{'|'.join(inside)})" if inside else "")
    return rf"{marks}|(?<=[{_ranges(SYLLABLES)}])(?=[\x{{11A8}}-\x{{11C2}}])"  # no rule joins a syllable and a letter


def _merged(strings: set[Classes]) -> set[Classes]:
    """Fewer classes of strings that hold the same strings: those that differ at one place become one."""
    for place in range(len(next(iter(strings)))):
        alike: dict[Classes, set[str]] = defaultdict(set)
        for classes in strings:
            alike[classes[:place] + classes[place + 1 :]] |= classes[place]
        strings = {(*rest[:place], frozenset(own), *rest[place:]) for rest, own in alike.items()}
    return strings


def _set(characters: frozenset[str]) -> str:
    return f"[{_ranges(characters)}]"


def _ranges(characters: Collection[str]) -> str:
    """What stands for ``characters`` in a class of a pattern: their neighbours as one range."""
    codes = sorted(map(ord, characters))
    runs = [[code for _, code in run] for _, run in groupby(enumerate(codes), lambda pair: pair[1] - pair[0])]
    return "".join(f"\\x{{{run[0]:X}}}-\\x{{{run[-1]:X}}}" for run in runs)


def _rules(blob: bytes) -> Iterator[tuple[str, str]]:
    """Every source and target of a map: a double-array trie of the sources, and behind it the targets, ended by zeros.

    A unit of the trie is 32 bits: label, offset of its children, whether one of them is a value (Darts-clone).
    """
    size = int.from_bytes(blob[:4], "little")
    units, targets = np.frombuffer(blob, "<u4", size // 4, 4), blob[4 + size :]
    labels = units & 0x800000FF
    offsets = (units >> 10) << ((units & 0x200) >> 6)
    children: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for unit in np.flatnonzero((labels > 0) & (labels < 256)).tolist():
        children[unit ^ int(labels[unit])].append((int(labels[unit]), unit))
    waiting = [(b"", int(offsets[0]))]
    while waiting:
        source, base = waiting.pop()
        for label, unit in children[base]:
            longer, below = source + bytes([label]), unit ^ int(offsets[unit])
            if units[unit] >> 8 & 1:
                start = int(units[below] & 0x7FFFFFFF)
                yield longer.decode(), targets[start : targets.index(b"\0", start)].decode()
            waiting.append((longer, below))
