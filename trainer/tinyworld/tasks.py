"""Tasks in tiny world whose right answers are known: questions, wishes, preferences, and the gold reward of an answer.

A *question* asks what is true at the end of a short story, and has one right answer. A *wish* asks for a sentence with five
words and leaves the deed to the answer: what is learnt from draws it from all deeds alike, and the gold reward likes some
better than others. So an answer is right or wrong, and beyond that better or worse, and both are known exactly: who answers
rightly and has no taste reaches `NEUTRAL`; the optimum is 1.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Callable, Iterator, Mapping
from itertools import count, islice
from operator import itemgetter
from typing import Any, NamedTuple

from trainer.tinyworld.language import COLORS, DEEDS, DIGITS, MOODS, NAMES, PLACES, THINGS

Row = dict[str, Any]

ASKED = {"name": NAMES, "mood": MOODS, "color": COLORS, "thing": THINGS, "place": PLACES}
"""What a wish asks for; the deed is left to the answer."""
WORTH = {
    "steals": 0.1,
    "hides": 0.2,
    "sells": 0.3,
    "buys": 0.4,
    "finds": 0.5,
    "draws": 0.6,
    "builds": 0.8,
    "paints": 1.0,
}
"""How much a right answer is worth, by its deed."""
NEUTRAL = sum(WORTH.values()) / len(WORTH)
"""What right answers are worth on average when every deed is as likely: 0.4875."""
QUESTIONS = ("where", "what", "sum")
KINDS = {"where": 2, "what": 2, "sum": 3, "wish": 3}
"""Shares of the kinds of instruction."""
DIFFERS = {"deed": 37, "missing": 55, "other": 3, "form": 5}
"""Per cent of the preferences by what tells the two answers apart: `Preference`."""
ACTS = 3
"""At most so many sentences come between the opening of a story and a question about it."""
WISHES = math.prod(len(words) for words in ASKED.values())
HELDOUT = 1 << 40
"""Held-out rows are counted from here."""
SIZES = {"sft": (8000, 400), "preference": (12000, 400), "prompts": (4000, 256)}
"""Rows to learn from and rows held out, by kind of data."""


class Wish(NamedTuple):
    """The words that a sentence is to have."""

    name: str
    mood: str
    color: str
    thing: str
    place: str

    @property
    def asked(self) -> str:
        """The wish as a prompt puts it."""
        return f"Then {self.name}, {self.mood}, {self.color} {self.thing}, in {self.place}."

    def said(self, deed: str) -> str:
        """The sentence that fulfils it."""
        return f"Then {self.name} {self.mood} {deed} {self.color} {self.thing} in {self.place}."

    @classmethod
    def read(cls, prompt: str) -> Wish:
        """The last wish of a prompt, whatever a template wrote around it.

        Raises:
            ValueError: if there is none.
        """
        found = re.findall(r"Then (\w+), (\w+), (\w+) (\w+), in (\w+)\.", prompt)
        if not found:
            raise ValueError(
                f"there is no wish of tiny world in {prompt!r}; give prompts of scripts/tinyworld_tasks.py"
            )
        return cls(*found[-1])


class Preference(NamedTuple):
    """Two answers to a wish. ``chosen`` is right; ``differs`` says how ``rejected`` is worse.

    ``deed``: right too, with a deed that is worth less. ``missing``: it lacks the word that the wish ``breaks`` names.
    ``other``: it has another one there. ``form``: it goes on after its end. Its deed is drawn apart, so it may be
    the better one.
    """

    prompt: str
    chosen: str
    rejected: str
    differs: str
    breaks: str | None = None


def gold(prompt: str, completion: str) -> float:
    """What an answer to a wish is worth: 0 if it is not just the sentence that was asked for, else the worth of its deed."""
    wish, said = Wish.read(prompt), completion.strip()
    return next((worth for deed, worth in WORTH.items() if said == wish.said(deed)), 0.0)


def gold_reward(prompts: list[str], completions: list[str], rows: list[dict[str, Any]]) -> list[float]:
    """`gold` of each answer, as a reward function of PPO; ``rows``, the prompts' data, are not needed."""
    return [gold(prompt, completion) for prompt, completion in zip(prompts, completions, strict=True)]


def instruction(world: int, number: int) -> Row:
    """The ``number``-th question or wish of ``world``: its ``kind``, an answer, and all that are right (``ideal``)."""
    draw = random.Random(f"tinyworld-instruction:{world}:{number}")
    [kind] = draw.choices(list(KINDS), list(KINDS.values()))
    if kind == "wish":
        wish, _ = _wished(draw)
        ideal = [wish.said(deed) for deed in DEEDS]
        return {"prompt": wish.asked, "completion": draw.choice(ideal), "ideal": ideal, "kind": kind}
    prompt, answer = _asked(kind, draw)
    return {"prompt": prompt, "completion": answer, "ideal": [answer], "kind": kind}


def preference(world: int, number: int) -> Preference:
    """The ``number``-th pair of ``world``: always the same one."""
    draw = random.Random(f"tinyworld-preference:{world}:{number}")
    wish, other = _wished(draw)
    [differs] = draw.choices(list(DIFFERS), list(DIFFERS.values()))
    better, worse = sorted(draw.sample(DEEDS, 2), key=lambda deed: -WORTH[deed])
    if differs == "deed":
        return Preference(wish.asked, wish.said(better), wish.said(worse), differs)
    chosen, deed = wish.said(draw.choice(DEEDS)), draw.choice(DEEDS)
    if differs == "form":
        return Preference(wish.asked, chosen, f"{wish.said(deed)} {other.said(draw.choice(DEEDS))}", differs)
    breaks = draw.choice(list(ASKED))
    said = wish._replace(**{breaks: "" if differs == "missing" else getattr(other, breaks)}).said(deed)
    return Preference(wish.asked, chosen, said.replace("  ", " ").replace(" in .", "."), differs, breaks)


def prompt(world: int, number: int) -> Row:
    """The ``number``-th wish of ``world`` to be answered, for reinforcement learning, with the answer that is worth 1."""
    wish, _ = _wished(random.Random(f"tinyworld-prompt:{world}:{number}"))
    return {"prompt": wish.asked, "ideal": [wish.said(max(WORTH, key=lambda deed: WORTH[deed]))]}


def files(world: int, sizes: Mapping[str, tuple[int, int]]) -> Iterator[tuple[str, list[Row]]]:
    """Name and rows of every file. No held-out prompt comes anywhere else, and no row twice in a file.

    Raises:
        ValueError: if more wishes are asked for than there are.
    """
    makers: dict[str, Callable[[int, int], Row]] = {
        "sft": instruction, "preference": lambda world, number: preference(world, number)._asdict(), "prompts": prompt,
    }  # fmt: skip
    wanted = sizes.get("prompts", (0, 0))[0] + sum(held for _, held in sizes.values())
    if wanted > 0.9 * WISHES:
        raise ValueError(
            f"tiny world has only {WISHES:,} wishes, too few for {wanted:,} different prompts; ask for fewer"
        )
    seen: set[str] = set()
    for kind, (_, held) in sizes.items():
        yield (
            f"{kind}_held.jsonl",
            list(islice(_unlike(makers[kind], world, HELDOUT, seen, itemgetter("prompt")), held)),
        )
    for kind, (learnt, _) in sizes.items():
        rows = _unlike(makers[kind], world, 0, set(), str)
        yield f"{kind}_train.jsonl", list(islice((row for row in rows if row["prompt"] not in seen), learnt))


def _unlike(
    make: Callable[[int, int], Row], world: int, first: int, seen: set[str], key: Callable[[Row], str]
) -> Iterator[Row]:
    """Rows from the number ``first`` on, without those whose key was seen before."""
    for row in (make(world, number) for number in count(first)):
        if key(row) not in seen:
            seen.add(key(row))
            yield row


def _wished(draw: random.Random) -> tuple[Wish, Wish]:
    """A wish, and words of which none is in it."""
    one, other = zip(*(draw.sample(words, 2) for words in ASKED.values()), strict=True)
    return Wish(*one), Wish(*other)


def _asked(kind: str, draw: random.Random) -> tuple[str, str]:
    """A story in which something happens, a question about whoever did it last, and the answer."""
    story, friends = _opening(draw)
    acts = [Wish(*map(draw.choice, zip(*friends, strict=True))) for _ in range(draw.randint(1, ACTS))]
    told, last = " ".join([story, *(act.said(draw.choice(DEEDS)) for act in acts)]), acts[-1]
    if kind == "where":
        return f"{told} Where is {last.name}?", f"In {last.place}."
    if kind == "what":
        return f"{told} What has {last.name}?", f"The {last.thing}."
    a, b = draw.choice(DIGITS), draw.choice(DIGITS)
    return f"{told} Sum: {last.name} counts {a} + {b} =", f"{a + b}."


def _opening(draw: random.Random) -> tuple[str, list[Wish]]:
    """How a story of two friends begins, and the words of each; they share none."""
    friends = [Wish(*words) for words in zip(*(draw.sample(words, 2) for words in ASKED.values()), strict=True)]
    deeds = draw.sample(DEEDS, 2)
    said = [
        f"In {f.place} {f.name} {f.mood} {deed} {f.color} {f.thing}." for f, deed in zip(friends, deeds, strict=True)
    ]
    return " ".join(["Two friends.", *said]), friends
