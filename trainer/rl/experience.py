"""What a policy did in one iteration, held alike on all ranks, and the micro-batches that it is learnt from in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from trainer.batch import Branches, Documents, TokenBatch
from trainer.data.pairs import collate_shared_prefix
from trainer.data.rows import Encoded


@dataclass
class RolloutBatch(TokenBatch):
    """Completions with their prompts, in one ragged row ``(1, T)``; completions of one prompt share it.

    ``places``, ``targets`` ``(N,)``: from which token of the row which sampled id is predicted. The six behind them ``(N,)``:
    as in `Experience`. ``weights`` ``(N,)``, ``units``: what a token counts in the loss, and all completions together.
    ``made``, ``samples``: metrics of the rollout and some of its completions, with the first
    micro-batch of an iteration.
    """

    places: Tensor
    targets: Tensor
    logprobs: Tensor
    reference: Tensor
    sampled: Tensor
    values: Tensor
    advantages: Tensor
    returns: Tensor
    weights: Tensor
    units: Tensor
    made: dict[str, float] = field(default_factory=dict)
    samples: list[dict[str, Any]] = field(default_factory=list)

    @property
    def weight(self) -> Tensor:
        return self.units

    @property
    def shown(self) -> list[dict[str, Any]]:
        return self.samples


@dataclass(frozen=True)
class Experience:
    """C completions of G prompts, ``C / G`` in a row of each; tokens lie end to end.

    ``rows`` ``(G,)``: numbers of the prompts in the data. ``prompt_lengths`` ``(G,)``, ``prompts``: their ids. ``lengths``
    ``(C,)``, ``ids`` ``(N,)``: of the completions. Log-probabilities ``(N,)`` in nats: ``sampled``, the sampler's;
    ``logprobs``, the policy's before the first update; ``reference``. ``values``, ``advantages``, ``returns`` ``(N,)``.
    ``weights`` ``(N,)``, ``units`` ``(C,)``: what a token and a completion count in the loss.
    """

    rows: Tensor
    prompt_lengths: Tensor
    prompts: Tensor
    lengths: Tensor
    ids: Tensor
    sampled: Tensor
    logprobs: Tensor
    reference: Tensor
    values: Tensor
    advantages: Tensor
    returns: Tensor
    weights: Tensor
    units: Tensor

    def tensors(self) -> dict[str, Tensor]:
        """All of it by name, for a checkpoint."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> Experience:
        """From what `tensors` gave."""
        return cls(**{f.name: tensors[f.name] for f in fields(cls)})

    @property
    def samples(self) -> int:
        """Completions of a prompt."""
        return len(self.lengths) // len(self.rows)

    def batch(self, numbers: Sequence[int]) -> RolloutBatch:
        """A micro-batch of these completions; those of one prompt that stand together compute it once."""
        prompt_ends, ends = self.prompt_lengths.cumsum(0).tolist(), self.lengths.cumsum(0).tolist()
        prompt_sizes, sizes = self.prompt_lengths.tolist(), self.lengths.tolist()
        units: list[tuple[int, list[Encoded]]] = []
        spans: list[Tensor] = []
        held = -1
        for number in numbers:
            group = number // self.samples
            prompt = self.prompts[prompt_ends[group] - prompt_sizes[group] : prompt_ends[group]].tolist()
            span = slice(ends[number] - sizes[number], ends[number])
            side = Encoded(prompt + self.ids[span].tolist(), [False] * len(prompt) + [True] * sizes[number])
            if group != held:
                units.append((len(prompt), []))
                held = group
            units[-1][1].append(side)
            spans.append(torch.arange(span.start, span.stop))
        laid = collate_shared_prefix(units, [int(self.rows[n // self.samples]) for n in numbers])
        tokens = torch.cat(spans)
        names = ("logprobs", "reference", "sampled", "values", "advantages", "returns", "weights")
        return RolloutBatch(
            rows=laid["rows"], tokens=laid["tokens"], documents=unshared(laid["documents"]), places=laid["logit_index"],
            targets=laid["targets"], real=laid["real"], units=self.units[list(numbers)].sum(dtype=torch.float64),
            **{name: getattr(self, name)[tokens] for name in names},
        )  # fmt: skip


def unshared(laid: Branches) -> Branches | Documents:
    """The same sequences as plain documents where no token belongs to two: then attention has nothing to gather."""
    return laid.whole if len(laid.index) == laid.positions.numel() else laid
