"""What a format costs, by hand: divergence, perplexity, agreement, spread; of language models and of reward models."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.chats import byte_tokenizer
from tests.small_folder import write_folder
from trainer.batch import Documents
from trainer.data.corpus import Prompt
from trainer.data.store import Span
from trainer.export.cost import Heldout, compared, lay, measured, room_problem, standard_error
from trainer.export.formats import opened_folder
from trainer.functional import Head, logits
from trainer.models.header import read_shape

UNITS = [
    [Span("", [65, 66, 67, 68, 69]), Span("", [70, 71, 72])],
    [Span("", [80, 81, 82, 83], [True, False, True, True])],
]
TARGETS = 4 + 2 + 2


def test_one_token_of_two_words_costs_what_is_derived_by_hand():
    # Before 1/2 and 1/2; after 3/4 and 1/4.
    before, after = Head(torch.zeros(2, 1)), Head(torch.tensor([[math.log(3.0)], [0.0]]))
    values = compared(torch.ones(2, 1), before, torch.ones(2, 1), after, torch.tensor([0, 1]))
    kl = 0.5 * math.log(4 / 3)
    expected = [
        [kl, kl], [math.log(2), math.log(2)], [math.log(4 / 3), math.log(4)], [1.0, 1.0], [math.log(1.5), math.log(2)],
    ]  # fmt: skip
    assert values.tolist() == [pytest.approx(row, abs=1e-6) for row in expected]  # float32


def test_a_bound_of_the_logits_is_part_of_what_is_compared():
    # 2 tanh(1 / 2 * 2 / 2) is not 1: without the bound nothing would have changed.
    plain, bounded = Head(torch.tensor([[1.0], [0.0]])), Head(torch.tensor([[1.0], [0.0]]), cap=2.0)
    kl = compared(torch.ones(1, 1), plain, torch.ones(1, 1), bounded, torch.tensor([0]))[0].item()
    p, q = 1 / (1 + math.exp(-1)), 1 / (1 + math.exp(-2 * math.tanh(0.5)))
    assert kl == pytest.approx(p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q)), abs=1e-6)


def test_the_spread_of_a_mean_over_tokens_is_that_of_its_sequences():
    # Sequences of one token, 1 and 3: their mean 2 has the standard error sqrt(2) / sqrt(2).
    assert standard_error([(1.0, 1), (3.0, 1)]) == pytest.approx(1.0)
    # 6 tokens of mean 2: they deviate by 2 - 2 * 2 and 10 - 4 * 2; sqrt((4 + 4) * 2 / 1) / 6.
    assert standard_error([(2.0, 2), (10.0, 4)]) == pytest.approx(4 / 6)
    assert standard_error([(1.0, 7)]) is None


def test_sequences_are_laid_end_to_end_without_their_last_ids():
    unit = lay([Span("", [5, 6, 7]), Span("", [9]), Span("", [8, 5, 6], [True, False, True])])
    assert unit.tokens.tolist() == [[5, 6, 8, 5]]
    assert unit.documents.lengths == (2, 2)
    assert unit.places.tolist() == [0, 1, 3]
    assert unit.targets.tolist() == [6, 7, 6]
    assert unit.counts == [2, 1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_folder(tmp_path_factory.mktemp("models") / "model")


def changed(folder: Path, out: Path, **factors: float) -> Path:
    """A copy of a folder, some of its tensors times a factor."""
    out.mkdir()
    for file in folder.iterdir():
        if file.suffix != ".safetensors":
            (out / file.name).write_bytes(file.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    for name in tensors:
        tensors[name] *= factors.get(name.removesuffix(".weight").replace(".", "_"), 1.0)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


def cost(source: Path, model: Path, heldout: Heldout) -> dict:
    [(name, value)] = measured(source, {"it": (model, opened_folder)}, heldout)
    assert name == "it"
    return value


def test_a_copy_without_loss_costs_nothing(folder):
    same = cost(folder, folder, Heldout(UNITS))
    assert (same["kl"], same["kl_error"], same["logprob_change"]) == (0.0, 0.0, 0.0)
    assert (same["same_token"], same["tokens"], same["sequences"]) == (1.0, TARGETS, 3)
    assert same["perplexity"] == same["original_perplexity"]


def predictions(folder: Path) -> list[tuple[torch.Tensor, int]]:
    """Logits and target of every token of `UNITS` that counts, each sequence passed alone."""
    model, wanted = opened_folder(folder), list[tuple[torch.Tensor, int]]()
    with torch.no_grad():
        for span in (span for unit in UNITS for span in unit):
            ids, counts = list(span.ids), span.trained or [True] * len(span.ids)
            scores = model(torch.tensor([ids]), Documents.from_lengths([len(ids)], 1), logits)[0]
            wanted += [(scores[n], ids[n + 1]) for n in range(len(ids) - 1) if counts[n + 1]]
    return wanted


def test_logits_of_twice_the_size_cost_what_their_softmax_says(folder, tmp_path):
    doubled = cost(folder, changed(folder, tmp_path / "doubled", model_norm=2.0), Heldout(UNITS))
    kl = before = after = 0.0
    for scores, target in predictions(folder):
        p, q = scores.double().log_softmax(0), (2 * scores.double()).log_softmax(0)
        kl += float((p.exp() * (p - q)).sum())
        before, after = before - float(p[target]), after - float(q[target])
    # Float32 against float64: a few units in the seventh digit of logits up to 1.
    assert doubled["kl"] == pytest.approx(kl / TARGETS, rel=1e-4)
    assert doubled["original_perplexity"] == pytest.approx(math.exp(before / TARGETS), rel=1e-6)
    assert doubled["perplexity"] == pytest.approx(math.exp(after / TARGETS), rel=1e-6)
    assert doubled["same_token"] == 1.0


def test_exact_match_is_of_greedy_answers_of_both(folder, tmp_path):
    # What the model says of its own accord is right by definition; the other one, all of whose logits are 0, says id 0.
    model, tokenizer = opened_folder(folder), byte_tokenizer()
    with torch.no_grad():
        scores = model(torch.tensor([[65, 66]]), Documents.from_lengths([2], 1), logits)[0, -1]
    first = tokenizer.decode([int(scores.argmax())]).strip()
    assert first != tokenizer.decode([0]).strip()
    prompts = [Prompt([65, 66], "AB", [first]), Prompt([65, 66], "AB", ["no such thing"]), Prompt([65], "A")]
    heldout = Heldout(UNITS, prompts, answer_tokens=1)
    muted = cost(folder, changed(folder, tmp_path / "muted", model_norm=0.0), heldout)
    assert (muted["original_exact_match"], muted["exact_match"], muted["answers"]) == (0.5, 0.0, 2)


def test_prompts_alone_are_compared_on_the_answers_of_the_original(folder):
    same = cost(folder, folder, Heldout(prompts=[Prompt([65, 66, 67], "ABC")], answer_tokens=5))
    assert (same["kl"], same["sequences"], same["kl_error"]) == (0.0, 1, None)
    assert 1 <= same["tokens"] <= 5
    assert "exact_match" not in same


def test_a_reward_model_is_compared_by_scores_and_the_order_of_pairs(tmp_path):
    folder = write_folder(tmp_path / "reward", scores=True)
    pairs = [[Span("chosen", [65, 66, 67 + n]), Span("rejected", [65, 66, 97 + 2 * n, 50])] for n in range(4)]
    same = cost(folder, folder, Heldout(pairs))
    assert (same["score_change"], same["same_order"], same["pairs"]) == (0.0, 1.0, 4)
    assert same["accuracy"] == same["original_accuracy"]
    turned = cost(folder, changed(folder, tmp_path / "turned", score=-1.0), Heldout(pairs))
    assert (turned["same_order"], turned["accuracy"]) == (0.0, 1 - same["accuracy"])
    doubled = cost(folder, changed(folder, tmp_path / "doubled", score=2.0), Heldout(pairs))
    assert doubled["score_change"] == pytest.approx(turned["score_change"] / 2)
    assert doubled["score_spread"] == same["score_spread"] > 0


def test_a_model_that_memory_has_no_room_for_is_not_measured(folder):
    assert room_problem(read_shape(folder)) is None
    # 10^11 rows of 16 weights of 4 bytes.
    huge = replace(read_shape(folder), vocab_size=10**11)
    assert room_problem(huge).startswith("the model takes 6400.0 GB in float32, and ")


def test_without_rows_nothing_is_measured(folder):
    assert dict(measured(folder, {"it": (folder, opened_folder)}, None)) == {"it": {}}
