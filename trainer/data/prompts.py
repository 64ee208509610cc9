"""Prompts as the data of a run: what a policy answers, with the row that a reward may look at."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from trainer.batch import Batch
from trainer.config import schema, setting
from trainer.data.chat import ChatError, Message, checked, side
from trainer.data.chat_data import Conversations
from trainer.data.corpus import Corpus, Prompt, answer_in
from trainer.data.rows import left_out, prepared, save, save_json
from trainer.data.sources import DataError, Source
from trainer.data.templates import Template, TemplateError
from trainer.data.tokenizer import Tokenizer

FORMAT = 1


@dataclass
class PromptBatch(Batch):
    """Prompts of one rank, in the order of ``rows``."""

    prompts: list[Prompt]

    @property
    def weight(self) -> Tensor:
        """Prompts, a float64 scalar."""
        return torch.tensor(len(self.prompts), dtype=torch.float64)


class Prompts:
    """Prompts by number, mapped from disk."""

    def __init__(self, folder: Path) -> None:
        self.facts: dict[str, Any] = json.loads((folder / "facts.json").read_text())
        self.fingerprint: str = self.facts["fingerprint"]
        self._tokens = np.memmap(folder / "tokens.bin", dtype=self.facts["dtype"], mode="r")
        self._starts = np.load(folder / "starts.npy", mmap_mode="r")
        self._lines = np.load(folder / "lines.npy", mmap_mode="r")
        self._rows = folder / "rows.jsonl"

    def __len__(self) -> int:
        return len(self._starts) - 1

    def unit(self, number: int) -> Prompt:
        """The prompt with this number."""
        first, last = (int(n) for n in self._starts[number : number + 2])
        begin, end = (int(n) for n in self._lines[number : number + 2])
        with self._rows.open("rb") as file:
            file.seek(begin)
            kept = json.loads(file.read(end - begin))
        ids: list[int] = self._tokens[first:last].astype(np.int64).tolist()
        return Prompt(ids, kept["text"], kept["ideal"], kept["pattern"], kept["messages"], kept["row"])

    def join(self, units: Sequence[Prompt], numbers: Sequence[int]) -> PromptBatch:
        """These prompts together."""
        return PromptBatch(torch.tensor(list(numbers)), list(units))

    def collate(self, numbers: Sequence[int]) -> PromptBatch:
        """The prompts with these numbers."""
        return self.join([self.unit(n) for n in numbers], numbers)

    def preview(self, number: int, tokenizer: Tokenizer) -> dict[str, str]:
        """A prompt as text."""
        return {"prompt": self.unit(number).text, "completion": ""}

    def summary(self, name: str) -> list[str]:
        """What preparing them found, for the log."""
        f = self.facts
        long = f", {f['too_long']:,} left out as longer than {f['length']:,} tokens" if f["too_long"] else ""
        line = f"{name}: {f['prompts']:,} prompts, {f['tokens']:,} tokens (longest {f['longest']:,}{long})"
        return [line, *left_out(name, f["skipped"])]


@schema("data/prompts")
@dataclass
class PromptData(Conversations):
    """Prompts from files, folders or the hub; what else a row holds is handed to the rewards."""

    unit: ClassVar[str] = "prompts"
    columns_read: ClassVar[tuple[str, ...]] = ("prompt", "messages", "system", "tools", "ideal")

    answer: str | None = setting(
        None, "pattern whose first group is the answer in a text; null = the whole text. For exact match"
    )

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        try:
            re.compile(self.answer or "")
        except re.error as error:
            yield f"data.answer={self.answer} is no pattern that can be read ({error})"

    def open(self, tokenizer: Tokenizer, length: int, seed: int) -> Corpus:
        corpus = super().open(tokenizer, length, seed)
        held = list(corpus.heldout.values())

        def first(count: int) -> list[Prompt]:
            numbered = ((part, n) for part in held for n in range(len(part)))
            return [part.unit(n) for (part, n), _ in zip(numbered, range(count), strict=False)]

        # Held-out prompts are answered; there is nothing in them to compute a loss of.
        return Corpus(corpus.train, {}, corpus.summary, prompts=first, fingerprint_of=corpus.fingerprint)

    def rows(self, source: Source, tokenizer: Tokenizer, length: int) -> Prompts:
        template = self.open_template(tokenizer)
        rendering = hashlib.sha256(template.source.encode()).hexdigest()
        settings = [self.on_bad_row, str(sorted(self.columns.items())), str(self.answer)]

        def write(folder: Path, fingerprint: str) -> None:
            self._write(folder, source, template, tokenizer, length, fingerprint)

        key = [f"prompts{FORMAT}", source.fingerprint(), rendering, *settings]
        return Prompts(prepared(self.cache_folder / "rows", key, tokenizer, length, write))

    def _write(
        self, folder: Path, source: Source, template: Template, tokenizer: Tokenizer, length: int, fingerprint: str
    ) -> None:
        dtype = "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"
        starts, lines, long = [0], [0], 0
        with (folder / "tokens.bin").open("wb") as tokens, (folder / "rows.jsonl").open("wb") as rows:
            for prompt in self._encoded(source, template):
                if len(prompt.ids) > length:
                    long += 1
                    continue
                tokens.write(np.asarray(prompt.ids, dtype=dtype).tobytes())
                kept = {name: value for name, value in vars(prompt).items() if name != "ids"}
                line = json.dumps(kept, ensure_ascii=False, default=str).encode() + b"\n"
                rows.write(line)
                starts.append(starts[-1] + len(prompt.ids))
                lines.append(lines[-1] + len(line))
        if len(starts) == 1:
            why = f"all {long:,} are longer than {length} tokens" if long else "it is empty"
            raise DataError(f"{source.path} has no prompt left to answer ({(source.skipped or [why])[0]})")
        save(folder / "starts.npy", np.asarray(starts, dtype=np.int64))
        save(folder / "lines.npy", np.asarray(lines, dtype=np.int64))
        save_json(
            folder / "facts.json",
            {
                "fingerprint": fingerprint, "length": length, "dtype": dtype, "prompts": len(starts) - 1,
                "tokens": starts[-1], "longest": int(np.diff(starts).max()), "too_long": long, "skipped": source.skipped,
            },
        )  # fmt: skip

    def _encoded(self, source: Source, template: Template) -> Iterator[Prompt]:
        for where, found in source.rows():
            row = {**found, **{ours: found[theirs] for ours, theirs in self.columns.items() if theirs in found}}
            try:
                messages = asked(row)
                ids = template.prompt(messages, row.get("tools"))
                yield Prompt(ids, str(messages[-1].get("content", "")), self._ideal(row), self.answer, messages, found)
            except (ChatError, TemplateError) as error:
                source.reject(where, str(error))

    def _ideal(self, row: Mapping[str, Any]) -> list[str]:
        value = row.get("ideal")
        values = [] if value is None else value if isinstance(value, list) else [value]
        return [answer_in(str(v), self.answer) or str(v) for v in values]


def asked(row: Mapping[str, Any]) -> list[Message]:
    """The conversation to answer: ``prompt``, or ``messages`` without the answer that follows the last question.

    Raises:
        ChatError: if the row holds neither, or nothing is asked.
    """
    if row.get("prompt") is not None:
        system = row.get("system")
        before: list[Message] = [{"role": "system", "content": system}] if system else []
        return before + side(row["prompt"], "prompt", "user")
    if row.get("messages") is None:
        raise ChatError(f"no prompt and no messages; the row has {', '.join(map(str, row)) or 'nothing'}")
    messages = checked(row["messages"], "messages")
    last = max((n for n, m in enumerate(messages) if m["role"] != "assistant"), default=-1)
    if last < 0:
        raise ChatError("no turn asks anything")
    return messages[: last + 1]
