"""Pairs dealt out to forwards in which nothing is learnt."""

from itertools import pairwise

import pytest

from tests.chats import byte_tokenizer, write_jsonl
from trainer.data import pairs as module
from trainer.data.preferences import PreferenceData

TOKENIZER = byte_tokenizer("<|im_end|>")
SIZES = [3, 5, 9, 1, 1, 30, 2, 4]


@pytest.fixture
def pairs(tmp_path, monkeypatch):
    # A pair with answers of n and 1 bytes lays down 21 ids of a shared prompt, n + 1, and 2.
    monkeypatch.setattr(module, "FORWARD", 64)
    rows = [{"prompt": f"p{n}", "chosen": "c" * size, "rejected": "r"} for n, size in enumerate(SIZES)]
    data = PreferenceData(
        train=[str(write_jsonl(tmp_path / "pairs.jsonl", rows))], template="chatml", cache=str(tmp_path / "cache")
    )
    return data.open(TOKENIZER, 200, 0).train.parts[0]


def dealt(pairs, ranks: int) -> list[list[list[int]]]:
    return [list(pairs.forwards(rank, ranks)) for rank in range(ranks)]


def test_units_that_fit_share_a_forward(pairs):
    groups = dealt(pairs, 1)[0]
    assert [n for group in groups for n in group] == list(range(len(SIZES)))
    sizes = [[len(pairs.collate([n]).tokens[0]) for n in group] for group in groups]
    assert all(sum(group) <= 64 or len(group) == 1 for group in sizes)
    # None could take the next one's first unit: so there is no group to spare.
    assert all(sum(group) + following[0] > 64 for group, following in pairwise(sizes))


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_get_equally_many_forwards_of_the_same_groups(ranks, pairs):
    shares = dealt(pairs, ranks)
    assert len({len(share) for share in shares}) == 1
    inturn = [group for turn in zip(*shares, strict=True) for group in turn]
    whole = dealt(pairs, 1)[0]
    assert inturn[: len(whole)] == whole
    assert inturn[len(whole) :] == [[-1]] * (len(inturn) - len(whole))


def test_a_unit_that_fits_nowhere_has_a_forward_of_its_own(pairs, monkeypatch):
    monkeypatch.setattr(module, "FORWARD", 8)
    assert dealt(pairs, 1)[0] == [[n] for n in range(len(SIZES))]
