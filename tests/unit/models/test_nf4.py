"""NF4: the bytes are bitsandbytes' own, what they stand for is the formula's, and a frozen product has its gradient."""

import json
import logging
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from trainer.config import ConfigError
from trainer.functional import bitsandbytes
from trainer.models.nf4 import BITS, FrozenProduct, Packed, pack, packed_sizes, unpack
from trainer.models.packed import PackedWeight
from trainer.parallel.cuts import cuts
from trainer.parallel.mesh import UNDIVIDED, Axis

pytest.importorskip("bitsandbytes")
SHAPES = [(64, 64), (32, 48), (7, 10), (3, 5), (5, 7, 3), (576, 192)]


def weight(shape, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) / 20


@pytest.mark.parametrize("shape", SHAPES)
def test_packed_bytes_are_those_of_bitsandbytes(shape):
    import bitsandbytes.functional as theirs

    w = weight(shape)
    packed = pack(w)
    codes, state = theirs.quantize_4bit(w, blocksize=64, compress_statistics=True, quant_type="nf4")
    assert torch.equal(packed.codes, codes.flatten())
    assert torch.equal(packed.maxima, state.absmax)
    assert packed.numbers.view(torch.float32).tolist() == [*state.state2.absmax.tolist(), state.offset.item()]
    assert [part.shape for part in packed] == [part.shape for part in packed_sizes(w.numel())]
    assert all(torch.equal(a, b) for a, b in zip(packed, pack(w.clone()), strict=True))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_packed_weight_stands_for_what_the_formula_says(shape, dtype):
    import bitsandbytes.functional as theirs

    packed = pack(weight(shape))
    levels, numbers = theirs.create_dynamic_map().float(), packed.numbers.view(torch.float32)
    values = theirs.get_4bit_type("nf4", device="cpu")
    count = weight(shape).numel()
    codes = torch.stack([packed.codes >> 4, packed.codes & 15], 1).flatten()[:count].long()
    blocks = torch.arange(len(packed.maxima))
    largest = levels[packed.maxima.long()] * numbers[blocks // 256] + numbers[-1]
    expected = (values[codes] * largest[torch.arange(count) // 64]).view(shape).to(dtype)
    assert torch.equal(unpack(packed, shape, dtype), expected)


def test_two_matrices_of_a_large_layer_take_the_bits_that_are_said():
    packed = packed_sizes(4096 * 14336)
    # Half a byte a weight, a byte of 64 of them, four bytes of 64 * 256.
    assert sum(part.numel() for part in packed) * 8 / (4096 * 14336) == pytest.approx(BITS, abs=1e-6)
    assert pytest.approx(4.127, abs=1e-3) == BITS


def test_the_16_bit_form_of_a_weight_packs_to_the_bytes_of_its_32_bit_form():
    w = weight((48, 64)).bfloat16()
    assert pack(w).digest() == pack(w.float()).digest() != pack(weight((48, 64), seed=1)).digest()


def test_bytes_at_an_odd_address_are_read_all_the_same():
    packed = pack(weight((32, 48)))
    moved = Packed(*(torch.cat([part.new_zeros(1), part])[1:] for part in packed))
    assert torch.equal(unpack(moved, (32, 48), torch.float32), unpack(packed, (32, 48), torch.float32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_frozen_product_and_its_gradient_are_those_of_the_unpacked_weight(dtype):
    packed, bias = pack(weight((48, 32))), weight((48,), seed=2).to(dtype)
    plain = unpack(packed, (48, 32), dtype)
    mine, theirs = (weight((6, 32), seed=1).to(dtype).requires_grad_() for _ in range(2))
    ours = FrozenProduct.apply(mine, bias, (48, 32), (), *packed)
    expected = F.linear(theirs, plain, bias)
    ours.square().sum().backward()
    expected.square().sum().backward()
    assert torch.equal(ours, expected)
    assert torch.equal(mine.grad, theirs.grad)


def test_without_the_library_it_is_refused_with_the_extra_s_name(monkeypatch):
    monkeypatch.setattr(bitsandbytes, "PACKAGE", "no_such_package")
    bitsandbytes.library.cache_clear()
    with pytest.raises(ConfigError, match=r"NF4 needs the package .*: pip install 'onecurve\[quant\]'"):
        pack(weight((4, 4)))
    monkeypatch.undo()
    bitsandbytes.library.cache_clear()


def test_the_library_asks_nobody_for_more_packages():
    pack(weight((4, 4)))
    assert not logging.getLogger("bitsandbytes.backends.cpu.ops").isEnabledFor(logging.WARNING)
    assert json.dumps(pack(weight((4, 4))).digest())


def part_of(packed: Packed, shape: tuple[int, ...], dim: int, axis: Axis) -> PackedWeight:
    """What a rank has of a packed weight."""
    weight = PackedWeight(shape)
    weight.cut(dim, axis)
    for name, values in packed._asdict().items():
        values = weight.laid_out(name, values)
        if name in cuts(weight):
            values = replace(cuts(weight)[name], shards=UNDIVIDED).own(values)
        weight.get_parameter(name).copy_(values)
    return weight


@pytest.mark.parametrize(("shape", "dim"), [((96, 1024), 0), ((96, 1024), 1), ((4, 96, 320), 0)])
def test_ranks_have_parts_of_a_packed_weight_bit_for_bit(shape, dim):
    # Each is 6 or 7.5 groups of 256 maxima; parts begin within some.
    w = weight(shape)
    packed = pack(w)
    every = unpack(packed, shape, torch.float32)
    for rank in range(4):
        part = part_of(packed, shape, dim, Axis(rank, 4))
        assert torch.equal(part.unpacked(torch.float32), every.chunk(4, dim)[rank])
        assert torch.equal(part.own(w), w.chunk(4, dim)[rank])
        assert part.codes.numel() * 8 == w.numel()
    if w.ndim == 3:
        return
    inputs, bias = every.shape[1] // 4 if dim else every.shape[1], torch.randn(1)
    x, other = (torch.randn(3, inputs, generator=torch.Generator().manual_seed(1)).requires_grad_() for _ in range(2))
    out, expected = part(x, bias), F.linear(other, every.chunk(4, dim)[3], bias)
    out.square().sum().backward()
    expected.square().sum().backward()
    assert torch.equal(out, expected)
    assert torch.equal(x.grad, other.grad)


def test_a_part_that_would_divide_blocks_is_no_part():
    with pytest.raises(ValueError, match="4 ranks divide blocks of NF4"):
        PackedWeight((8, 128)).cut(1, Axis(0, 4))
