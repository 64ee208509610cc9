"""What recurrent layers have of the sequences that are being decoded: a memory of fixed size in each slot."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from trainer.models.architecture import Architecture
from trainer.models.delta import DeltaInputs, DeltaState, Pass


class DeltaStates:
    """The `DeltaState` of every recurrent layer and slot, from the first that is written; its addresses never change."""

    def __init__(self, a: Architecture, slots: int) -> None:
        recurrent = [number for number, layer in enumerate(a.layers) if layer.delta]
        self._row = {number: row for row, number in enumerate(recurrent)}
        self._slots = slots
        self.tensors: tuple[Tensor, ...] = ()

    def __bool__(self) -> bool:
        """Whether there are recurrent layers."""
        return bool(self._row)

    @property
    def nbytes(self) -> int:
        """Bytes of all of them, once the first are written."""
        return sum(tensor.nbytes for tensor in self.tensors)

    def read(self, layer: int, slots: Tensor | slice) -> DeltaState:
        """Of one layer, that of ``slots``."""
        return DeltaState(*(tensor[self._row[layer], slots] for tensor in self.tensors))

    def write(self, layer: int, slots: Tensor | slice, state: DeltaState) -> None:
        """Put ``state`` in ``slots`` of a layer."""
        if not self.tensors:
            # Zeros, because fixed shapes decode idle slots, too.
            self.tensors = tuple(t.new_zeros(len(self._row), self._slots, *t.shape[1:]) for t in state)
        for tensor, own in zip(self.tensors, state, strict=True):
            tensor[self._row[layer], slots] = own.to(tensor.dtype)

    def advance(
        self,
        layer: int,
        slots: Tensor | slice,
        passed: Pass,
        inputs: DeltaInputs,
        positions: Tensor,
        *,
        begun: bool = True,
    ) -> Tensor:
        """Outputs of tokens at ``positions`` of the sequences of ``slots``, a row each, whose states go on with them.

        ``begun``: whether tokens of the sequences came before.
        """
        out, state = passed(inputs, positions, self.read(layer, slots) if begun else None, None)
        self.write(layer, slots, state)
        return out

    def copy(self, source: int, target: int) -> None:
        """Give ``target`` what ``source`` has."""
        for tensor in self.tensors:
            tensor[:, target] = tensor[:, source]


class PromptRows:
    """Whole prompts of a packed row, as rows of their own that are padded behind: those of about the same length together."""

    def __init__(self, slots: Sequence[int], lengths: Sequence[int], device: torch.device) -> None:
        starts = [0, *accumulate(lengths)]
        groups: dict[int, list[int]] = {}
        for number, length in enumerate(lengths):
            groups.setdefault((length - 1).bit_length(), []).append(number)
        self._groups = []
        for members in groups.values():
            counts = torch.tensor([lengths[n] for n in members])
            positions = torch.arange(int(counts.max())).expand(len(members), -1)
            real = positions < counts[:, None]
            index = torch.tensor([starts[n] for n in members])[:, None] + positions
            tensors = (torch.tensor([slots[n] for n in members]), counts, positions, index * real, real, index[real])
            taken = real.flatten().nonzero().squeeze(1)
            self._groups.append([t.to(device) for t in (*tensors, taken)])

    def recur(self, states: DeltaStates, layer: int, passed: Pass, inputs: DeltaInputs) -> Tensor:
        """Outputs ``(1, T, H, V)``; the memory behind each prompt is written to its slot."""
        parts = list[tuple[Tensor, Tensor]]()
        for slots, lengths, positions, index, real, places, taken in self._groups:
            rows = DeltaInputs(*(t[0][index] * real[..., None] for t in inputs))
            out, state = passed(rows, positions, None, lengths)
            states.write(layer, slots, state)
            parts.append((places, out.flatten(0, 1)[taken]))
        outputs = parts[0][1].new_empty(inputs.mixed.shape[1], *parts[0][1].shape[1:])
        for places, out in parts:
            outputs[places] = out
        return outputs[None]
