"""Micro-batches cut out of an experience: which tokens, whose columns, and what is computed once."""

import torch

from trainer.batch import Branches, Documents
from trainer.rl.experience import Experience


def experience() -> Experience:
    """Prompts (1, 2) and (3, 4, 5), two completions of each: (6), (7, 8), (9, 6), (8)."""
    tokens = torch.arange(6.0)
    return Experience(
        rows=torch.tensor([20, 10]), prompt_lengths=torch.tensor([2, 3]), prompts=torch.tensor([1, 2, 3, 4, 5]),
        lengths=torch.tensor([1, 2, 2, 1]), ids=torch.tensor([6, 7, 8, 9, 6, 8]), units=torch.tensor([1.0, 2.0, 2.0, 1.0]),
        **{name: tokens + n for n, name in enumerate(
            ("sampled", "logprobs", "reference", "values", "advantages", "returns", "weights")
        )},
    )  # fmt: skip


def test_completions_of_one_prompt_compute_it_once():
    batch = experience().batch([0, 1])
    assert isinstance(batch.documents, Branches)
    assert batch.tokens.tolist() == [[1, 2, 6, 7, 8]]
    assert batch.documents.lengths == (3, 4)
    assert batch.logit_index.tolist() == [1, 1, 3]
    assert batch.targets.tolist() == [6, 7, 8]


def test_completions_of_different_prompts_are_plain_documents():
    batch = experience().batch([3, 1])
    assert isinstance(batch.documents, Documents)
    assert batch.tokens.tolist() == [[3, 4, 5, 8, 1, 2, 7, 8]]
    assert batch.documents.lengths == (4, 4)
    assert batch.documents.positions.tolist() == [[0, 1, 2, 3, 0, 1, 2, 3]]
    assert batch.logit_index.tolist() == [2, 5, 6]
    assert batch.targets.tolist() == [8, 7, 8]
    assert batch.rows.tolist() == [10, 20]
    assert batch.sampled.tolist() == [5, 1, 2]
    assert batch.weights.tolist() == [11, 7, 8]
    assert float(batch.weight) == 3
