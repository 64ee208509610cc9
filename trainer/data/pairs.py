"""Preference pairs on disk, and micro-batches of them in which a prompt is laid down once for both answers."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from trainer.batch import Branches, TokenBatch
from trainer.data.rows import Encoded
from trainer.data.sources import DataError, DataSource
from trainer.data.store import (
    Span,
    TokenWriter,
    open_prepared,
    save_array,
    save_json,
    source_counts,
    source_facts,
    source_summary,
)
from trainer.data.tokenizer import Tokenizer

FORMAT = 1
FORWARD = 4096
"""Tokens of a forward in which nothing is learnt."""


class Pair(NamedTuple):
    """Two answers to a prompt.

    ``chosen``, ``rejected``: ids of prompt and answer, of which the answer's are trained.
    ``shared``: ids that both begin with.
    ``margin``: by how much the chosen one is better, 0 where that is not known.
    ``reference``: the reference's log-probability of each answer, where it was computed before; nan otherwise.
    """

    chosen: Encoded
    rejected: Encoded
    shared: int
    margin: float = 0.0
    reference: tuple[float, float] = (float("nan"), float("nan"))


@dataclass
class AnswerBatch(TokenBatch):
    """Answers with their prompts, in one ragged row ``(1, T)``: B units, A answers, N ids that are predicted.

    ``logit_index`` ``(N,)``: the token of the row whose logits predict each id.
    ``targets`` ``(N,)``: the ids.
    ``sequence_id`` ``(N,)``: the answer that each id belongs to.
    ``final_index`` ``(A,)``: the token that ends each answer.
    ``reference`` ``(A,)``: log-probability of each answer under the reference, in nats; nan where unknown.
    ``unit_mask`` ``(B,)``: 0 for a unit that only fills up a forward.
    ``sizes``: tokens of each unit; they sum to T. Known to the host.
    """

    documents: Branches
    logit_index: Tensor
    targets: Tensor
    sequence_id: Tensor
    final_index: Tensor
    reference: Tensor
    unit_mask: Tensor
    sizes: tuple[int, ...]

    @property
    def weight(self) -> Tensor:
        """Units, a float64 scalar."""
        return self.unit_mask.sum(dtype=torch.float64)

    @property
    def tokens_by_row(self) -> tuple[int, ...]:
        return self.sizes

    @property
    def parts(self) -> tuple[AnswerBatch, ...]:
        """The rows that hold all answers of these units."""
        return (self,)


@dataclass
class PairBatch(AnswerBatch):
    """B preference pairs: answer 2 b is pair b's chosen one, 2 b + 1 its rejected one.

    ``margins`` ``(B,)``: by how much the chosen one is better.
    """

    unit: ClassVar[str] = "preference pairs"

    margins: Tensor


class PairStore:
    """Pairs by number, mapped from disk.

    ``reference`` ``(n, 2)``: log-probabilities of a reference, once they are known.
    """

    def __init__(self, folder: Path, *, share: bool = True) -> None:
        self.facts: dict[str, Any] = json.loads((folder / "facts.json").read_text())
        self.fingerprint: str = self.facts["fingerprint"]
        self.length: int = self.facts["length"]
        self.pad: int = self.facts["pad"]
        self.share = share
        self.reference: Tensor | None = None
        self._tokens = np.memmap(folder / "tokens.bin", dtype=self.facts["dtype"], mode="r")
        self._trained = np.memmap(folder / "trained.bin", dtype=np.bool_, mode="r")
        self._shape = np.load(folder / "shape.npy", mmap_mode="r")
        self._starts = np.load(folder / "starts.npy", mmap_mode="r")
        self._margins = np.load(folder / "margins.npy", mmap_mode="r")

    def __len__(self) -> int:
        return len(self._shape)

    def unit(self, number: int) -> Pair:
        """The pair with this number."""
        first, second, shared = (int(n) for n in self._shape[number])
        start = int(self._starts[number])
        pair = Pair(
            self._encoded(start, first),
            self._encoded(start + first, second),
            shared if self.share else 0,
            float(self._margins[number]),
        )
        return pair if self.reference is None else pair._replace(reference=tuple(self.reference[number].tolist()))

    def join(self, units: Sequence[Pair | None], numbers: Sequence[int]) -> AnswerBatch:
        filler = Encoded([self.pad, self.pad], [False, False])
        return self._collate([Pair(filler, filler, 0, 0.0, (0.0, 0.0)) if u is None else u for u in units], numbers)

    def collate(self, numbers: Sequence[int]) -> AnswerBatch:
        return self.join([None if n < 0 else self.unit(n) for n in numbers], numbers)

    def _collate(self, pairs: Sequence[Pair], numbers: Sequence[int]) -> AnswerBatch:
        return collate(pairs, numbers)

    def forwards(self, rank: int, ranks: int) -> Iterator[list[int]]:
        """Every unit once, dealt out to the ranks in micro-batches of at most `FORWARD` tokens where several units fit.

        All ranks get as many, the last ones without weight: a forward of ZeRO-3 is collective. Which units share a forward
        does not depend on the number of ranks.
        """
        sizes = (self._shape[:, 0] + self._shape[:, 1] - self._shape[:, 2] * self.share).tolist()
        groups: list[list[int]] = []
        room = 0
        for number, size in enumerate(sizes):
            if size > room:
                groups.append([])
                room = FORWARD
            groups[-1].append(number)
            room -= size
        for first in range(0, len(groups), ranks):
            yield groups[first + rank] if first + rank < len(groups) else [-1]

    def preview(self, number: int, tokenizer: Tokenizer) -> dict[str, str]:
        pair = self.unit(number)
        first, second = answer_start(pair.chosen), answer_start(pair.rejected)
        return {
            "prompt": tokenizer.decode(pair.chosen.ids[:first]),
            "completion": tokenizer.decode(pair.chosen.ids[first:]),
            "rejected": tokenizer.decode(pair.rejected.ids[second:]),
        }

    def spans(self, number: int) -> list[Span]:
        pair = self.unit(number)
        return [Span(side, *getattr(pair, side)[:2]) for side in ("chosen", "rejected")]

    def counts(self) -> dict[str, int]:
        f = self.facts
        return {
            "units": f["pairs"],
            "tokens": f["tokens"],
            "trained": int(self._trained.sum()),
            "truncated": f["cut"],
            "dropped": sum(f["dropped"].values()),
            **source_counts(f),
        }

    def summary(self, name: str) -> list[str]:
        f = self.facts
        line = (
            f"{name}: {f['pairs']:,} pairs ({f['form']}), {f['tokens']:,} tokens, of them {2 * f['shared']:,} in prompts "
            f"that two answers share ({f['cut']:,} pairs cut{self._dropped()}; longest {f['longest']:,} tokens)"
        )
        return [line, *source_summary(name, f)]

    def _dropped(self) -> str:
        counts = [f"{count:,} {why}" for why, count in self.facts["dropped"].items()]
        return f", dropped {', '.join(counts)}" if counts else ""

    def _encoded(self, start: int, size: int) -> Encoded:
        ids: list[int] = self._tokens[start : start + size].astype(np.int64).tolist()
        return Encoded(ids, self._trained[start : start + size].tolist())


def answer_start(encoded: Encoded) -> int:
    """The place of the first id that the assistant wrote."""
    assert encoded.trained is not None
    return list(encoded.trained).index(True)


def collate(pairs: Sequence[Pair], numbers: Sequence[int]) -> PairBatch:
    """Lay prompt, chosen and rejected end to end, pair after pair."""
    fields = collate_shared_prefix([(p.shared, (p.chosen, p.rejected)) for p in pairs], numbers)
    margins = torch.tensor([p.margin for p in pairs])
    reference = torch.tensor([p.reference for p in pairs], dtype=torch.float32).view(-1)
    return PairBatch(**fields, reference=reference, margins=margins)


def collate_shared_prefix(units: Sequence[tuple[int, Sequence[Encoded]]], numbers: Sequence[int]) -> dict[str, Any]:
    """Fields of an `AnswerBatch`: for each unit what its answers share (a number of ids), then the rest of each answer."""
    tokens: list[int] = []
    sequences: list[list[int]] = []
    logit_index: list[int] = []
    targets: list[int] = []
    sequence_id: list[int] = []
    sizes: list[int] = []
    for shared, sides in units:
        start = len(tokens)
        tokens += list(sides[0].ids[:shared])
        for side in sides:
            rest = list(side.ids[shared:])
            sequence = [*range(start, start + shared), *range(len(tokens), len(tokens) + len(rest))]
            tokens += rest
            assert side.trained is not None
            for at, learnt in enumerate(side.trained[1:]):
                if learnt:
                    logit_index.append(sequence[at])
                    targets.append(side.ids[at + 1])
                    sequence_id.append(len(sequences))
            sequences.append(sequence)
        sizes.append(len(tokens) - start)
    return {
        "rows": torch.tensor(list(numbers)),
        "tokens": torch.tensor(tokens)[None],
        "documents": Branches.of(sequences, len(tokens)),
        "logit_index": torch.tensor(logit_index, dtype=torch.int64),
        "targets": torch.tensor(targets, dtype=torch.int64),
        "sequence_id": torch.tensor(sequence_id, dtype=torch.int64),
        "final_index": torch.tensor([sequence[-1] for sequence in sequences]),
        "sizes": tuple(sizes),
        "unit_mask": torch.tensor([float(n >= 0) for n in numbers]),
        "real": torch.tensor(len(tokens), dtype=torch.float64),
    }


P = TypeVar("P", bound=PairStore)


def prepare_pairs(
    cache: Path,
    key: Sequence[str],
    pairs: Callable[[], Iterable[Pair]],
    tokenizer: Tokenizer,
    length: int,
    *,
    source: DataSource,
    dropped: dict[str, int],
    share: bool,
    store: type[P],
) -> P:
    """Encode pairs once, under a fingerprint of ``key``, tokenizer and ``length``.

    ``dropped``: counts by reason, for the log.
    ``share``: whether micro-batches lay a prompt down once.
    ``store``: the class that opens what was written.

    Raises:
        DataError: if no pair is left.
    """

    def write(folder: Path, fingerprint: str) -> None:
        shape, margins, cut = [], [], 0
        with TokenWriter(folder, tokenizer) as out:
            for pair in pairs():
                for side in (pair.chosen, pair.rejected):
                    out.add(side.ids, side.trained)
                cut += bool(pair.chosen.cut or pair.rejected.cut)
                shape.append((len(pair.chosen.ids), len(pair.rejected.ids), pair.shared))
                margins.append(pair.margin)
        if not shape:
            reasons = [*source.skipped[:1], *(f"{n} dropped: {why}" for why, n in dropped.items())]
            raise DataError(f"{source.path} has no pair left to learn from ({'; '.join(reasons) or 'it is empty'})")
        sizes = np.asarray(shape, dtype=np.int64)
        save_array(folder / "shape.npy", sizes)
        save_array(folder / "starts.npy", out.offsets[:-1:2])
        save_array(folder / "margins.npy", np.asarray(margins, dtype=np.float64))
        save_json(
            folder / "facts.json",
            {
                "fingerprint": fingerprint,
                "length": length,
                "dtype": out.dtype,
                "pad": tokenizer.pad,
                "pairs": len(shape),
                "shared": int(sizes[:, 2].sum()),
                "cut": cut,
                "tokens": int(sizes[:, :2].sum()),
                "longest": int(sizes[:, :2].max()),
                "dropped": dict(dropped),
                **source_facts(source),
            },
        )

    folder = open_prepared(cache, [f"pairs{FORMAT}", *key], tokenizer, length, write)
    return store(folder, share=share)
