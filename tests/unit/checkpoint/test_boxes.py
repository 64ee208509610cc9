"""A tensor is read by whatever boxes and intervals, however those that wrote it had divided it."""

from pathlib import Path

import pytest
import torch

from trainer.checkpoint.folder import CheckpointError, FragmentFiles, Manifest, Stored, incomplete, write_fragments
from trainer.parallel.boxes import Box, box_of, part_of, volume

SHAPE = (6, 8)
TENSOR = torch.arange(48.0).view(SHAPE)
Cut = tuple[Box, int, int]
"""A box, and the first element and the number of elements of an interval of it."""

CUTS: dict[str, list[Cut]] = {
    "replica": [(box_of(SHAPE), 0, 48)],
    "flat": [(box_of(SHAPE), 0, 19), (box_of(SHAPE), 19, 29)],
    "columns": [(((0, 6), (0, 5)), 0, 30), (((0, 6), (5, 8)), 0, 18)],
    "rows of blocks": [
        (((0, 6), (0, 4)), 0, 16),
        (((0, 6), (0, 4)), 16, 8),
        (((0, 6), (4, 8)), 0, 16),
        (((0, 6), (4, 8)), 16, 8),
    ],
    "flat shards of blocks": [(((0, 3), (0, 8)), 0, 11), (((0, 3), (0, 8)), 11, 13), (((3, 6), (0, 8)), 0, 24)],
}


def written(folder: Path, cuts: list[Cut]) -> FragmentFiles:
    """A checkpoint of ``TENSOR`` in these pieces."""
    tensors, stored = {}, []
    for number, (box, start, size) in enumerate(cuts):
        flat = part_of(TENSOR.view(-1), box_of(SHAPE), box).reshape(-1)
        tensors[str(number)] = flat[start : start + size].clone()
        stored.append(Stored("f", str(number), "w", "param", box, start, size))
    write_fragments(folder / "f", tensors)
    assert list(incomplete({"w": SHAPE}, stored)) == []
    return FragmentFiles(folder, Manifest(1, 1, {}, {"w": [*SHAPE]}, stored, {}, {}, {}, {}))


@pytest.mark.parametrize("source", CUTS)
def test_what_one_layout_wrote_every_other_reads(source, tmp_path):
    files = written(tmp_path, CUTS[source])
    for cuts in CUTS.values():
        for box, start, size in cuts:
            out = torch.full((size,), torch.nan)
            files.read("w", "param", box, start, out)
            expected = part_of(TENSOR.view(-1), box_of(SHAPE), box).reshape(-1)[start : start + size]
            assert torch.equal(out, expected)
    assert torch.equal(files.full_tensor("w", "param", SHAPE), TENSOR)


def test_what_is_not_there_is_counted(tmp_path):
    files = written(tmp_path, CUTS["columns"])
    files._by_tensor["w", "param"].pop()
    with pytest.raises(CheckpointError, match=r"lacks 18 of 48 elements of w \(param\)"):
        files.read("w", "param", box_of(SHAPE), 0, torch.zeros(48))


def test_boxes_that_overlap_or_leave_a_gap_are_named():
    def piece(box: Box) -> Stored:
        return Stored("f", "0", "w", "param", box, 0, volume(box))

    left, right, wide = ((0, 6), (0, 5)), ((0, 6), (5, 8)), ((0, 6), (4, 8))
    assert list(incomplete({"w": SHAPE}, [piece(left), piece(right)])) == []
    assert list(incomplete({"w": SHAPE}, [piece(left)])) == ["w (param): boxes of 30 of 48 elements are there"]
    assert "have elements in common" in next(incomplete({"w": SHAPE}, [piece(left), piece(wide)]))
