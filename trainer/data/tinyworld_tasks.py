"""Tasks in tiny world whose right answers are known: for now pairs of sentences of which one breaks what was asked for."""

from __future__ import annotations

import random
from typing import NamedTuple

from trainer.data.tinyworld import COLORS, DEEDS, MOODS, NAMES, PLACES, THINGS

ASKED = {"name": NAMES, "mood": MOODS, "color": COLORS, "thing": THINGS, "place": PLACES}
"""What a prompt asks for; the deed is left to the answer."""


class Preference(NamedTuple):
    """Two answers to a prompt: ``rejected`` differs from ``chosen`` in the deed, which is free, and in what it ``breaks``."""

    prompt: str
    chosen: str
    rejected: str
    breaks: str


def preference(seed: int, number: int) -> Preference:
    """The ``number``-th pair of the world ``seed``: always the same one.

    The prompt opens a story of two friends and asks for a sentence with five of its words, any deed. Both answers take all
    words from the story, so what is wrong with the rejected one is only that the prompt asked for another.
    """
    draw = random.Random(f"tinyworld-preference:{seed}:{number}")
    pairs = {kind: draw.sample(words, 2) for kind, words in ASKED.items()}
    friends = [{kind: pair[n] for kind, pair in pairs.items()} for n in range(2)]
    story = " ".join(
        f"In {f['place']} {f['name']} {f['mood']} {draw.choice(DEEDS)} {f['color']} {f['thing']}." for f in friends
    )
    asked = {kind: draw.choice(pair) for kind, pair in pairs.items()}
    breaks = draw.choice(list(ASKED))
    wrong = {**asked, breaks: next(word for word in pairs[breaks] if word != asked[breaks])}
    wish = f"Then {asked['name']}, {asked['mood']}, {asked['color']} {asked['thing']}, in {asked['place']}."
    return Preference(f"Two friends. {story} {wish}", _said(asked, draw), _said(wrong, draw), breaks)


def _said(words: dict[str, str], draw: random.Random) -> str:
    w = words
    return f"Then {w['name']} {w['mood']} {draw.choice(DEEDS)} {w['color']} {w['thing']} in {w['place']}."
