"""The console: a progress bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import rich.console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

SECONDS = 5.0
"""Between plain lines; the first and the last step always have one."""

SCORE = "objective/score"
TABLES = {"errors": "most wrong"}
"""What tables are called here, where their file's name would be misunderstood."""
PROMPT, ANSWER = 60, 200
"""Characters of a sample's prompt and answer that are shown."""


class Console:
    """A sink that shows speed, loss and remaining time; evaluations and samples get lines of their own."""

    def __init__(self, name: str, done: int, last: int) -> None:
        self.last, self.done = last, done
        self._console = rich.console.Console(highlight=False)
        self._started, self._shown = time.monotonic(), 0.0
        self._bar: Progress | None = None
        self._task = TaskID(0)
        if self._console.is_terminal:
            figures = TextColumn("{task.fields[figures]}")
            times = (TimeElapsedColumn(), TimeRemainingColumn())
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), figures, *times)
            self._bar = Progress(*columns, console=self._console)
            self._task = self._bar.add_task(name, total=last, completed=done, figures="")
            self._bar.start()

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        if "loss" not in values:
            self.say(f"step {step}: " + "  ".join(f"{name} {_short(value)}" for name, value in values.items()))
            return
        score = f"  score {_short(values[SCORE])}" if SCORE in values else ""
        rate = f"{values['tokens_per_second']:,.0f} tokens/s"
        figures = f"loss {values['loss']:.4f}{score}  lr {values['lr']:.2e}  {rate}"
        if self._bar is not None:
            self._bar.update(self._task, completed=step, figures=figures)
            return
        now = time.monotonic()
        if now - self._shown >= SECONDS or step in (self.done + 1, self.last):
            self._shown = now
            left = (now - self._started) / max(1, step - self.done) * (self.last - step)
            print(f"step {step}/{self.last}  {figures}  mfu {values['mfu']:.1%}  {_clock(left)} left", flush=True)

    def histogram(self, step: int, name: str, values: Sequence[float]) -> None:
        pass  # a line of numbers has no room for them

    def table(self, step: int, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        self.say(f"{TABLES.get(name, name)} after step {step}: {_sample(rows[0])}")

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()

    def say(self, text: str) -> None:
        """A line of its own."""
        if self._bar is not None:
            self._bar.console.print(text, markup=False)
        else:
            print(text, flush=True)


def _sample(row: Mapping[str, Any]) -> str:
    """The end of a prompt and the beginning of what follows it: a long prompt must not hide the answer."""
    prompt, completion = str(row["prompt"]), str(row["completion"])
    asked = f"...{prompt[-PROMPT:]}" if len(prompt) > PROMPT else prompt
    answer = f"{completion[:ANSWER]}..." if len(completion) > ANSWER else completion
    return f"{asked!r} -> {answer!r}" if asked else repr(answer)


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
