"""Forwards over sequences of any length without gradients: batched by length, as many on every rank."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from trainer.batch import Documents, copy_to
from trainer.data.pairs import FORWARD
from trainer.models.actor_critic import values_at
from trainer.parallel import distributed


def in_forwards(lengths: Sequence[int]) -> list[list[int]]:
    """Numbers of sequences, longest first, in groups of at most `FORWARD` tokens where several fit; collective.

    Every rank gets as many groups, its last ones empty: a forward of ZeRO-3 is collective.
    """
    groups: list[list[int]] = []
    room = 0
    for number in sorted(range(len(lengths)), key=lambda n: -lengths[n]):
        if lengths[number] > room:
            groups.append([])
            room = FORWARD
        groups[-1].append(number)
        room -= lengths[number]
    most = max(distributed.gather_over_data(len(groups)))
    return groups + [[] for _ in range(most - len(groups))]


def score(model: nn.Module, sequences: Sequence[Sequence[int]], device: torch.device) -> list[float]:
    """A scoring model's score of every sequence, off its last token; collective."""
    order: list[int] = []
    computed = []
    for numbers in in_forwards([len(ids) for ids in sequences]):
        order += numbers
        # An empty group still takes part: a token of no meaning.
        chosen = [sequences[n] for n in numbers] or [[0]]
        lengths = [len(ids) for ids in chosen]
        row = [torch.tensor([token for ids in chosen for token in ids])[None], torch.tensor(lengths).cumsum(0) - 1]
        tokens, last = copy_to(device, row)
        with torch.no_grad():
            computed.append(model(tokens, Documents.from_lengths(lengths, 1).to(device), values_at(last)))
    # One copy back for all forwards; empty groups are the last ones.
    scores = torch.cat(computed).tolist() if computed else []
    by_sequence = dict(zip(order, scores, strict=False))
    return [by_sequence[n] for n in range(len(sequences))]
