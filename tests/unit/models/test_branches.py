"""Prompts that are computed once for several answers: the numbers are those of whole sequences."""

import pytest
import torch

from tests.unit.models.test_transformer import built
from trainer.batch import Branches, Documents
from trainer.data.pairs import Pair, collate
from trainer.data.rows import Encoded
from trainer.functional import logits, logprobs
from trainer.models.attention import Scores, attend


def encoded(ids, prompt: int) -> Encoded:
    return Encoded(ids, [n >= prompt for n in range(len(ids))])


PAIRS = [
    Pair(encoded([1, 2, 3, 4, 5, 6], 3), encoded([1, 2, 3, 9, 8], 3), 3),
    Pair(encoded([7, 7, 8], 1), encoded([7, 1, 2, 3, 4, 5, 6, 7], 1), 1),
]


def two_rows(pairs):
    return [p._replace(shared=0) for p in pairs]


def scored(model, batch):
    def read(hidden, head):
        return logprobs(hidden[:, batch.logit_index], head, targets=batch.targets[None])[0][0]

    values = model(batch.tokens, batch.documents, read)
    return values.new_zeros(2 * len(batch.rows)).index_add(0, batch.sequence_id, values)


def test_a_shared_prompt_is_laid_down_once_and_positions_restart_behind_it():
    batch = collate(PAIRS[:1], [0])
    assert batch.tokens.tolist() == [[1, 2, 3, 4, 5, 6, 9, 8]]
    assert batch.documents.positions.tolist() == [[0, 1, 2, 3, 4, 5, 3, 4]]
    assert batch.documents.lengths == (6, 5)
    # 4 and 9 are both predicted from the prompt's last token.
    assert batch.logit_index.tolist() == [2, 3, 4, 2, 6]
    assert batch.targets.tolist() == [4, 5, 6, 9, 8]
    assert batch.sequence_id.tolist() == [0, 0, 0, 1, 1]
    assert batch.final_index.tolist() == [5, 7]


@pytest.mark.parametrize("window", [None, 3])
def test_branches_give_the_logits_of_each_sequence_alone(window):
    model = built(sliding_window=window)
    batch = collate(PAIRS, [0, 1])
    found = model(batch.tokens, batch.documents, logits)[0]
    sequences = [list(side.ids) for pair in PAIRS for side in (pair.chosen, pair.rejected)]
    offsets = batch.documents.sequences.offsets.tolist()
    for n, sequence in enumerate(sequences):
        alone = model(torch.tensor([sequence]), Documents.from_lengths([len(sequence)], 1), logits)[0]
        places = batch.documents.index[offsets[n] : offsets[n + 1]]
        torch.testing.assert_close(found[places], alone, rtol=0, atol=1e-5)


def test_shared_and_separate_prompts_give_the_same_losses_and_gradients():
    results = []
    for pairs in (PAIRS, two_rows(PAIRS)):
        model = built()
        sums = scored(model, collate(pairs, [0, 1]))
        (sums * torch.tensor([1.0, -2.0, 0.5, 3.0])).sum().backward()
        results.append((sums.detach(), {n: p.grad for n, p in model.named_parameters()}))
    torch.testing.assert_close(*(r[0] for r in results), rtol=0, atol=1e-5)
    for name, gradient in results[0][1].items():
        torch.testing.assert_close(gradient, results[1][1][name], rtol=1e-5, atol=1e-5)


def test_rejected_does_not_see_chosen():
    model = built()
    other = [PAIRS[0]._replace(chosen=encoded([1, 2, 3, 40, 41, 42], 3))]
    first, second = (scored(model, collate(pairs, [0])) for pairs in (PAIRS[:1], other))
    assert first[1] == second[1]
    assert first[0] != second[0]


def test_a_filler_pair_has_no_targets_and_no_weight():
    filler = Pair(Encoded([0, 0], [False, False]), Encoded([0, 0], [False, False]), 0)
    batch = collate([PAIRS[0], filler], [5, -1])
    assert float(batch.weight) == 1
    assert set(batch.sequence_id.tolist()) == {0, 1}


def test_branches_of_a_single_sequence_are_documents():
    branches = Branches.of([range(4)], 4)
    q = torch.randn(1, 4, 2, 8, generator=torch.Generator().manual_seed(0))
    out = attend(q, q, q, branches, Scores(0.35))
    assert torch.equal(out, attend(q, q, q, Documents.from_lengths([4], 1), Scores(0.35)))
