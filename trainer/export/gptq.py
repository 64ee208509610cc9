"""GPTQ (Frantar et al. 2022, arXiv:2210.17323): matrices on a grid of integers that change what their layer gives the least.

The columns of a matrix are rounded one after another, and what each is off by is made up for by those that are still to come,
as far as the layer's inputs let one column stand in for another. The inputs are measured on calibration rows, block by block:
one block of weights is in memory, and it reads what the blocks before it give once they are rounded.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trainer.batch import Documents
from trainer.config import InputError
from trainer.export.matrices import Matrix
from trainer.models.architecture import Architecture, Layer
from trainer.models.context import PackedContext
from trainer.models.int_grid import dequantise, scales
from trainer.models.rope import angles, frequencies, growth
from trainer.models.self_attention import Turned
from trainer.models.stored import StoredWeights
from trainer.models.transformer import Block

log = logging.getLogger(__name__)

DAMPING = (0.01, 0.1, 1.0)
"""Shares of the mean of its diagonal that are added to a Hessian's; the first with which it can be inverted is taken."""
SHARES = (1.0, 0.95, 0.9, 0.85, 0.8)
"""Of the step with which a group's largest weight has a code: the steps that are tried."""
COLUMNS = 128
"""Columns that are rounded before the others hear of it: one product for all of them instead of one for each."""
FORWARD = 4096
"""Tokens of a forward."""


def gptq(weight: Tensor, hessian: Tensor, bits: int, scale: Tensor) -> Tensor:
    """Codes ``(o, i)`` int8 of a ``weight`` ``(o, i)`` on the grid that ``scale`` ``(o, groups)`` spans.

    ``hessian`` ``(i, i)``: the sum of ``x x^T`` over what the layer reads. The column with the largest inputs goes first;
    groups are those of neighbouring columns all the same, so that nothing of the order need be stored.

    Raises:
        ValueError: if the Hessian has values that are no numbers.
    """
    order = hessian.diagonal().argsort(descending=True)
    factor = _inverse_factor(hessian[order][:, order])
    # Columns as rows: what is read and written together lies together, which takes half the time.
    left = weight[:, order].T.contiguous()
    steps = scale.to(weight.dtype)[:, order // (len(order) // scale.shape[1])].T.contiguous()
    codes, low, high = torch.empty_like(left), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    for first in range(0, len(order), COLUMNS):
        last = min(first + COLUMNS, len(order))
        errors = torch.empty_like(left[first:last])
        for n in range(first, last):
            torch.div(left[n], steps[n], out=codes[n]).round_().clamp_(low, high)
            errors[n - first] = (left[n] - codes[n] * steps[n]) / factor[n, n]
            left[n + 1 : last].addr_(factor[n, n + 1 : last], errors[n - first], alpha=-1)
        left[last:].addmm_(factor[first:last, last:].T, errors, alpha=-1)
    out = torch.empty_like(weight, dtype=torch.int8)
    out[:, order] = codes.T.to(torch.int8)
    return out


def clipped_scales(weight: Tensor, squares: Tensor, bits: int, group: int) -> Tensor:
    """Those of `scales`, or `SHARES` of them, bfloat16 ``(o, groups)``: each with the least error of its group.

    A smaller step clips a group's largest weights and rounds the others less. ``squares`` ``(i,)``: how large the square of
    every input is, which a weight's squared error counts by.
    """
    widest = scales(weight, bits, group).float()
    rows, squares = weight.view(*widest.shape, -1), squares.view(widest.shape[1], -1)
    best = widest.bfloat16()
    least = torch.full_like(widest, torch.inf)
    for share in SHARES:
        scale = (share * widest).bfloat16()
        step = scale.to(weight.dtype)[..., None]
        codes = (rows / step).round_().clamp_(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        error = (squares * (codes * step - rows).square_()).sum(-1)
        best, least = torch.where(error < least, scale, best), torch.minimum(error, least)
    return best


def _inverse_factor(hessian: Tensor) -> Tensor:
    """The upper triangular U with ``U^T U`` the inverse of a damped Hessian (section 3.3, step 3)."""
    size = hessian.diagonal()
    mean = size.mean().clamp(min=torch.finfo(hessian.dtype).tiny)
    # An input that is always 0 tells nothing of its column, which is rounded alone.
    own = torch.where(size == 0, mean, 0.0)
    for damping in DAMPING:
        lower, wrong = torch.linalg.cholesky_ex(hessian + (own + damping * mean).diag())
        if wrong:
            continue
        upper: Tensor
        upper, wrong = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
        if not wrong and upper.isfinite().all():
            return upper
    raise ValueError("what its layer reads of the calibration rows has values that are no numbers")


def calibrated(
    stored: StoredWeights, matrices: Sequence[Matrix], bits: int, group: int, rows: Sequence[Sequence[int]]
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Name, codes and scales of all ``matrices``, rounded by `gptq` on what they read of token ``rows``.

    It computes on the GPU if there is one, a block at a time.

    Raises:
        InputError: at once, if the rows hold no token, or one that the model does not have.
    """
    return _block_by_block(stored, matrices, bits, group, _batches(rows, stored.architecture.vocab_size))


@torch.no_grad()
def _block_by_block(
    stored: StoredWeights, matrices: Sequence[Matrix], bits: int, group: int, batches: Sequence[_Batch]
) -> Iterator[tuple[str, Tensor, Tensor]]:
    # As it is computed where documents are of this length (longrope).
    a = dataclasses.replace(stored.architecture, longest=max(max(batch.documents.lengths) for batch in batches))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    states = _embedded(stored, batches)
    for number, layer in enumerate(a.layers):
        block, begin = _block(stored, number, device), f"model.layers.{number}."
        inputs = _BlockInputs(a, layer, batches, device)
        hessians = _hessians(block, inputs, states)
        for matrix in (matrix for matrix in matrices if matrix.ours[0].startswith(begin)):
            weight = stored.files.tensor(matrix.name).to(device, torch.float32)
            hessian = hessians[matrix.ours[0].removeprefix(begin).removesuffix(".weight")]
            scale = clipped_scales(weight, hessian.diagonal(), bits, group)
            try:
                codes = gptq(weight, hessian, bits, scale)
            except ValueError as error:
                raise InputError(f"{stored.files.folder}: {matrix.name}: {error}") from None
            _replace(block, begin, stored, matrix, dequantise(codes, scale))
            yield matrix.name, codes.cpu(), scale.cpu()
        states = [block(x, *given).cpu() for x, given in inputs.of(states)]
        log.info("GPTQ: block %d of %d", number + 1, len(a.layers))


@dataclass(frozen=True)
class _Batch:
    """Rows end to end. ``tokens`` ``(1, T)``."""

    tokens: Tensor
    documents: Documents


def _batches(rows: Sequence[Sequence[int]], vocabulary: int) -> list[_Batch]:
    """Rows in their order, in forwards of at most `FORWARD` tokens, or of one longer row."""
    together: list[list[Sequence[int]]] = []
    room = 0
    for row in filter(len, rows):
        if len(row) > room:
            together.append([])
            room = FORWARD
        together[-1].append(row)
        room -= len(row)
    if not together:
        raise InputError(
            "int4 (GPTQ) measures what layers read on rows of tokens, and there are none; name some by --calibration "
            "FILE.jsonl, or use int4-rtn"
        )
    if wrong := [token for row in rows for token in row if not 0 <= token < vocabulary]:
        raise InputError(
            f"a calibration row holds token {wrong[0]}, and the model has {vocabulary}; use its own tokenizer"
        )
    return [
        _Batch(
            torch.tensor([[token for row in some for token in row]]),
            Documents.from_lengths([len(row) for row in some], 1),
        )
        for some in together
    ]


def _embedded(stored: StoredWeights, batches: Sequence[_Batch]) -> list[Tensor]:
    table = stored.tensor("model.embed_tokens.weight")
    return [F.embedding(batch.tokens, table).float() * stored.architecture.embedding_scale for batch in batches]


def _block(stored: StoredWeights, number: int, device: torch.device) -> Block:
    with torch.device("meta"):
        block = Block(stored.architecture, number)
    block = block.to_empty(device=device).eval()
    for name, parameter in block.named_parameters():
        parameter.copy_(stored.tensor(f"model.layers.{number}.{name}"))
    return block


class _BlockInputs:
    """What a block is called with beside the residual stream."""

    def __init__(self, a: Architecture, layer: Layer, batches: Sequence[_Batch], device: torch.device) -> None:
        self.layer, self.batches, self.device = layer, batches, device
        self.rotation = None if layer.rope is None else frequencies(layer.rope, a)

    def of(self, states: Sequence[Tensor]) -> Iterator[tuple[Tensor, tuple[Turned, PackedContext]]]:
        """Each of the ``states`` ``(1, T, d)`` on the device, and the rest."""
        for x, batch in zip(states, self.batches, strict=True):
            documents = batch.documents.to(self.device)
            yield x.to(self.device), (self._turned(documents.positions), PackedContext(documents))

    def _turned(self, positions: Tensor) -> Turned:
        if self.layer.rope is None or self.rotation is None:
            return ()
        inverse, factor = self.rotation
        turned = angles(inverse.to(self.device), factor, positions, torch.float32)
        return (*turned, *growth(self.layer.rope, positions, torch.float32))


def _hessians(block: Block, inputs: _BlockInputs, states: Sequence[Tensor]) -> dict[str, Tensor]:
    """By linear layer the sum of ``x x^T`` over all tokens; layers that read the same share it."""
    sums: dict[str, Tensor] = {}
    first: dict[str, str] = {}
    for x, given in inputs.of(states):
        read = _read_by_layer(block, x, given)
        first = first or {name: next(n for n, other in read.items() if other is x) for name, x in read.items()}
        for name in dict.fromkeys(first.values()):
            tokens = read[name].flatten(0, -2).float()
            sums.setdefault(name, tokens.new_zeros(tokens.shape[1], tokens.shape[1])).addmm_(tokens.T, tokens)
    return {name: sums[other] for name, other in first.items()}


def _read_by_layer(block: Block, x: Tensor, given: tuple[Turned, PackedContext]) -> dict[str, Tensor]:
    read: dict[str, Tensor] = {}
    hooks = [
        module.register_forward_pre_hook(lambda _, inputs, name=name: read.update({name: inputs[0]}))
        for name, module in block.named_modules()
        if isinstance(module, nn.Linear)
    ]
    try:
        block(x, *given)
    finally:
        for hook in hooks:
            hook.remove()
    return read


def _replace(block: Block, begin: str, stored: StoredWeights, matrix: Matrix, weight: Tensor) -> None:
    """Let a block compute with what a matrix of the folder has become."""
    for name in matrix.ours:
        source = stored.family.source(name, stored.architecture, stored.files.files)
        parameter = block.get_parameter(name.removeprefix(begin))
        parameter.copy_(source.load([weight], stored.architecture)[source.place])
