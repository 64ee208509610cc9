"""Tasks of tiny world: their answers are right in the world's own language, and the gold reward is what it says."""

import math
from collections import Counter

import pytest

from trainer.tinyworld.data import TinyWorldData
from trainer.tinyworld.language import COLORS, DEEDS, MOODS, NAMES, PLACES, THINGS, NotOfThisWorldError, TinyWorld
from trainer.tinyworld.tasks import (
    ASKED,
    DIFFERS,
    KINDS,
    NEUTRAL,
    WORTH,
    Wish,
    files,
    gold,
    gold_reward,
    instruction,
    preference,
    prompt,
)

MANY = 3000
PROMPT = "Then Ada, sadly, blue rings, in Rome."


def is_told(text: str) -> bool:
    """Whether the world's generator could have written this."""
    try:
        return math.isfinite(TinyWorld.log_probability(f"{text} The end."))
    except NotOfThisWorldError:
        return False


def within_chance(found: int, share: float, count: int) -> bool:
    """Four standard errors: a right share fails once in 16,000 seeds, and the seeds are fixed."""
    return abs(found / count - share) < 4 * math.sqrt(share * (1 - share) / count)


@pytest.mark.parametrize(
    ("answer", "worth"),
    [
        ("Then Ada sadly paints blue rings in Rome.", 1.0),
        (" Then Ada sadly finds blue rings in Rome.\n", 0.5),
        ("Then Ada sadly steals blue rings in Rome.", 0.1),
        ("Then Ben sadly paints blue rings in Rome.", 0.0),
        ("Then Ada calmly paints blue rings in Rome.", 0.0),
        ("Then Ada sadly paints red rings in Rome.", 0.0),
        ("Then Ada sadly paints blue kites in Rome.", 0.0),
        ("Then Ada sadly paints blue rings in Oslo.", 0.0),
        ("Then Ada sadly eats blue rings in Rome.", 0.0),
        ("Then Ada sadly blue rings in Rome.", 0.0),
        ("Then Ada sadly paints blue rings in Rome", 0.0),
        ("Then Ada sadly paints blue rings in Rome. The end.", 0.0),
        ("Then Ada sadly paints blue rings in Rome. Then Ada sadly paints blue rings in Rome.", 0.0),
        ("", 0.0),
    ],
)
def test_an_answer_is_worth_its_deed_if_it_is_just_what_was_asked_for(answer, worth):
    assert gold(PROMPT, answer) == worth
    assert gold_reward([PROMPT, f"User: {PROMPT}\n\nAssistant:"], [answer] * 2, [{}, {}]) == [worth] * 2


def test_a_prompt_without_a_wish_has_no_gold_reward():
    with pytest.raises(ValueError, match="no wish of tiny world"):
        gold("Where is Ada?", "In Rome.")


def test_the_optimum_is_one_and_indifference_stays_near_half_of_it():
    assert set(WORTH) == set(DEEDS)
    assert (min(WORTH.values()) > 0, max(WORTH.values())) == (True, 1.0)
    assert len(set(WORTH.values())) == len(DEEDS)
    assert pytest.approx(0.4875) == NEUTRAL  # (0.1 + 0.2 + 0.3 + 0.4 + 0.5 + 0.6 + 0.8 + 1.0) / 8
    for number in range(100):
        row = prompt(0, number)
        assert [gold(row["prompt"], ideal) for ideal in row["ideal"]] == [1.0]


def test_right_answers_are_what_the_world_itself_would_tell():
    for row in (instruction(0, n) for n in range(300)):
        assert row["completion"] in row["ideal"]
        assert len(row["ideal"]) == (len(DEEDS) if row["kind"] == "wish" else 1)
        if row["kind"] != "wish":
            assert is_told(f"{row['prompt']} {row['completion']}")
            continue
        w = Wish.read(row["prompt"])
        opening = f"In {w.place} {w.name} {w.mood} draws {w.color} {w.thing}. In {{}} {{}} {{}} hides {{}} {{}}."
        kinds = (PLACES, NAMES, MOODS, COLORS, THINGS)
        others = [next(word for word in kind if word not in w) for kind in kinds]
        assert all(is_told(f"Two friends. {opening.format(*others)} {ideal}") for ideal in row["ideal"])


def test_wrong_answers_are_not():
    for row in (instruction(1, n) for n in range(300)):
        if row["kind"] != "wish":
            wrong = {"where": "In Atlantis.", "what": "The shoes.", "sum": "19."}[row["kind"]]
            assert not is_told(f"{row['prompt']} {wrong}")


def test_what_is_learnt_from_is_neutral_about_deeds():
    rows = [instruction(0, n) for n in range(MANY)]
    kinds = Counter(row["kind"] for row in rows)
    assert all(within_chance(kinds[kind], weight / sum(KINDS.values()), MANY) for kind, weight in KINDS.items())
    wishes = [row for row in rows if row["kind"] == "wish"]
    deeds = Counter(row["completion"].split()[3] for row in wishes)
    assert all(within_chance(deeds[deed], 1 / len(DEEDS), len(wishes)) for deed in DEEDS)
    # The standard deviation of a deed's worth is 0.28.
    assert sum(gold(row["prompt"], row["completion"]) for row in wishes) / len(wishes) == pytest.approx(
        NEUTRAL, abs=4 * 0.28 / math.sqrt(len(wishes))
    )


def test_the_rejected_answer_is_worth_less_for_the_one_reason_that_is_stated():
    pairs = [preference(0, n) for n in range(MANY)]
    for pair in pairs:
        wish, chosen, rejected = Wish.read(pair.prompt), pair.chosen.split(), pair.rejected.split()
        assert gold(pair.prompt, pair.chosen) > gold(pair.prompt, pair.rejected)
        if pair.differs == "deed":
            assert (chosen[:3] + chosen[4:], pair.breaks) == (rejected[:3] + rejected[4:], None)
        elif pair.differs == "form":
            assert rejected[8] == "Then"
            assert gold(pair.prompt, " ".join(rejected[:8])) > 0
        else:
            asked, said = set(wish), {word.strip(".") for word in rejected}
            assert asked - said == {getattr(wish, pair.breaks)}
            others = said - asked - set(DEEDS) - {"Then", "in"}
            assert len(others) == (pair.differs == "other")
            assert others <= set(ASKED[pair.breaks])
    found = Counter(pair.differs for pair in pairs)
    assert all(within_chance(found[name], percent / 100, MANY) for name, percent in DIFFERS.items())
    assert sum(DIFFERS.values()) == 100
    # A wrong answer with the better deed comes as often as one with the worse.
    wrong = [(pair, deed) for pair in pairs if pair.breaks for deed in DEEDS if deed in pair.rejected]
    better = sum(WORTH[deed] > gold(pair.prompt, pair.chosen) for pair, deed in wrong)
    assert within_chance(better, (1 - 1 / len(DEEDS)) / 2, len(wrong))


def test_what_is_held_out_is_nowhere_learnt_from_and_the_same_world_is_written_again():
    sizes = {"sft": (3000, 300), "preference": (3000, 300), "prompts": (3000, 300)}
    written = dict(files(0, sizes))
    assert {name: len(rows) for name, rows in written.items()} == {
        f"{kind}_{part}.jsonl": count
        for kind, counts in sizes.items()
        for part, count in zip(("train", "held"), counts, strict=True)
    }
    held = [row["prompt"] for name, rows in written.items() for row in rows if "held" in name]
    learnt = [row["prompt"] for name, rows in written.items() for row in rows if "train" in name]
    assert len(set(held)) == len(held)
    # Of 8,000 wishes that are learnt from, some 300 would be among the 700 of 23,040 that are held out.
    assert not set(held) & set(learnt)
    assert all(len({str(row) for row in rows}) == len(rows) for rows in written.values())
    assert dict(files(0, sizes)) == written
    assert dict(files(1, sizes)) != written


def test_answers_are_short_in_the_worlds_own_pieces():
    tokenizer = TinyWorldData().default_tokenizer()
    answers = [prompt(0, n)["ideal"][0] for n in range(200)]
    # With the end token 16 suffice; a generation of 24 leaves room to be wrong in.
    assert max(len(ids) for ids in tokenizer.encode_many(answers)) + 1 <= 16


def test_more_rows_than_there_are_wishes_are_refused():
    with pytest.raises(ValueError, match="only 23,040 wishes"):
        list(files(0, {"prompts": (23_100, 0)}))
