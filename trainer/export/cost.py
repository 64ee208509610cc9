"""What a format costs: how far the model that it holds has moved from the one that it was made of, on held-out rows.

Both are computed by the same decoder in float32, the format's weights dequantised, so that what is measured is the rounding
of the weights alone. A program that also rounds activations (llama.cpp for Q8_0, W8A8 kernels) adds its own error.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch
from torch import Tensor

from trainer.batch import Documents
from trainer.data.corpus import Prompt
from trainer.data.store import Span
from trainer.data.tokenizer import Tokenizer, open_tokenizer
from trainer.export.formats import opened_folder
from trainer.functional import At, Head
from trainer.functional.chunks import blocks
from trainer.generation.generate import generate
from trainer.generation.sampling import Sampling
from trainer.models.actor_critic import values_at
from trainer.models.architecture import Architecture
from trainer.models.sizes import parameters_of
from trainer.models.transformer import Transformer

WEIGHTS = (".safetensors", ".gguf")
MAX_CONCURRENT = 32
"""Prompts that are answered at once."""
Cost = dict[str, Any]


@dataclass(frozen=True)
class Heldout:
    """Rows that a model and its formats are compared on.

    ``units``: sequences that belong together, such as the documents of a packed row, or a chosen and a rejected answer.
    ``prompts``: answered greedily, for exact match where right answers are known. Without ``units`` the model's own answers
    take their place: what a policy is compared on is what it would say.
    ``answer_tokens``: the longest answer.
    """

    units: Sequence[Sequence[Span]] = ()
    prompts: Sequence[Prompt] = field(default_factory=list)
    answer_tokens: int = 64

    @property
    def described(self) -> str:
        """How much it is, in words."""
        parts = [f"{len(self.units):,} held-out rows"] if self.units else []
        parts += [f"{len(self.prompts):,} prompts"] if self.prompts else []
        return " and ".join(parts)

    @property
    def digest(self) -> str:
        """Of all of it."""
        units = [
            [[list(map(int, span.ids)), span.trained and list(map(bool, span.trained))] for span in unit]
            for unit in self.units
        ]
        prompts = [[list(p.ids), p.ideal] for p in self.prompts]
        return hashlib.sha256(json.dumps([units, prompts, self.answer_tokens]).encode()).hexdigest()[:24]


def measured(
    source: Path, models: Mapping[str, tuple[Path, Callable[[Path], Transformer]]], heldout: Heldout | None
) -> Iterator[tuple[str, Cost]]:
    """What each of ``models`` (its folder, and what opens it) cost; one model is in memory at a time.

    ``source``: the Hugging Face folder that they were made of. ``heldout``: None = nothing is measured.
    """
    if heldout is None or not models:
        yield from ((name, {}) for name in models)
        return
    tokenizer = open_tokenizer(source)
    with torch.no_grad():
        original = opened_folder(source)
        device = device_for(original.architecture)
        kind = ScoreComparison if original.architecture.scores else TokenComparison
        comparison = kind(original.eval().to(device), heldout, tokenizer)
        del original
        for name, (folder, opened) in models.items():
            yield name, comparison.cost(opened(folder).eval().to(device))


def size_of(folder: Path) -> int:
    """Bytes of the files that hold weights."""
    return sum(file.stat().st_size for file in folder.iterdir() if file.suffix in WEIGHTS)


def room_problem(architecture: Architecture) -> str | None:
    """Why nothing can be measured on this machine, in words; None where the model has room in float32."""
    needed, free = 4 * parameters_of(architecture), psutil.virtual_memory().available
    if needed < free:
        return None
    return f"the model takes {needed / 1e9:.1f} GB in float32, and {free / 1e9:.1f} GB of memory are free"


def device_for(architecture: Architecture) -> torch.device:
    """The GPU where the model fits into what is free of it in float32, with room for logits; else the CPU."""
    needed = 5 * parameters_of(architecture) + 2 * 2**30
    fits = torch.cuda.is_available() and torch.cuda.mem_get_info()[0] > needed
    return torch.device("cuda", torch.cuda.current_device()) if fits else torch.device("cpu")


class Laid(NamedTuple):
    """Sequences laid end to end, but for their last ids, which nothing follows.

    ``tokens`` ``(1, T)``, ``documents``: what a model reads.
    ``places`` ``(n,)``: the tokens whose next one counts. ``targets`` ``(n,)``: these next ones.
    ``counts``: how many of them are of each sequence.
    """

    tokens: Tensor
    documents: Documents
    places: Tensor
    targets: Tensor
    counts: list[int]


def lay(unit: Sequence[Span]) -> Laid:
    """A unit as a model reads it."""
    tokens, lengths, places, targets, sizes = list[int](), list[int](), list[int](), list[int](), list[int]()
    for span in unit:
        ids = [int(n) for n in span.ids]
        counts = [True] * len(ids) if span.trained is None else list(span.trained)
        chosen = [at for at, learnt in enumerate(counts[1:]) if learnt]
        places += [len(tokens) + at for at in chosen]
        targets += [ids[at + 1] for at in chosen]
        tokens += ids[:-1]
        lengths += [len(ids) - 1] if len(ids) > 1 else []
        sizes += [len(chosen)] if chosen else []
    where, which = (torch.tensor(part, dtype=torch.int64) for part in (places, targets))
    return Laid(torch.tensor([tokens]), Documents.from_lengths(lengths, 1), where, which, sizes)


class TokenComparison:
    """What a language model predicted, against which its formats are compared.

    It keeps final hidden states and the output embedding, which are far smaller than log-probabilities of the whole
    vocabulary and give them exactly.
    """

    def __init__(self, model: Transformer, heldout: Heldout, tokenizer: Tokenizer) -> None:
        self.heldout, self.tokenizer = heldout, tokenizer
        self.right, answers = self._answer(model)
        units = heldout.units or [_answered(*pair) for pair in zip(heldout.prompts, answers, strict=True)]
        self.units = [laid for unit in units if len((laid := lay(unit)).places)]
        self.before = [final_states(model, unit) for unit in self.units]

    def cost(self, model: Transformer) -> Cost:
        """Divergence, perplexities and agreement of another model's predictions, with the number of tokens."""
        totals, sums = torch.zeros(5, dtype=torch.float64), list[tuple[float, int]]()
        for unit, (states, head) in zip(self.units, self.before, strict=True):
            values = compared(states, head, *final_states(model, unit), unit.targets)
            totals += values.double().sum(1)
            sums += [(float(part.double().sum()), len(part)) for part in torch.split(values[0], unit.counts)]
        tokens = sum(count for _, count in sums)
        kl, before, after, same, shift = (totals / max(tokens, 1)).tolist()
        measures = {
            "kl": kl, "kl_error": standard_error(sums), "perplexity": math.exp(after),
            "original_perplexity": math.exp(before), "same_token": same, "logprob_change": shift,
            "tokens": tokens, "sequences": len(sums),
        }  # fmt: skip
        if self.right is not None:
            measures |= {"original_exact_match": self.right, "exact_match": self._answer(model)[0]}
            measures["answers"] = sum(bool(p.ideal) for p in self.heldout.prompts)
        return measures

    def _answer(self, model: Transformer) -> tuple[float | None, list[list[int]]]:
        """The part of the checkable prompts whose greedy answer is right, None without any; and all answers."""
        prompts = self.heldout.prompts
        if not prompts:
            return None, []
        completions = generate(
            model, [p.ids for p in prompts], Sampling(self.heldout.answer_tokens, 0.0), stops=self.tokenizer.stops,
            max_concurrent=MAX_CONCURRENT,
        )  # fmt: skip
        answers = [completion.ids for completion in completions]
        right = [p.right(self.tokenizer.decode(ids)) for p, ids in zip(prompts, answers, strict=True) if p.ideal]
        return (sum(right) / len(right) if right else None), answers


def _answered(prompt: Prompt, answer: Sequence[int]) -> list[Span]:
    return [Span("", [*prompt.ids, *answer], [False] * len(prompt.ids) + [True] * len(answer))]


def final_states(model: Transformer, unit: Laid) -> tuple[Tensor, Head]:
    """Final hidden states ``(n, d)`` at the places of a unit, and the projection that makes logits of them."""
    device = next(model.parameters()).device
    read = At(unit.places.to(device), lambda hidden, head: (hidden[0], head))
    states, head = model(unit.tokens.to(device), unit.documents.to(device), read)
    return states, head


def compared(before: Tensor, head_before: Head, after: Tensor, head: Head, targets: Tensor) -> Tensor:
    """Five values of every token ``(5, n)``, float32, on the CPU.

    KL(before || after) in nats, the negative log-likelihood of the target before and after, whether both have the same
    likeliest token, and by how much the log-probability of the target differs.
    """
    values = torch.empty(5, len(targets))
    for part in blocks(len(targets), head.weight):
        p, q = (h.logits(states[part]).log_softmax(1) for h, states in ((head_before, before), (head, after)))
        chosen = targets[part, None].to(p.device)
        of_p, of_q = p.gather(1, chosen)[:, 0], q.gather(1, chosen)[:, 0]
        kl = (p.exp() * (p - q)).sum(1)
        same = (p.argmax(1) == q.argmax(1)).float()
        values[:, part] = torch.stack([kl, -of_p, -of_q, same, (of_p - of_q).abs()]).cpu()
    return values


def standard_error(sums: Sequence[tuple[float, int]]) -> float | None:
    """Of a mean over tokens that come in sequences, each a sum and a number of tokens; None of a single one.

    Tokens of a sequence are alike, so what scatters are the sequences: the error of a ratio of sums (Cochran 1977, 6.3).
    """
    sequences, tokens = len(sums), sum(count for _, count in sums)
    if sequences < 2 or not tokens:
        return None
    mean = sum(value for value, _ in sums) / tokens
    squares = sum((value - mean * count) ** 2 for value, count in sums)
    return math.sqrt(squares * sequences / (sequences - 1)) / tokens


class ScoreComparison:
    """The scores that a reward model gave, against which its formats are compared."""

    def __init__(self, model: Transformer, heldout: Heldout, tokenizer: Tokenizer) -> None:
        self.units = [unit for unit in heldout.units if all(len(span.ids) > 1 for span in unit)]
        self.before = self._scores(model)

    def cost(self, model: Transformer) -> Cost:
        """By how much scores changed, beside their spread, and how many pairs are still ordered alike and rightly."""
        now, before = self._scores(model), self.before
        scores = torch.stack([torch.cat(before), torch.cat(now)]).double()
        pairs = torch.stack([torch.stack([s for s in each if len(s) == 2]) for each in (before, now)])
        chosen, rejected = pairs.unbind(2)
        preferred = chosen > rejected
        return {
            "score_change": float((scores[1] - scores[0]).abs().mean()), "score_spread": float(scores[0].std()),
            "same_order": float((preferred[0] == preferred[1]).double().mean()),
            "original_accuracy": float(preferred[0].double().mean()), "accuracy": float(preferred[1].double().mean()),
            "pairs": pairs.shape[1],
        }  # fmt: skip

    def _scores(self, model: Transformer) -> list[Tensor]:
        device = next(model.parameters()).device
        scores = []
        for unit in self.units:
            lengths = [len(span.ids) for span in unit]
            tokens = torch.tensor([[int(n) for span in unit for n in span.ids]], device=device)
            last = torch.tensor(lengths, device=device).cumsum(0) - 1
            scores.append(model(tokens, Documents.from_lengths(lengths, 1).to(device), values_at(last)).cpu())
        return scores
