"""A micro-batch on its way to a device: everything arrives as it was, in one piece."""

from dataclasses import dataclass

import torch

from trainer.batch import Batch, Documents, on_device, packed, unpacked


def test_tensors_of_any_shape_and_format_share_one_copy():
    tensors = [
        torch.tensor(3.5, dtype=torch.float64), torch.arange(7), torch.tensor([True, False, True]), torch.zeros(0, 4),
        torch.arange(6, dtype=torch.int32).view(2, 3).T, torch.tensor([[1.5, -2.0]], dtype=torch.bfloat16),
    ]  # fmt: skip
    memory = packed(tensors, pin=False)
    # By hand: 8, 56, 3, 0, 24 and 4 bytes, each rounded up to 16.
    assert memory.nbytes == 16 + 64 + 16 + 0 + 32 + 16
    for arrived, sent in zip(unpacked(memory, tensors), tensors, strict=True):
        assert arrived.dtype is sent.dtype
        assert torch.equal(arrived, sent)


class Elsewhere:
    """Something with a way of its own to a device."""

    def __init__(self, device: str = "nowhere") -> None:
        self.device = device

    def to(self, device: torch.device) -> "Elsewhere":
        return Elsewhere(str(device))


@dataclass
class Nested(Batch):
    documents: Documents
    other: Elsewhere
    values: torch.Tensor | None = None
    name: str = "x"


def test_all_that_a_batch_holds_moves_but_its_rows():
    meta = torch.device("meta")
    moved = on_device(Nested(torch.arange(2), Documents.from_lengths([3, 1], 1), Elsewhere(), torch.ones(3)), meta)
    assert [moved.rows.device.type, moved.values.device.type, moved.other.device] == ["cpu", "meta", "meta"]
    assert moved.documents.offsets.device == moved.documents.positions.device == meta
    assert (moved.documents.lengths, moved.name) == ((3, 1), "x")
    assert Nested(torch.arange(2), Documents.from_lengths([3, 1], 1), Elsewhere()).to(meta).values is None
