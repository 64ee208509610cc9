"""An interval of a flattened box is a few boxes, and they are its elements in order."""

import random

import torch

from trainer.parallel.boxes import box_of, boxes_of, intersection, part_of, volume


def test_an_interval_is_part_of_a_row_then_whole_rows_then_part_of_a_row():
    # Rows 10 .. 13 of columns 2 .. 6, five to a row: elements 3 .. 16 are 2 of the first, two rows, 2 of the last.
    assert list(boxes_of(((10, 14), (2, 7)), 3, 17)) == [
        ((10, 11), (5, 7)),
        ((11, 13), (2, 7)),
        ((13, 14), (2, 4)),
    ]
    assert list(boxes_of(((10, 14), (2, 7)), 6, 9)) == [((11, 12), (3, 6))]
    assert list(boxes_of(((4, 9),), 1, 3)) == [((5, 7),)]
    assert list(boxes_of(box_of((3, 2)), 0, 6)) == [((0, 3), (0, 2))]
    assert list(boxes_of(box_of(()), 0, 1)) == [((0, 1),)]
    assert list(boxes_of(box_of((3, 2)), 4, 4)) == []


def test_the_boxes_of_any_interval_are_its_elements_in_order():
    draw = random.Random(0)
    for _ in range(300):
        shape = [draw.randint(1, 5) for _ in range(draw.randint(1, 4))]
        tensor = torch.arange(volume(box_of(shape)))
        first, last = sorted(draw.randint(0, len(tensor)) for _ in range(2))
        boxes = list(boxes_of(box_of(shape), first, last))
        parts = [part_of(tensor, box_of(shape), box).reshape(-1) for box in boxes]
        assert torch.equal(torch.cat([*parts, tensor[:0]]), tensor[first:last])
        assert len(boxes) <= 2 * len(shape) - 1


def test_boxes_meet_in_a_box_or_not_at_all():
    assert intersection(((0, 4), (2, 7)), ((3, 9), (0, 3))) == ((3, 4), (2, 3))
    assert intersection(((0, 4), (2, 7)), ((4, 9), (0, 3))) is None
