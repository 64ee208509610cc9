"""How ranks are laid out, what they exchange along an axis with its gradient, and which part of a tensor is whose."""

from typing import Any

import pytest
import torch
from torch import nn

from tests.ranks import on_ranks
from trainer.parallel import distributed
from trainer.parallel.cuts import Cut, cut, cuts_of
from trainer.parallel.mesh import Mesh, MeshShape, lacks


def members() -> list[dict[str, tuple[int, ...]]]:
    """Of two layouts of four ranks, who is with this rank on each axis."""
    layouts = MeshShape(sequence=2, tensor=2), MeshShape(tensor=2, expert=2)
    return [{name: axis.members for name, axis in vars(Mesh.of(shape)).items()} for shape in layouts]


def test_tensor_ranks_are_neighbours_and_data_is_outermost():
    every = on_ranks(4, members)
    # (sequence, tensor) of ranks 0 to 3: (0, 0), (0, 1), (1, 0), (1, 1).
    assert [here[0]["tensor"] for here in every] == [(0, 1), (0, 1), (2, 3), (2, 3)]
    assert [here[0]["sequence"] for here in every] == [(0, 2), (1, 3), (0, 2), (1, 3)]
    assert {here[0]["vocabulary"] for here in every} == {(0, 1, 2, 3)}
    assert [here[0]["shards"] for here in every] == [(0, 2), (1, 3), (0, 2), (1, 3)]
    # (data, tensor): experts are divided among ranks that read different data.
    assert [here[1]["expert"] for here in every] == [(0, 2), (1, 3), (0, 2), (1, 3)]
    assert [here[1]["expert_shards"] for here in every] == [(0,), (1,), (2,), (3,)]


def exchanged() -> dict[str, Any]:
    """What each exchange gives rank r of two, and the gradient of the sum of r + 1 times that over both ranks."""
    axis = Mesh.of(MeshShape(tensor=2)).tensor
    results: dict[str, Any] = {}
    weight = axis.rank + 1.0
    actions = {
        "enter": axis.enter,
        "leave": axis.leave,
        "even": axis.even,
        "gather": lambda x: axis.gather(x, 0),
        "swap": lambda x: axis.swap(x, 0, 1),
        # Rank 0 sends nothing to itself and two rows to rank 1, which sends one to each.
        "exchange": lambda x: axis.exchange(x, [[0, 2], [1, 1]][axis.rank], [[0, 1], [2, 1]][axis.rank]),
    }
    for name, action in actions.items():
        x = (torch.arange(4.0).view(2, 2) + 10 * axis.rank).requires_grad_()
        out = action(x)
        (weight * out).sum().backward()
        results[name] = out.tolist(), x.grad.tolist()
    return results


def test_exchanges_and_their_gradients_are_those_of_one_rank():
    first, second = on_ranks(2, exchanged)
    ours, theirs = [[0.0, 1.0], [2.0, 3.0]], [[10.0, 11.0], [12.0, 13.0]]
    threes, ones, twos = ([[n] * 2] * 2 for n in (3.0, 1.0, 2.0))
    assert first["enter"] == (ours, threes)
    assert second["enter"] == (theirs, threes)
    total = [[10.0, 12.0], [14.0, 16.0]]
    assert first["leave"] == (total, ones)
    assert second["leave"] == (total, twos)
    assert first["even"] == (ours, [[0.5] * 2] * 2)
    assert second["even"] == (theirs, ones)
    assert first["gather"] == (ours + theirs, threes)
    assert second["gather"] == (ours + theirs, threes)
    # Rank 0 gets the first rows, whose gradient is once theirs; rank 1 the second ones, twice.
    assert first["swap"] == ([[0.0, 1.0, 10.0, 11.0]], [[1.0] * 2, [2.0] * 2])
    assert second["swap"] == ([[2.0, 3.0, 12.0, 13.0]], [[1.0] * 2, [2.0] * 2])
    assert first["exchange"] == ([[10.0, 11.0]], twos)
    assert second["exchange"] == ([*ours, [12.0, 13.0]], [[1.0] * 2, [2.0] * 2])


class Divided(nn.Module):
    """A matrix of 5 rows cut along them, one of 3 x 4 cut along its columns, two of 4 x 3 in a stack, and a vector."""

    def __init__(self, mesh: Mesh) -> None:
        super().__init__()
        self.rows = nn.Parameter(torch.empty(5, 2, device="meta"))
        self.columns = nn.Parameter(torch.empty(3, 4, device="meta"))
        self.stack = nn.Parameter(torch.empty(2, 4, 3, device="meta"))
        self.vector = nn.Parameter(torch.empty(3, device="meta"))
        cut(self, "rows", 0, mesh.tensor)
        cut(self, "columns", 1, mesh.tensor)
        cut(self, "stack", 0, mesh.tensor)


def parts() -> dict[str, Any]:
    mesh = Mesh.of(MeshShape(tensor=2))
    results = {}
    for name, own in cuts_of(Divided(mesh), mesh).items():
        values = torch.arange(float(torch.Size(own.shape).numel())).view(own.shape)
        assert torch.equal(own.joined(own.own(values)), values)
        results[name] = own.own(values).tolist(), *own.interval, own.copies.rank
    return results


def test_a_rank_has_rows_of_its_block_and_all_have_the_tensor_together():
    every = on_ranks(4, parts)
    # 5 rows in parts of 2 and 3; of 3 rows the first of two ranks has 2.
    rows = [here["rows"] for here in every]
    assert [r[1] for r in rows] == [((0, 2), (0, 2)), ((2, 5), (0, 2))] * 2
    assert [r[0] for r in rows] == [[[0.0, 1.0]], [[4.0, 5.0], [6.0, 7.0]], [[2.0, 3.0]], [[8.0, 9.0]]]
    assert [r[2] for r in rows] == [0, 0, 2, 4]
    columns = [here["columns"] for here in every]
    assert [c[0] for c in columns] == [
        [[0.0, 1.0], [4.0, 5.0]], [[2.0, 3.0], [6.0, 7.0]], [[8.0, 9.0]], [[10.0, 11.0]],
    ]  # fmt: skip
    # Two ranks have a matrix of the stack each, and with two more, which have the same, half of its rows.
    stacks = [here["stack"] for here in every]
    assert [s[1] for s in stacks] == [
        ((matrix, matrix + 1), (row, row + 2), (0, 3)) for row, matrix in ((0, 0), (0, 1), (2, 0), (2, 1))
    ]
    assert [(s[0][0][0][0], s[2]) for s in stacks] == [(0.0, 0), (12.0, 0), (6.0, 0), (18.0, 0)]
    # What tensor ranks have alike, the first of them counts and writes.
    assert [(here["vector"][0], here["vector"][3]) for here in every] == [
        ([0.0, 1.0], 0), ([0.0, 1.0], 1), ([2.0], 0), ([2.0], 1),
    ]  # fmt: skip


def test_what_one_rank_has_is_the_tensor():
    with distributed.session():
        own = Cut((3, 2)).on(Mesh.of(MeshShape()))
        values = torch.randn(3, 2)
        assert torch.equal(own.own(values), values)
        assert torch.equal(own.joined(values), values)


@pytest.mark.parametrize(
    ("shape", "ranks", "sentence"),
    [
        (MeshShape(tensor=2), 3, "divides a model among 2 ranks, and 3 are not a multiple; start 2 or 4"),
        (MeshShape(sequence=4), 2, "divides a model among 4 ranks, and 2 are not a multiple; start 4"),
        (MeshShape(tensor=2, expert=4), 4, "needs a multiple of 4 ranks with other tokens, and there are 2; use fewer"),
    ],
)
def test_ranks_that_cannot_be_laid_out_are_refused_with_the_remedy(shape, ranks, sentence):
    assert str(lacks(shape, ranks)).endswith(sentence)
    assert lacks(shape, shape.replica * 4) is None
