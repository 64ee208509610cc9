"""Prompts as the data of a run: what a policy answers, with the row that a reward may look at."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from trainer.batch import Batch
from trainer.config import schema, setting
from trainer.data.conversations import Conversations
from trainer.data.corpus import Corpus, Prompt, answer_in
from trainer.data.messages import Chat, ChatError, Row
from trainer.data.row_formats import QUESTION_FORMATS, RowFormat, columns_of, read_rows
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
from trainer.data.templates import Template, TemplateError
from trainer.data.tokenizer import Tokenizer

FORMAT = 2


@dataclass
class PromptBatch(Batch):
    """Prompts of one rank, in the order of ``rows``."""

    unit: ClassVar[str] = "prompts"

    prompts: list[Prompt]

    @property
    def weight(self) -> Tensor:
        """Prompts, a float64 scalar."""
        return torch.tensor(len(self.prompts), dtype=torch.float64)


class PromptStore:
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
            fields = json.loads(file.read(end - begin))
        return Prompt(self._tokens[first:last].astype(np.int64).tolist(), **fields)

    def join(self, units: Sequence[Prompt], numbers: Sequence[int]) -> PromptBatch:
        return PromptBatch(torch.tensor(list(numbers)), list(units))

    def collate(self, numbers: Sequence[int]) -> PromptBatch:
        return self.join([self.unit(n) for n in numbers], numbers)

    def preview(self, number: int, tokenizer: Tokenizer) -> dict[str, str]:
        return {"prompt": self.unit(number).text, "completion": ""}

    def spans(self, number: int) -> list[Span]:
        prompt = self.unit(number)
        return [Span("prompt", prompt.ids, [False] * len(prompt.ids))]

    def counts(self) -> dict[str, int]:
        f = self.facts
        return {
            "prompts": f["prompts"],
            "tokens": f["tokens"],
            "dropped": f["too_long"],
            **source_counts(f),
        }

    def summary(self, name: str) -> list[str]:
        f = self.facts
        long = f", {f['too_long']:,} left out as longer than {f['length']:,} tokens" if f["too_long"] else ""
        line = f"{name}: {f['prompts']:,} prompts, {f['tokens']:,} tokens (longest {f['longest']:,}{long})"
        return [line, *source_summary(name, f)]


@schema("data/prompts")
@dataclass
class PromptData(Conversations):
    """Prompts from files, folders or the hub; what else a row holds is handed to the rewards."""

    batch_type: ClassVar[type[Batch]] = PromptBatch

    answer: str | None = setting(
        None, "pattern whose first group is the answer in a text; null = the whole text. For exact match"
    )

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        try:
            re.compile(self.answer or "")
        except re.error as error:
            yield f"data.answer={self.answer} is not a valid regular expression ({error})"

    def columns_read(self) -> tuple[str, ...]:
        return columns_of(PROMPT_FORMATS)

    def open(self, tokenizer: Tokenizer, length: int, seed: int) -> Corpus:
        corpus = super().open(tokenizer, length, seed)
        stores = list(corpus.heldout.values())

        def first(count: int) -> list[Prompt]:
            numbered = ((part, n) for part in stores for n in range(len(part)))
            return [part.unit(n) for (part, n), _ in zip(numbered, range(count), strict=False)]

        # Held-out prompts are answered; there is nothing in them to compute a loss of.
        return Corpus(corpus.train, {}, corpus.summary, prompts=first, fingerprint_of=corpus.fingerprint)

    def rows(self, source: DataSource, tokenizer: Tokenizer, length: int) -> PromptStore:
        template = self.open_template(tokenizer)
        key = [f"prompts{FORMAT}", *self.cache_key(source, template), str(self.answer)]

        def write(folder: Path, fingerprint: str) -> None:
            prompts = self._encoded(source, template)
            facts = {"fingerprint": fingerprint, **_write(folder, prompts, source, tokenizer, length)}
            save_json(folder / "facts.json", facts)

        return PromptStore(open_prepared(self.cache_folder / "rows", key, tokenizer, length, write))

    def _encoded(self, source: DataSource, template: Template) -> Iterator[Prompt]:
        for where, chat, row in read_rows(source, PROMPT_FORMATS, "prompt", mixed=True):
            try:
                encoded = template.encode_prompt(chat.messages, chat.tools)
                self.account_for_lost([encoded], source)
            except TemplateError as error:
                source.reject(where, str(error))
                continue
            ideal = [answer_in(text, self.answer) or text for text in chat.ideal]
            yield Prompt(
                encoded.ids,
                str(chat.messages[-1].get("content", "")),
                ideal,
                self.answer,
                chat.messages,
                dict(row),
            )


def _write(
    folder: Path, prompts: Iterable[Prompt], source: DataSource, tokenizer: Tokenizer, length: int
) -> dict[str, Any]:
    """Write the prompts of at most ``length`` tokens; gives what is to be known of them."""
    lines, too_long = [0], 0
    with TokenWriter(folder, tokenizer) as out, (folder / "rows.jsonl").open("wb") as rows:
        for prompt in prompts:
            if len(prompt.ids) > length:
                too_long += 1
                continue
            out.add(prompt.ids)
            fields = {name: value for name, value in vars(prompt).items() if name != "ids"}
            line = json.dumps(fields, ensure_ascii=False, default=str).encode() + b"\n"
            rows.write(line)
            lines.append(lines[-1] + len(line))
    if not out.lengths:
        why = f"all {too_long:,} are longer than {length} tokens" if too_long else "it is empty"
        raise DataError(f"{source.path} has no prompt left to answer ({(source.skipped or [why])[0]})")
    save_array(folder / "starts.npy", out.offsets)
    save_array(folder / "lines.npy", np.asarray(lines, dtype=np.int64))
    return {
        "length": length,
        "dtype": out.dtype,
        "prompts": len(out.lengths),
        "tokens": sum(out.lengths),
        "longest": max(out.lengths),
        "too_long": too_long,
        **source_facts(source),
    }


def _question(read: Callable[[Row], Chat], row: Row) -> Chat:
    """What a row asks, without the answer that follows the last question."""
    chat = read(row)
    last = max((n for n, m in enumerate(chat.messages) if m["role"] != "assistant"), default=-1)
    if last < 0:
        raise ChatError("no turn asks anything")
    return replace(chat, messages=chat.messages[: last + 1])


PROMPT_FORMATS: list[RowFormat[Chat]] = [
    RowFormat(form.name, form.columns, partial(_question, form.read), form.optional) for form in QUESTION_FORMATS
]
"""How rows of prompts are written; the first whose columns a row has reads it."""
