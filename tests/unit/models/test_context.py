"""What of packed documents each rank has where they are divided."""

import torch

from trainer.batch import Documents
from trainer.models.context import DividedContext, PackedContext, vocabulary_part
from trainer.parallel.mesh import UNDIVIDED, Axis, Mesh

WITHOUT_PADDING = Documents.from_lengths([5, 2, 4, 3], 2)


def part(rank: int, documents: Documents) -> DividedContext:
    return DividedContext(PackedContext(documents), (2, 7), Axis(rank, 4))


def test_ranks_have_consecutive_tokens_of_all_rows_and_the_last_one_spare_ones():
    positions = [part(rank, WITHOUT_PADDING).positions.tolist() for rank in range(4)]
    assert positions == [[[0, 1, 2, 3]], [[4, 0, 1, 0]], [[1, 2, 3, 0]], [[1, 2, 0, 0]]]


def test_spare_tokens_and_padding_are_not_real():
    assert part(3, WITHOUT_PADDING).real.tolist() == [[True, True, False, False]]
    real = torch.tensor([[True] * 5 + [False] * 2, [True] * 7])
    padded = Documents(**{**vars(WITHOUT_PADDING), "real": real})
    assert part(1, padded).real.tolist() == [[True, False, False, True]]
    assert DividedContext(PackedContext(WITHOUT_PADDING), (2, 7), Axis(0, 2)).real is None


def test_experts_count_a_token_as_often_as_it_is_read_and_padding_never():
    places = torch.tensor([3, 4, 4, 5, 7, 13])
    assert part(1, WITHOUT_PADDING).times_read(places).tolist() == [[2, 1, 0, 1]]
    real = torch.tensor([[True] * 5 + [False] * 2, [True] * 7])
    padded = Documents(**{**vars(WITHOUT_PADDING), "real": real})
    assert part(1, padded).times_read(places).tolist() == [[2, 0, 0, 1]]
    assert part(3, padded).times_read(places).tolist() == [[0, 1, 0, 0]]  # and nobody reads spare tokens


def test_each_tensor_rank_s_rows_of_the_vocabulary_are_divided_among_the_sequence_ranks():
    def mesh(s: int, t: int) -> Mesh:
        return Mesh(UNDIVIDED, Axis(s, 2), Axis(t, 2), UNDIVIDED, Axis(s, 2), Axis(s, 2), Axis(2 * s + t, 4))

    spans = ((0, 9), (18, 27), (9, 18), (27, 37))  # 37 rows: 18 and 19, and the halves of each
    for s in range(2):
        for t in range(2):
            joined = vocabulary_part(37, mesh(s, t), joined=True)
            assert (joined.spans, joined.span) == (spans, spans[2 * s + t])
            assert vocabulary_part(37, mesh(s, t), joined=False).span == ((0, 18), (18, 37))[t]
    assert joined.largest == 10
