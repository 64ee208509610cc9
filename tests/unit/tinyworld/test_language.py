"""Tiny world: its entropy is what it says, and it takes a model to come near it."""

import hashlib
import math
import re
from collections import Counter

import pytest

from trainer.tinyworld.data import HELDOUT, TinyWorldData
from trainer.tinyworld.language import KINDS, VERSION, OutOfLanguageError, TinyWorld


def surprisals(count: int) -> list[float]:
    world = TinyWorld(1)
    return [-world.log_probability(world.document(n)) for n in range(count)]


def test_the_entropy_is_the_mean_surprisal_of_what_is_generated():
    found = surprisals(4000)
    mean = sum(found) / len(found)
    error = math.sqrt(sum((x - mean) ** 2 for x in found) / len(found) / len(found))
    assert (
        abs(mean - TinyWorld.entropy()) < 4 * error
    )  # 4 standard errors: once in 16,000 seeds, and this seed is fixed
    assert error < 0.01 * mean  # so a mistake of 4% would be seen


def test_a_further_sentence_costs_its_kind_and_its_choices():
    text = next(t for t in map(TinyWorld(0).document, range(100)) if t.count(".") < 8)
    name = re.findall(r"In \w+ (\w+) ", text)[0]
    longer = text.removesuffix("The end.") + f"Where is {name}? In {place_of(text, name)}. The end."
    ratio = math.exp(TinyWorld.log_probability(longer) - TinyWorld.log_probability(text))
    cast = {"Two": 2, "Three": 3}[text.split()[0]]
    assert ratio == pytest.approx(KINDS["where"] / sum(KINDS.values()) / cast)


def place_of(text: str, name: str) -> str:
    """Where somebody is in the end."""
    opening, later = rf"In (\w+) {name} ", rf"Then {name} [\w ]+ in (\w+)\."
    return next(iter(reversed(re.findall(later, text))), None) or re.findall(opening, text)[0]


def thing_of(text: str, name: str) -> str:
    """What somebody dealt with last."""
    return re.findall(rf" {name} \w+ \w+ \w+ (\w+)[ .]", text)[-1]


def test_documents_are_a_function_of_seed_and_number():
    assert TinyWorld(3).document(5) == TinyWorld(3).document(5)
    assert len({TinyWorld(seed).document(n) for seed in (3, 4) for n in range(50)}) == 100


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (" The end.", ""),
        (" The end.", " The end. The end."),
        ("friends", "cats"),
        (" In ", " in "),
        (" The end.", " Why?"),
    ],
)
def test_a_text_of_another_world_has_no_probability(old, new):
    text = TinyWorld(0).document(0)
    with pytest.raises(OutOfLanguageError, match="at "):
        TinyWorld.log_probability(text.replace(old, new, 1))


def test_a_wrong_answer_has_no_probability():
    texts = (TinyWorld(0).document(n) for n in range(100))
    text = next(t for t in texts if "counts 3 + 4 = 7" in t or " + " in t)
    total = re.search(r"= (\d+)\.", text)
    assert total is not None
    with pytest.raises(OutOfLanguageError):
        TinyWorld.log_probability(text.replace(total[0], f"= {int(total[1]) + 1}.", 1))


def test_answers_follow_from_the_story():
    for number in range(200):
        text = TinyWorld(0).document(number)
        for question in re.finditer(r"Where is (\w+)\? In (\w+)\.", text):
            assert place_of(text[: question.start()], question[1]) == question[2]
        for question in re.finditer(r"What has (\w+)\? The (\w+)\.", text):
            assert thing_of(text[: question.start()], question[1]) == question[2]
        for a, b, total in re.findall(r"counts (\d) \+ (\d) = (\d+)\.", text):
            assert int(a) + int(b) == int(total)


def ngram_loss(order: int, train: list[list[int]], heldout: list[list[int]], vocabulary: int) -> float:
    """Nats per token of an interpolated n-gram model (Jelinek & Mercer 1980), weight count / (count + 1)."""
    counts: list[Counter] = [Counter() for _ in range(order)]
    totals: list[Counter] = [Counter() for _ in range(order)]
    for ids in train:
        for at in range(1, len(ids)):
            for n in range(order):
                context = tuple(ids[max(0, at - n) : at])
                counts[n][(context, ids[at])] += 1
                totals[n][context] += 1
    nats = tokens = 0.0
    for ids in heldout:
        for at in range(1, len(ids)):
            p = 1 / vocabulary
            for n in range(order):
                context = tuple(ids[max(0, at - n) : at])
                p = (counts[n][(context, ids[at])] + p) / (totals[n][context] + 1)
            nats -= math.log(p)
            tokens += 1
    return nats / tokens


def test_a_four_gram_model_stays_a_quarter_above_the_floor(tmp_path_factory):
    data = TinyWorldData()
    tokenizer, world = data.default_tokenizer(), TinyWorld(0)

    def ids(first: int, count: int) -> list[list[int]]:
        texts = [world.document(n) for n in range(first, first + count)]
        return [[tokenizer.bos, *i, tokenizer.eos] for i in tokenizer.encode_many(texts)]

    train, heldout = ids(0, 6000), ids(HELDOUT, 200)
    nats = -sum(world.log_probability(world.document(HELDOUT + n)) for n in range(200))
    floor = nats / sum(len(i) - 1 for i in heldout)
    losses = {order: ngram_loss(order, train, heldout, tokenizer.vocab_size) for order in (2, 3, 4, 5)}
    assert losses[4] > 1.25 * floor
    assert min(losses.values()) > 1.25 * floor


def test_a_change_of_the_texts_is_another_version_of_the_language():
    documents = "\n".join(TinyWorld(0).document(n) for n in range(100))
    # Prepared data and checkpoints know the texts by the version alone.
    assert (VERSION[:8], hashlib.sha256(documents.encode()).hexdigest()[:16]) == ("e0fd7733", "644787e88275c8f8")
