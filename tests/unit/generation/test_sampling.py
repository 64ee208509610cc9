"""What is drawn from a distribution, against NumPy."""

import numpy as np
import pytest
import torch

from trainer.generation.sampling import Sampling, choose, key_bits, uniform


def kept_by_numpy(row: np.ndarray, s: Sampling) -> np.ndarray:
    """Which tokens may be drawn, by sorting everything; ties with the last one kept are kept."""
    scaled = (row - row.max()) / s.temperature
    kept = np.ones(len(row), bool)
    if 0 < s.top_k < len(row):
        kept &= scaled >= np.sort(scaled)[-s.top_k]
    if s.top_p < 1:
        mass = np.where(kept, np.exp(scaled), 0)
        order = np.argsort(-mass, kind="stable")
        reached = np.cumsum(mass[order]) >= s.top_p * mass.sum() * (1 - 1e-12)
        kept &= mass >= mass[order][reached.argmax()]
    if s.min_p:
        kept &= np.exp(scaled) >= s.min_p * (1 - 1e-6)
    return kept


def drawn(row: np.ndarray, sampling: Sampling, count: int = 4000) -> tuple[np.ndarray, np.ndarray]:
    """Tokens at evenly spread draws: every token of more than 1 / count of the mass is among them."""
    draws = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    ids, logprobs = choose(torch.tensor(row, dtype=torch.float32).repeat(count, 1), sampling, draws)
    return ids.numpy(), logprobs.numpy()


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=0.7, top_k=5),
        Sampling(top_p=0.8),
        Sampling(temperature=1.5, min_p=0.1),
        Sampling(temperature=1.3, top_k=12, top_p=0.9, min_p=0.05),
        Sampling(top_k=10_000, top_p=0.999999),
    ],
)
@pytest.mark.parametrize("size", [7, 256, 600])
def test_filters_keep_what_a_full_sort_keeps(sampling, size):
    draw = np.random.default_rng(size)
    # Half-integers: many ties, also at the edges of the filters.
    row = (np.round(draw.normal(size=size) * 4) / 2).astype(np.float32)
    kept = kept_by_numpy(row.astype(np.float64), sampling)
    ids, logprobs = drawn(row, sampling)
    expected = np.exp((row - row.max()) / sampling.temperature)
    likely = kept & (expected / expected[kept].sum() > 1 / 3000)
    assert set(np.flatnonzero(likely)) <= set(ids) <= set(np.flatnonzero(kept))
    # The log-probability is that of the whole distribution, whatever is filtered.
    np.testing.assert_allclose(logprobs, np.log(expected[ids] / expected.sum()), atol=2e-6)


def test_ties_at_the_edge_are_all_kept():
    row = np.array([1.0, 3.0, 2.0, 2.0, 2.0, 0.0], np.float32)
    assert set(drawn(row, Sampling(top_k=2))[0]) == {1, 2, 3, 4}
    # e^3 is 43% of the whole, so half of it needs a token of e^2.
    assert set(drawn(row, Sampling(top_p=0.5))[0]) == {1, 2, 3, 4}
    # What top-k leaves sums to 20.1 + 3 * 7.4 = 42.3, and the first token alone is 47% of that.
    assert set(drawn(row, Sampling(top_k=2, top_p=0.45))[0]) == {1}
    assert set(drawn(row, Sampling(min_p=0.36))[0]) == {1, 2, 3, 4}  # e^-1 = 0.368
    assert set(drawn(row, Sampling(min_p=0.37))[0]) == {1}


def test_a_nucleus_wider_than_the_first_sorted_tokens_is_found():
    row = np.zeros(1000, np.float32)
    row[:100] = np.linspace(0.5, 0.1, 100)
    kept = kept_by_numpy(row.astype(np.float64), Sampling(top_p=0.1))
    assert 64 < kept.sum() < 100
    assert set(drawn(row, Sampling(top_p=0.1))[0]) == set(np.flatnonzero(kept))


def test_draws_follow_the_probabilities():
    # 20,000 keys, 300 tokens: with these keys chi-square is what it is; a right sampler exceeds the limit once in 1,000.
    row = torch.randn(300, generator=torch.Generator().manual_seed(0))
    bits = torch.tensor([key_bits((3, n)) for n in range(5000)])
    draws = torch.cat([uniform(bits, torch.full_like(bits, position)) for position in range(4)])
    ids, _ = choose(row.repeat(len(draws), 1), Sampling(temperature=0.8), draws)
    expected = (row.double() / 0.8).softmax(0) * len(draws)
    found = torch.bincount(ids, minlength=300)
    big = expected >= 5
    rest = torch.stack([found[~big].sum(), found[big].sum()])
    squares = ((found - expected) ** 2 / expected)[big].sum()
    freedom = int(big.sum()) - 1
    assert int(rest.sum()) == len(draws)
    assert squares < freedom + 3.1 * (2 * freedom) ** 0.5 + 5
    assert squares > freedom - 3.1 * (2 * freedom) ** 0.5


def test_a_token_without_mass_is_never_drawn():
    row = np.full(600, -np.inf, np.float32)
    row[[100, 300, 599]] = 0
    ends = torch.tensor([0.0, 1 / 3, 2 / 3, 1 - 2**-53], dtype=torch.float64)
    ids, _ = choose(torch.tensor(row).repeat(4, 1), Sampling(), ends)
    assert ids[[0, 3]].tolist() == [100, 599]
    assert set(ids.tolist()) <= {100, 300, 599}


def test_draws_are_functions_of_key_and_position_alone():
    bits = torch.tensor([key_bits((1, 2)), key_bits((1, 3)), key_bits((12, 3))])
    together = uniform(bits, torch.tensor([0, 0, 0]))
    assert len(set(together.tolist())) == 3
    assert uniform(bits[1:2], torch.tensor([0]))[0] == together[1]
    # SplitMix64's first three numbers from the state 0, as its reference implementation gives them.
    numbers = uniform(torch.zeros(3, dtype=torch.int64), torch.arange(3))
    known = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert numbers.tolist() == [(n >> 11) * 2.0**-53 for n in known]


def test_greedy_takes_the_likeliest_token_with_its_plain_probability():
    scores = torch.tensor([[0.0, 2.0, 1.0]])
    ids, logprobs = choose(scores.clone(), Sampling(temperature=0), torch.zeros(1, dtype=torch.float64))
    assert ids.tolist() == [1]
    assert logprobs[0] == pytest.approx(scores.log_softmax(1)[0, 1].item(), abs=1e-6)


@pytest.mark.parametrize("size", [3, 256, 300, 512, 1000])
def test_of_the_likeliest_tokens_greedy_takes_the_first(size):
    # Four values only: every row has ties, in one tile, in several and behind the last full one.
    draw = torch.Generator().manual_seed(0)
    scores = torch.randint(0, 4, (50, size), generator=draw).float()
    scores[:5], scores[:5, -1] = 0, 1
    expected = [row.index(max(row)) for row in scores.tolist()]
    logprobs = scores.log_softmax(1).max(1).values
    ids, drawn = choose(scores.clone(), Sampling(temperature=0), torch.zeros(50, dtype=torch.float64))
    assert ids.tolist() == expected
    # 1e-6: sums of up to 1000 numbers in another order.
    torch.testing.assert_close(drawn, logprobs, atol=1e-6, rtol=0)


def test_settings_without_a_meaning_are_refused_together():
    with pytest.raises(ValueError, match=r"tokens=0 must be at least 1; .*top_p=0 must be above 0"):
        Sampling(tokens=0, top_p=0)
