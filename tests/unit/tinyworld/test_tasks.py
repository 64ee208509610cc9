"""Tasks of tiny world: their answers are right in the world's own language, and the gold reward is what it says."""

import math
from collections import Counter

import pytest

from trainer.tinyworld.data import TinyWorldData
from trainer.tinyworld.language import COLORS, MOODS, NAMES, PLACES, THINGS, VERBS, OutOfLanguageError, TinyWorld
from trainer.tinyworld.tasks import (
    ASKED,
    DIFFERS,
    KINDS,
    REWARDS,
    UNIFORM_REWARD,
    Instruction,
    files,
    gold_reward,
    preference,
    prompt_row,
    reward,
    sft_row,
)

MANY = 3000
PROMPT = "Then Ada, sadly, blue rings, in Rome."


def is_in_language(text: str) -> bool:
    """Whether the world's generator could have written this."""
    try:
        return math.isfinite(TinyWorld.log_probability(f"{text} The end."))
    except OutOfLanguageError:
        return False


def within_chance(found: int, share: float, count: int) -> bool:
    """Four standard errors: a right share fails once in 16,000 seeds, and the seeds are fixed."""
    return abs(found / count - share) < 4 * math.sqrt(share * (1 - share) / count)


@pytest.mark.parametrize(
    ("answer", "value"),
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
def test_an_answer_earns_its_verbs_reward_if_it_is_just_what_was_asked(answer, value):
    assert reward(PROMPT, answer) == value
    assert gold_reward([PROMPT, f"User: {PROMPT}\n\nAssistant:"], [answer] * 2, [{}, {}]) == [value] * 2


def test_a_prompt_without_an_instruction_has_no_gold_reward():
    with pytest.raises(ValueError, match="no instruction of tiny world"):
        reward("Where is Ada?", "In Rome.")


def test_the_optimum_is_one_and_indifference_stays_near_half_of_it():
    assert set(REWARDS) == set(VERBS)
    assert (min(REWARDS.values()) > 0, max(REWARDS.values())) == (True, 1.0)
    assert len(set(REWARDS.values())) == len(VERBS)
    assert pytest.approx(0.4875) == UNIFORM_REWARD  # (0.1 + 0.2 + 0.3 + 0.4 + 0.5 + 0.6 + 0.8 + 1.0) / 8
    for number in range(100):
        row = prompt_row(0, number)
        assert [reward(row["prompt"], ideal) for ideal in row["ideal"]] == [1.0]


def test_right_answers_are_what_the_world_itself_would_tell():
    for row in (sft_row(0, n) for n in range(300)):
        assert row["completion"] in row["ideal"]
        assert len(row["ideal"]) == (len(VERBS) if row["kind"] == "wish" else 1)
        if row["kind"] != "wish":
            assert is_in_language(f"{row['prompt']} {row['completion']}")
            continue
        w = Instruction.read(row["prompt"])
        opening = f"In {w.place} {w.name} {w.mood} draws {w.color} {w.thing}. In {{}} {{}} {{}} hides {{}} {{}}."
        kinds = (PLACES, NAMES, MOODS, COLORS, THINGS)
        others = [next(word for word in kind if word not in w) for kind in kinds]
        assert all(is_in_language(f"Two friends. {opening.format(*others)} {ideal}") for ideal in row["ideal"])


def test_wrong_answers_are_not():
    for row in (sft_row(1, n) for n in range(300)):
        if row["kind"] != "wish":
            wrong = {"where": "In Atlantis.", "what": "The shoes.", "sum": "19."}[row["kind"]]
            assert not is_in_language(f"{row['prompt']} {wrong}")


def test_the_training_data_draws_all_verbs_alike():
    rows = [sft_row(0, n) for n in range(MANY)]
    kinds = Counter(row["kind"] for row in rows)
    assert all(within_chance(kinds[kind], weight / sum(KINDS.values()), MANY) for kind, weight in KINDS.items())
    instructions = [row for row in rows if row["kind"] == "wish"]
    verbs = Counter(row["completion"].split()[3] for row in instructions)
    assert all(within_chance(verbs[verb], 1 / len(VERBS), len(instructions)) for verb in VERBS)
    # The standard deviation of a verb's worth is 0.28.
    assert sum(reward(row["prompt"], row["completion"]) for row in instructions) / len(instructions) == pytest.approx(
        UNIFORM_REWARD, abs=4 * 0.28 / math.sqrt(len(instructions))
    )


def test_the_rejected_answer_is_worth_less_for_the_one_reason_that_is_stated():
    pairs = [preference(0, n) for n in range(MANY)]
    for pair in pairs:
        instruction, chosen, rejected = Instruction.read(pair.prompt), pair.chosen.split(), pair.rejected.split()
        assert reward(pair.prompt, pair.chosen) > reward(pair.prompt, pair.rejected)
        if pair.differs == "deed":
            assert (chosen[:3] + chosen[4:], pair.breaks) == (rejected[:3] + rejected[4:], None)
        elif pair.differs == "form":
            assert rejected[8] == "Then"
            assert reward(pair.prompt, " ".join(rejected[:8])) > 0
        else:
            asked, words = set(instruction), {word.strip(".") for word in rejected}
            assert asked - words == {getattr(instruction, pair.breaks)}
            others = words - asked - set(VERBS) - {"Then", "in"}
            assert len(others) == (pair.differs == "other")
            assert others <= set(ASKED[pair.breaks])
    counts = Counter(pair.differs for pair in pairs)
    assert all(within_chance(counts[name], percent / 100, MANY) for name, percent in DIFFERS.items())
    assert sum(DIFFERS.values()) == 100
    # A wrong answer with the better verb comes as often as one with the worse.
    wrong = [(pair, verb) for pair in pairs if pair.breaks for verb in VERBS if verb in pair.rejected]
    better = sum(REWARDS[verb] > reward(pair.prompt, pair.chosen) for pair, verb in wrong)
    assert within_chance(better, (1 - 1 / len(VERBS)) / 2, len(wrong))


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
    # Of 8,000 instructions that are learnt from, some 300 would be among the 700 of 23,040 that are held out.
    assert not set(held) & set(learnt)
    assert all(len({str(row) for row in rows}) == len(rows) for rows in written.values())
    assert dict(files(0, sizes)) == written
    assert dict(files(1, sizes)) != written


def test_answers_are_short_in_the_worlds_own_pieces():
    tokenizer = TinyWorldData().default_tokenizer()
    answers = [prompt_row(0, n)["ideal"][0] for n in range(200)]
    # With the end token 16 suffice; a generation of 24 leaves room to be wrong in.
    assert max(len(ids) for ids in tokenizer.encode_many(answers)) + 1 <= 16


def test_more_rows_than_there_are_instructions_are_refused():
    with pytest.raises(ValueError, match="only 23,040 instructions"):
        list(files(0, {"prompts": (23_100, 0)}))
