"""Readers of a vocabulary that ranks divide give what they give of all of it, and bitwise the same on every rank."""

from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.ranks import on_ranks
from trainer import functional
from trainer.functional import Head, VocabularyPart, correct, cross_entropy, logits, logprobs, objective
from trainer.parallel import distributed

ROWS = 37
SPANS = {2: ((0, 18), (18, 37)), 4: ((0, 9), (18, 27), (9, 18), (27, 37))}
"""Of 37 rows, not divisible; those of 4 ranks as sequence x tensor lay them out, where the second rank's begin at 18."""


@dataclass(frozen=True)
class Neighbours:
    """Ranks that follow each other."""

    size: int

    def stack(self, x: Tensor) -> Tensor:
        first = distributed.world().rank // self.size * self.size
        return distributed.stack(x)[first : first + self.size]


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(3)
    hidden = torch.randn(2, 11, 8, generator=draw).to(dtype)
    weight = torch.randn(ROWS, 8, generator=draw).to(dtype)
    targets = torch.randint(0, ROWS, (2, 11), generator=draw)
    mask = (torch.rand(2, 11, generator=draw) < 0.6).to(torch.float32)
    return hidden, weight, targets, mask


def objective_of(read):
    """A reader whose values are its loss and statistics; its gradient is that of three times the loss."""

    def values(hidden, head, targets, mask):
        loss, nll, z = read(hidden, head, targets=targets, mask=mask)
        return 3 * loss, [loss, nll, z]

    return values


def mixed(kept: int, entropies: bool, temperature: float):
    """Log-probabilities under a gradient of either sign, that of entropies beside it or not."""

    def values(hidden, head, targets, mask):
        functional.KEPT_BYTES = kept
        both = logprobs(hidden, head, targets=targets, temperature=temperature)
        up, down = torch.randn(2, *targets.shape, generator=torch.Generator().manual_seed(5))
        return (both[0] * up).sum() + (both[1] * down).sum() * entropies, list(both)

    return values


READERS = {
    "cross-entropy": objective_of(cross_entropy),
    "z-loss and smoothing": objective_of(partial(cross_entropy, z_loss=0.02, label_smoothing=0.3)),
    "places": objective_of(
        lambda h, head, targets, mask: cross_entropy(
            h, head, targets=targets, mask=mask, places=mask.flatten().nonzero().squeeze(1)
        )
    ),
    "log-probabilities kept": mixed(1 << 20, False, 1.0),
    "log-probabilities computed again": mixed(0, False, 0.7),
    "entropies": mixed(1 << 20, True, 0.7),
}


def read(reader, hidden, head_of, weight, targets, mask):
    """Values of a reader, and the gradients of hidden states and weight."""
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    up, values = reader(hidden, head_of(weight), targets, mask)
    up.backward()
    return [t.detach() for t in values], hidden.grad, weight.grad


def compared(ranks: int, cap: float | None) -> list[str]:
    """What differs from the undivided readers by more than it may."""
    own = VocabularyPart(SPANS[ranks], distributed.world().rank % ranks, Neighbours(ranks))
    first, last = own.span
    hidden, weight, targets, mask = inputs()
    wrong = []
    for name, reader in READERS.items():
        values, grad_hidden, grad_weight = read(reader, hidden, lambda w: Head(w, cap), weight, targets, mask)
        divided = read(reader, hidden, lambda w: Head(w, cap, own), weight[first:last], targets, mask)
        # The hidden states' gradient is a sum over the ranks.
        summed = own.across.stack(divided[1]).sum(0)
        pairs = [*zip(divided[0], values, strict=True), (summed, grad_hidden), (divided[2], grad_weight[first:last])]
        for number, (mine, theirs) in enumerate(pairs):
            # 2e-6 of the largest: a sum of 37 float32 terms (and of 22 tokens) in another order.
            if (mine - theirs).abs().max() > 2e-6 * theirs.abs().max().clamp(min=1):
                wrong.append(f"{ranks} ranks, cap {cap}, {name}, {number}: {(mine - theirs).abs().max():.1e}")
        every = [own.across.stack(t.reshape(-1)) for t in divided[0]]
        wrong += [f"{name}: not the same on all ranks" for t in every if not all(torch.equal(t[0], o) for o in t)]
    return wrong


def all_compared() -> list[str]:
    wrong = []
    for place in ("blocks", "in place"):
        for sizes in ((500, 1500), (1 << 20, 1 << 26)):
            with ExitStack() as stack:
                patch = stack.enter_context(pytest.MonkeyPatch.context())
                patch.setattr(functional.chunks, "BLOCK_BYTES", {"cpu": sizes[0]})
                patch.setattr(functional.chunks, "GROUP_BYTES", {"cpu": sizes[1]})
                patch.setattr(functional, "KEPT_BYTES", 0)
                patch.setattr(objective, "IN_PLACE", {"cpu"} if place == "in place" else set())
                for ranks in (2, 4):
                    wrong += [f"{place}: {text}" for cap in (None, 1.5) for text in compared(ranks, cap)]
    return wrong


def test_every_reader_of_a_part_gives_what_it_gives_of_all():
    assert on_ranks(4, all_compared) == [[]] * 4


def joined() -> tuple[bool, list[int], str]:
    """Whether logits are those of all, ids that are likeliest (equal ones too), and what asking for a gradient says."""
    own = VocabularyPart(SPANS[4], distributed.world().rank, Neighbours(4))
    first, last = own.span
    hidden, weight, targets, mask = inputs()
    with torch.no_grad():
        together = logits(hidden, Head(weight[first:last], 1.5, own))
    # A product with fewer columns is summed in another order.
    near = torch.allclose(together, logits(hidden, Head(weight, 1.5)), rtol=0, atol=1e-6)
    # Rows 3, 20 and 30 are alike: the largest logits of a token that looks like them, on three ranks.
    weight[[3, 20, 30]] = 2.0
    alike = torch.ones(1, 1, 8)
    hits = [
        int(correct(alike, Head(weight[first:last], part=own), targets=torch.tensor([[n]]), mask=torch.ones(1, 1)))
        for n in (3, 20, 30)
    ]
    both = [
        correct(hidden, head, targets=targets, mask=mask) for head in (Head(weight), Head(weight[first:last], part=own))
    ]
    assert both[0] == both[1]
    try:
        logits(hidden, Head(weight[first:last].requires_grad_(), part=own))
    except RuntimeError as error:
        return near, hits, str(error)
    return near, hits, ""


def test_logits_are_joined_and_the_first_of_equal_maxima_counts():
    refused = "logits of a divided vocabulary have no gradient: read log-probabilities instead"
    assert on_ranks(4, joined) == [(True, [1, 0, 0], refused)] * 4


def half_precision() -> list[float]:
    """How far bfloat16 gradients of a part are from those of all, by the largest."""
    own = VocabularyPart(SPANS[2], distributed.world().rank, Neighbours(2))
    first, last = own.span
    hidden, weight, targets, mask = inputs(torch.bfloat16)
    errors = []
    for place in (set(), {"cpu"}):
        objective.IN_PLACE = place
        for name in ("z-loss and smoothing", "log-probabilities kept", "entropies"):
            _, _, whole = read(READERS[name], hidden, Head, weight, targets, mask)
            _, _, mine = read(READERS[name], hidden, lambda w: Head(w, part=own), weight[first:last], targets, mask)
            errors.append(((mine - whole[first:last]).abs().max() / whole.abs().max()).item())
    return errors


def test_gradients_of_a_part_are_those_of_all_in_bfloat16():
    # bfloat16 holds 8 bits: one rounding of a gradient is 0.4% of it.
    assert max(max(errors) for errors in on_ranks(2, half_precision)) < 8e-3


def test_extreme_logits_on_another_rank_neither_overflow_nor_vanish():
    """Three parts, of which the other ranks' numbers are given: only the last one has the large logits."""

    class Given:
        size = 2

        def stack(self, x: Tensor) -> Tensor:
            return torch.stack([x, torch.tensor([[1e4], [1.0], [0.0]])])

    own = VocabularyPart(((0, 1), (1, 2)), 0, Given())
    hidden, weight = torch.tensor([[[1e4, 0.0]]], requires_grad=True), torch.tensor([[-1.0, 0.0]], requires_grad=True)
    loss, _, _ = cross_entropy(hidden, Head(weight, part=own), targets=torch.tensor([[0]]), mask=torch.ones(1, 1))
    assert loss.item() == pytest.approx(2e4)
    loss.backward()
    assert torch.equal(weight.grad, torch.tensor([[-1e4, 0.0]]))  # p = 0: only the target pulls
    assert F.cross_entropy(torch.tensor([[-1e4, 1e4]]), torch.tensor([0])).item() == 2e4
