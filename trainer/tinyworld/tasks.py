"""Tasks in tiny world whose right answers are known: questions, instructions, preferences, and the gold reward of an answer.

A *question* asks what is true at the end of a short story, and has one right answer. An *instruction* asks for a sentence
with five words and leaves the verb to the answer: the training data draws it from all verbs alike, and the gold reward
prefers some to others. So an answer is right or wrong, and a right one better or worse, and both are known exactly: a policy
that answers rightly and has no preference reaches `UNIFORM_REWARD`; the optimum is 1.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Callable, Iterator, Mapping
from itertools import count, islice
from operator import itemgetter
from typing import Any, NamedTuple

from trainer.config import InputError
from trainer.tinyworld.language import COLORS, DIGITS, MOODS, NAMES, PLACES, THINGS, VERBS

Row = dict[str, Any]

ASKED = {"name": NAMES, "mood": MOODS, "color": COLORS, "thing": THINGS, "place": PLACES}
"""What an instruction asks for; the verb is left to the answer."""
REWARDS = {
    "steals": 0.1,
    "hides": 0.2,
    "sells": 0.3,
    "buys": 0.4,
    "finds": 0.5,
    "draws": 0.6,
    "builds": 0.8,
    "paints": 1.0,
}
"""The reward of a right answer, by its verb."""
UNIFORM_REWARD = sum(REWARDS.values()) / len(REWARDS)
"""The mean reward of right answers when every verb is as likely: 0.4875."""
QUESTIONS = ("where", "what", "sum")
KINDS = {"where": 2, "what": 2, "sum": 3, "wish": 3}
"""Shares of the kinds of rows; a wish is an instruction."""
DIFFERS = {"deed": 37, "missing": 55, "other": 3, "form": 5}
"""Per cent of the preferences by what tells the two answers apart: `AnswerPair`."""
ACTS = 3
"""At most so many sentences come between the opening of a story and a question about it."""
INSTRUCTIONS = math.prod(len(words) for words in ASKED.values())
HELDOUT = 1 << 40
"""Held-out rows are counted from here."""
SIZES = {"sft": (8000, 400), "preference": (12000, 400), "prompts": (4000, 256)}
"""Rows to learn from and rows held out, by kind of data."""


class Instruction(NamedTuple):
    """The words that a sentence is to have."""

    name: str
    mood: str
    color: str
    thing: str
    place: str

    @property
    def prompt(self) -> str:
        """The instruction as a prompt puts it."""
        return f"Then {self.name}, {self.mood}, {self.color} {self.thing}, in {self.place}."

    def answer(self, verb: str) -> str:
        """The sentence that is asked for, with a verb."""
        return f"Then {self.name} {self.mood} {verb} {self.color} {self.thing} in {self.place}."

    @classmethod
    def read(cls, prompt: str) -> Instruction:
        """The last instruction of a prompt, whatever a template wrote around it.

        Raises:
            ValueError: if there is none.
        """
        matches = re.findall(r"Then (\w+), (\w+), (\w+) (\w+), in (\w+)\.", prompt)
        if not matches:
            raise ValueError(
                f"there is no instruction of tiny world in {prompt!r}; give prompts of python -m trainer.tinyworld"
            )
        return cls(*matches[-1])


class AnswerPair(NamedTuple):
    """Two answers to an instruction, of which ``chosen`` is right; ``differs`` says how ``rejected`` is worse.

    ``deed``: right too, with a verb of a lower reward.
    ``missing``: it lacks the word of the instruction that ``breaks`` names.
    ``other``: it has another word there.
    ``form``: it goes on after its end.

    The verb of a wrong answer is drawn apart, so it may be the better one.
    """

    prompt: str
    chosen: str
    rejected: str
    differs: str
    breaks: str | None = None


def reward(prompt: str, completion: str) -> float:
    """The reward of an answer to an instruction: 0 if it is not just the sentence that was asked for, else its verb's."""
    instruction, answer = Instruction.read(prompt), completion.strip()
    return next((value for verb, value in REWARDS.items() if answer == instruction.answer(verb)), 0.0)


def gold_reward(prompts: list[str], completions: list[str], rows: list[dict[str, Any]]) -> list[float]:
    """`reward` of each answer, as a reward function of PPO; ``rows``, the prompts' data, are not needed."""
    return [reward(prompt, completion) for prompt, completion in zip(prompts, completions, strict=True)]


def sft_row(world: int, number: int) -> Row:
    """The ``number``-th question or instruction of ``world``: its ``kind``, an answer, and all that are right (``ideal``)."""
    draw = random.Random(f"tinyworld-instruction:{world}:{number}")
    [kind] = draw.choices(list(KINDS), list(KINDS.values()))
    if kind == "wish":
        instruction, _ = _instructions(draw)
        ideal = [instruction.answer(verb) for verb in VERBS]
        return {"prompt": instruction.prompt, "completion": draw.choice(ideal), "ideal": ideal, "kind": kind}
    question, answer = _question(kind, draw)
    return {"prompt": question, "completion": answer, "ideal": [answer], "kind": kind}


def preference(world: int, number: int) -> AnswerPair:
    """The ``number``-th pair of ``world``: always the same one."""
    draw = random.Random(f"tinyworld-preference:{world}:{number}")
    instruction, other = _instructions(draw)
    [differs] = draw.choices(list(DIFFERS), list(DIFFERS.values()))
    better, worse = sorted(draw.sample(VERBS, 2), key=lambda verb: -REWARDS[verb])
    if differs == "deed":
        return AnswerPair(instruction.prompt, instruction.answer(better), instruction.answer(worse), differs)
    chosen, verb = instruction.answer(draw.choice(VERBS)), draw.choice(VERBS)
    if differs == "form":
        rejected = f"{instruction.answer(verb)} {other.answer(draw.choice(VERBS))}"
        return AnswerPair(instruction.prompt, chosen, rejected, differs)
    breaks = draw.choice(list(ASKED))
    word = "" if differs == "missing" else getattr(other, breaks)
    rejected = instruction._replace(**{breaks: word}).answer(verb).replace("  ", " ").replace(" in .", ".")
    return AnswerPair(instruction.prompt, chosen, rejected, differs, breaks)


def prompt_row(world: int, number: int) -> Row:
    """The ``number``-th instruction of ``world``, for reinforcement learning, with the answer of reward 1."""
    instruction, _ = _instructions(random.Random(f"tinyworld-prompt:{world}:{number}"))
    return {"prompt": instruction.prompt, "ideal": [instruction.answer(max(REWARDS, key=lambda verb: REWARDS[verb]))]}


def files(world: int, sizes: Mapping[str, tuple[int, int]]) -> Iterator[tuple[str, list[Row]]]:
    """Name and rows of every file. No held-out prompt comes anywhere else, and no row twice in a file.

    Raises:
        InputError: if more instructions are asked for than there are.
    """
    makers: dict[str, Callable[[int, int], Row]] = {
        "sft": sft_row,
        "preference": lambda world, number: preference(world, number)._asdict(),
        "prompts": prompt_row,
    }
    wanted = sizes.get("prompts", (0, 0))[0] + sum(heldout for _, heldout in sizes.values())
    if wanted > 0.9 * INSTRUCTIONS:
        raise InputError(
            f"tiny world has only {INSTRUCTIONS:,} instructions, too few for {wanted:,} different prompts; ask for fewer"
        )
    seen: set[str] = set()
    for kind, (_, heldout) in sizes.items():
        rows = _distinct(makers[kind], world, HELDOUT, seen, itemgetter("prompt"))
        yield f"{kind}_held.jsonl", list(islice(rows, heldout))
    for kind, (learnt, _) in sizes.items():
        rows = _distinct(makers[kind], world, 0, set(), str)
        yield f"{kind}_train.jsonl", list(islice((row for row in rows if row["prompt"] not in seen), learnt))


def _distinct(
    make: Callable[[int, int], Row], world: int, first: int, seen: set[str], key: Callable[[Row], str]
) -> Iterator[Row]:
    """Rows from the number ``first`` on, without those whose key was seen before."""
    for row in (make(world, number) for number in count(first)):
        if key(row) not in seen:
            seen.add(key(row))
            yield row


def _instructions(draw: random.Random) -> tuple[Instruction, Instruction]:
    """An instruction, and another that shares no word with it."""
    one, other = zip(*(draw.sample(words, 2) for words in ASKED.values()), strict=True)
    return Instruction(*one), Instruction(*other)


def _question(kind: str, draw: random.Random) -> tuple[str, str]:
    """A story in which something happens, a question about whoever acted last, and the answer."""
    opening, friends = _opening(draw)
    acts = [Instruction(*map(draw.choice, zip(*friends, strict=True))) for _ in range(draw.randint(1, ACTS))]
    story, last = " ".join([opening, *(act.answer(draw.choice(VERBS)) for act in acts)]), acts[-1]
    if kind == "where":
        return f"{story} Where is {last.name}?", f"In {last.place}."
    if kind == "what":
        return f"{story} What has {last.name}?", f"The {last.thing}."
    a, b = draw.choice(DIGITS), draw.choice(DIGITS)
    return f"{story} Sum: {last.name} counts {a} + {b} =", f"{a + b}."


def _opening(draw: random.Random) -> tuple[str, list[Instruction]]:
    """How a story of two friends begins, and the words of each; they share none."""
    friends = _instructions(draw)
    verbs = draw.sample(VERBS, 2)
    sentences = [
        f"In {f.place} {f.name} {f.mood} {verb} {f.color} {f.thing}." for f, verb in zip(friends, verbs, strict=True)
    ]
    return " ".join(["Two friends.", *sentences]), list(friends)
