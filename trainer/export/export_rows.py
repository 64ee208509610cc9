"""Rows of a run's data for its export's formats: which they are calibrated on, and which their cost is measured on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice

from trainer.data.corpus import Corpus, TrainingData
from trainer.data.loader import permuted
from trainer.data.store import Span, UnitStore
from trainer.export.cost import Heldout
from trainer.export.formats import Calibration

CALIBRATION_ROWS = 128
CALIBRATION_LENGTH = 512
"""Tokens of the longest row: what Frantar et al. 2022 (arXiv:2210.17323) take is four times as long, for more memory."""
PROMPTS = 64
"""Held-out prompts that are answered at most."""


def calibration_rows(data: TrainingData) -> Calibration:
    """The same sequences of the training data for everyone: from all over it, each cut to `CALIBRATION_LENGTH` tokens."""
    parts = getattr(data, "parts", None)
    rows = _streamed(data) if parts is None else (span.ids for unit in scattered(parts) for span in sequences(unit))
    cut = ([int(n) for n in ids[:CALIBRATION_LENGTH]] for ids in rows)
    return list(islice((ids for ids in cut if len(ids) > 1), CALIBRATION_ROWS))


def _streamed(data: TrainingData) -> Iterator[Sequence[int]]:
    """The first rows of data that is read as it is needed."""
    loader = data.loader(micro=1, seed=0, rank=0, ranks=1)
    try:
        for batch in loader:
            yield batch.tokens[0].tolist()
    finally:
        loader.close()


def heldout_of(corpus: Corpus, tokens: int, answer_tokens: int) -> Heldout | None:
    """Held-out units from all over the sources, of ``tokens`` tokens in all, and prompts; None where there are none.

    ``answer_tokens``: the longest answer to a prompt. Prompts without a right answer are taken only where there is nothing
    else to compare on.
    """
    if not tokens:
        return None
    units = list(_of_tokens(corpus.heldout, tokens))
    prompts = [prompt for prompt in corpus.prompts(PROMPTS) if prompt.ideal or not units]
    return Heldout(units, prompts, answer_tokens) if units or prompts else None


def _of_tokens(heldout: Mapping[str, UnitStore], tokens: int) -> Iterator[list[Span]]:
    for unit in scattered(list(heldout.values())):
        if tokens <= 0:
            return
        own = sequences(unit)
        tokens -= sum(len(span.ids) for span in own)
        yield own


def scattered(parts: Sequence[UnitStore]) -> Iterator[list[Span]]:
    """Every unit of some sources once, in an order that takes the first ones from all over them."""
    total = sum(map(len, parts))
    for index in range(total):
        number = permuted(index, total, "export")
        for part in parts:
            if number < len(part):
                yield part.spans(number)
                break
            number -= len(part)


def sequences(unit: Sequence[Span]) -> list[Span]:
    """The spans of a unit with what they share with the one before put in front of them, where nothing is learnt again."""
    joined: list[Span] = []
    for span in unit:
        if not span.shared:
            joined.append(span)
            continue
        learnt = [True] * len(span.ids) if span.trained is None else list(span.trained)
        # Its own first id is predicted in the span before, as in a packed row.
        ids, trained = [*joined[-1].ids[: span.shared], *span.ids], [False] * (span.shared + 1) + learnt[1:]
        joined.append(Span(span.title, ids, trained))
    return joined
