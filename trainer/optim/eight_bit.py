"""AdamW whose moments take a byte an element (Dettmers et al. 2022, arXiv:2110.02861), stepped by bitsandbytes' kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from trainer.functional.bitsandbytes import library

BLOCK = 256
"""Elements that share a factor: bitsandbytes' own."""
SMALLEST = 4096
"""Elements of the smallest matrix whose moments are in 8 bits: bitsandbytes' own."""
BOUND = 0.0071
"""Most that rounding moves an element, as a part of its block's maximum: half of the widest step between two values."""
PIECE = {"cpu": 2**22, "cuda": 2**24}
"""Elements that are updated at once: a CPU decodes them, and kernels count them in 32 bits."""
PAGED = 100_000
"""Elements of the smallest moment that is paged: bitsandbytes' own."""


class Moment:
    """A moment of a tensor: of each element the place of a value in a table, of each block of 256 what it is multiplied by.

    Args:
        codes: Places, uint8, of the tensor's shape; in memory of a device, or in pages that CUDA moves.
        table: ``(256,)`` ascending values from -1 or 0 to 1, where the tensor is.
    """

    def __init__(self, codes: Tensor, table: Tensor) -> None:
        self.codes, self.table = codes, table
        self.maxima = torch.zeros(-(-codes.numel() // BLOCK), device=table.device)
        self._incoming: Tensor | None = None

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.maxima.nbytes

    def values(self, first: int, last: int) -> Tensor:
        """Elements ``first`` .. ``last`` in float32, as a checkpoint has them.

        The signed table ends at -0.993 and 1. An element at its lower end is given as -1 times its block's maximum, which is
        what the element that made this maximum was. So every maximum can be read off the values: `settle` finds the same
        bytes again.
        """
        codes = self.codes.view(-1)[first:last]
        if codes.device != self.maxima.device:  # paged: read on the host, after what the device writes
            torch.cuda.synchronize()
            codes = codes.to(self.maxima.device)
        low, high = first // BLOCK, -(-last // BLOCK)
        factors = self.maxima[low:high].repeat_interleave(BLOCK)[first - low * BLOCK : last - low * BLOCK]
        table = self.table.clone()
        table[0].round_()
        return table[codes.int()] * factors

    def incoming(self, first: int, last: int) -> Tensor:
        """Room in CPU memory for elements ``first`` .. ``last``, which `settle` takes; what nobody writes is 0."""
        if self._incoming is None:
            self._incoming = torch.zeros(self.codes.numel())
        return self._incoming[first:last]

    def settle(self) -> float:
        """Hold what was written to `incoming`; gives the most that it moved an element, as a part of its block's maximum."""
        if self._incoming is None:
            return 0.0
        values, self._incoming = self._incoming, None
        piece = PIECE["cpu"]
        return max(
            self._encode(at, values[at : at + piece].to(self.table.device)) for at in range(0, len(values), piece)
        )

    def _encode(self, first: int, values: Tensor) -> float:
        size, blocks = len(values), -(-len(values) // BLOCK)
        rows = torch.nn.functional.pad(values, (0, blocks * BLOCK - size)).view(blocks, BLOCK)
        maxima = rows.abs().amax(1, keepdim=True)
        divisors = torch.where(maxima > 0, maxima, 1.0)
        codes = torch.bucketize(rows / divisors, (self.table[1:] + self.table[:-1]) / 2, out_int32=True)
        moved = (self.table[codes] * maxima - rows).abs() / divisors
        self.codes.view(-1)[first : first + size].copy_(codes.view(-1)[:size])
        self.maxima[first // BLOCK :][:blocks].copy_(maxima[:, 0])
        return float(torch.where(rows == -maxima, 0.0, moved).max())


class EightBitAdamW(torch.optim.AdamW):
    """PyTorch's fused AdamW; in groups with ``eight_bit``, bitsandbytes' AdamW8bit.

    Like the fused one it divides gradients by ``grad_scale`` and does nothing where ``found_inf`` is 1. bitsandbytes'
    kernels know neither: the gradient is divided in a pass of its own, and the host asks the device once a step whether to
    go on. Undoing a step on the device instead would move three times the bytes that a step moves.

    Args:
        paged: Keep large moments in pages that CUDA moves to CPU memory where the device's is full.
    """

    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None

    def __init__(self, groups: Any, *, lr: float, betas: tuple[float, float], eps: float, paged: bool = False) -> None:
        super().__init__(groups, lr=lr, betas=betas, eps=eps, fused=True)
        self.paged, self._tables = paged, dict[torch.device, tuple[Tensor, Tensor]]()

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None if closure is None else closure()
        groups = self.param_groups
        narrow = [(g, p) for g in groups if g["eight_bit"] for p in g["params"] if p.grad is not None]
        if narrow and not (self.found_inf is not None and bool(self.found_inf)):
            for group, parameter in narrow:
                self._update(group, parameter)
            if self.paged:
                torch.cuda.synchronize()  # as bitsandbytes does: pages move beside the stream
        self.param_groups = [g for g in groups if not g["eight_bit"]]
        try:
            super().step()
        finally:
            self.param_groups = groups
        return loss

    def created(self, parameter: Tensor) -> dict[str, Any]:
        """The state of a parameter in 8 bits before its first step. Steps are counted on the host."""
        signed, unsigned = self._tables_on(parameter.device)
        return {
            "step": torch.zeros(()),
            "exp_avg": Moment(self._codes(parameter), signed),
            "exp_avg_sq": Moment(self._codes(parameter), unsigned),
        }

    def _update(self, group: dict[str, Any], parameter: Tensor) -> None:
        if not (state := self.state[parameter]):
            state.update(self.created(parameter))
        state["step"] += 1
        if self.grad_scale is not None:
            parameter.grad.div_(self.grad_scale)  # type: ignore[union-attr]
        first, second = state["exp_avg"], state["exp_avg_sq"]
        for moment in (first, second) if getattr(first.codes, "is_paged", False) else ():
            library("optimizer.state=8bit").prefetch_tensor(moment.codes)
        weight, gradient = parameter.detach().view(-1), parameter.grad.view(-1)  # type: ignore[union-attr]
        piece = PIECE[parameter.device.type]
        for at in range(0, weight.numel(), piece):
            own, blocks = slice(at, at + piece), slice(at // BLOCK, (at + piece) // BLOCK)
            torch.ops.bitsandbytes.optimizer_update_8bit_blockwise(
                "adam", gradient[own], weight[own], first.codes.view(-1)[own], second.codes.view(-1)[own],
                *group["betas"], 0.0, 0.0, group["eps"], int(state["step"]), group["lr"], first.table, second.table,
                first.maxima[blocks], second.maxima[blocks], group["weight_decay"], 1.0, False,
            )  # fmt: skip

    def _tables_on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """bitsandbytes' values of a byte for moments of either sign and for squares; also loads its kernels."""
        if device not in self._tables:
            make = library("optimizer.state=8bit").create_dynamic_map
            self._tables[device] = (make(signed=True).to(device), make(signed=False).to(device))
        return self._tables[device]

    def _codes(self, parameter: Tensor) -> Tensor:
        if not self.paged or parameter.numel() < PAGED:
            return torch.zeros_like(parameter, dtype=torch.uint8)
        pages_of = library("optimizer.state=8bit")
        pages: Tensor = pages_of.get_paged(*parameter.shape, dtype=torch.uint8, device=parameter.device)
        pages_of.fill(pages, 0)
        return pages
