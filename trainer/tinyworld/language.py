"""Tiny world: a seeded generator of short stories whose exact probability is known.

Everything that is random in a document is drawn by `Chooser.pick`; reading a document back makes the same choices and adds
up their log-probabilities. So the entropy of the language is known, and a model's loss has a floor to be measured against.
Much of what a story says after its opening follows from what was said before, many tokens back: n-grams cannot know it.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

T = TypeVar("T")

VERSION = "e0fd7733eb3c080163bd1f7e8d538601d09e693e204364b75f68838238420085"
"""Names what the generator writes; prepared data and checkpoints know it by this. Change it with any change of the texts."""

NAMES = ("Ada", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gina", "Hugo", "Ida", "Jack")
PLACES = ("Berlin", "Cairo", "Delhi", "Lima", "Oslo", "Paris", "Rome", "Tokyo")
MOODS = ("angrily", "calmly", "happily", "proudly", "sadly", "shyly")
VERBS = ("builds", "buys", "draws", "finds", "hides", "paints", "sells", "steals")
COLORS = ("black", "blue", "green", "red", "white", "yellow")
THINGS = ("apples", "balls", "books", "coins", "drums", "kites", "lamps", "rings")
DIGITS = tuple(range(10))
CAST = (2, 3)
"""How many characters a story may have; in its opening no two share anything."""
KINDS = {"acts": 8, "counts": 2, "where": 1, "what": 1, "ends": 1}
"""What may come next and how likely: somebody does something, a sum, two questions about the state of things, the end."""
LONGEST = 16
"""A story that has gone on for so many sentences ends."""


@dataclass
class Character:
    """What is true of a character now."""

    name: str
    place: str
    thing: str


@dataclass
class Scene:
    """What a story is about, in order of appearance: all that it names later was named in its opening."""

    friends: list[Character]
    places: list[str]
    moods: list[str]
    colors: list[str]
    things: list[str]


class Chooser(Protocol):
    """Makes the choices of a story: at random, or as a given text has them."""

    def pick(self, options: Sequence[T], spelt: Sequence[str], weights: Sequence[int] | None = None) -> T:
        """One of ``options``, as likely as its weight; ``spelt``: how the text goes on after each."""
        ...

    def write(self, text: str) -> None:
        """Text that follows from what was chosen before."""
        ...


class OutOfLanguageError(ValueError):
    """A text that the generator never writes; the message says where it leaves the language."""


class _Writer:
    def __init__(self, seed: str) -> None:
        self.random, self.text = random.Random(seed), ""

    def pick(self, options: Sequence[T], spelt: Sequence[str], weights: Sequence[int] | None = None) -> T:
        [number] = self.random.choices(range(len(options)), weights)
        self.text += spelt[number]
        return options[number]

    def write(self, text: str) -> None:
        self.text += text


class _Reader:
    """Follows a text; no spelling of a choice is the beginning of another, so there is one way to read it."""

    def __init__(self, text: str) -> None:
        self.text, self.at, self.log_probability = text, 0, 0.0

    def pick(self, options: Sequence[T], spelt: Sequence[str], weights: Sequence[int] | None = None) -> T:
        weights = weights or [1] * len(options)
        for option, words, weight in zip(options, spelt, weights, strict=True):
            if self.text.startswith(words, self.at):
                self.at += len(words)
                self.log_probability += math.log(weight / sum(weights))
                return option
        raise OutOfLanguageError(f"at {self.at}: none of {', '.join(map(repr, spelt))}: {self.text[self.at :][:40]!r}")

    def write(self, text: str) -> None:
        if not self.text.startswith(text, self.at):
            raise OutOfLanguageError(f"at {self.at}: not {text!r}: {self.text[self.at :][:40]!r}")
        self.at += len(text)


class TinyWorld:
    """The language of one ``seed``: document i is always the same text."""

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def document(self, number: int) -> str:
        """The ``number``-th document."""
        writer = _Writer(hashlib.sha256(f"tinyworld:{self.seed}:{number}".encode()).hexdigest())
        _generate(writer)
        return writer.text

    @staticmethod
    def log_probability(text: str) -> float:
        """The exact natural logarithm of the probability of a document.

        Raises:
            OutOfLanguageError: if it has none.
        """
        reader = _Reader(text)
        _generate(reader)
        if reader.at != len(text):
            raise OutOfLanguageError(f"at {reader.at}: the story had ended: {text[reader.at :][:40]!r}")
        return reader.log_probability

    @staticmethod
    def entropy() -> float:
        """The expected -log p of a document, nats.

        The number of options of every choice depends on nothing but the size of the cast, so by the chain rule it is a sum of
        the choices' entropies, each times the probability that the choice comes up.
        """
        likely = {kind: weight / sum(KINDS.values()) for kind, weight in KINDS.items()}
        kind = -sum(p * math.log(p) for p in likely.values())
        sentences = sum((1 - likely["ends"]) ** n for n in range(LONGEST))
        total = math.log(len(CAST))
        for cast in CAST:
            sets = (PLACES, NAMES, MOODS, VERBS, COLORS, THINGS)
            opening = sum(math.log(len(options) - n) for n in range(cast) for options in sets)
            subject = (1 - likely["ends"]) * math.log(cast)
            acting = likely["acts"] * (4 * math.log(cast) + math.log(len(VERBS)))
            counting = likely["counts"] * 2 * math.log(len(DIGITS))
            total += (opening + sentences * (kind + subject + acting + counting)) / len(CAST)
        return total


def _generate(story: Chooser) -> None:
    cast = story.pick(CAST, ["Two friends.", "Three friends."])
    scene, verbs = Scene([], [], [], [], []), list[str]()
    for _ in range(cast):
        place = _new(story, PLACES, scene.places, " In {}")
        name = _new(story, NAMES, [f.name for f in scene.friends], " {}")
        _new(story, MOODS, scene.moods, " {}")
        _new(story, VERBS, verbs, " {}")
        _new(story, COLORS, scene.colors, " {}")
        thing = _new(story, THINGS, scene.things, " {}.")
        scene.friends.append(Character(name, place, thing))
    for _ in range(LONGEST):
        starts = [" Then", " Sum:", " Where is", " What has", " The end."]
        kind = story.pick(list(KINDS), starts, list(KINDS.values()))
        if kind == "ends":
            return
        _sentence(story, kind, scene)
    story.write(" The end.")


def _new(story: Chooser, options: Sequence[str], taken: list[str], form: str) -> str:
    """One of ``options`` that is not ``taken``; it is from now on."""
    free = [option for option in options if option not in taken]
    taken.append(story.pick(free, [form.format(option) for option in free]))
    return taken[-1]


def _sentence(story: Chooser, kind: str, scene: Scene) -> None:
    """The rest of one sentence, after its kind."""
    friend = story.pick(scene.friends, [f" {f.name}" for f in scene.friends])
    if kind == "acts":
        story.pick(scene.moods, [f" {m}" for m in scene.moods])
        story.pick(VERBS, [f" {v}" for v in VERBS])
        story.pick(scene.colors, [f" {c}" for c in scene.colors])
        friend.thing = story.pick(scene.things, [f" {t}" for t in scene.things])
        friend.place = story.pick(scene.places, [f" in {p}." for p in scene.places])
    elif kind == "where":
        story.write(f"? In {friend.place}.")
    elif kind == "what":
        story.write(f"? The {friend.thing}.")
    else:
        a = story.pick(DIGITS, [f" counts {n} +" for n in DIGITS])
        b = story.pick(DIGITS, [f" {n} =" for n in DIGITS])
        story.write(f" {a + b}.")
