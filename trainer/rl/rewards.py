"""What completions are worth: a reward model's score, a Python function's, a judge's, or a weighted sum of several."""

from __future__ import annotations

import importlib
import inspect
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Protocol

from torch import nn

from trainer.config import Node, schema, setting
from trainer.data.corpus import answer_in
from trainer.data.messages import Chat
from trainer.data.preferences import encode
from trainer.data.templates import Template, TemplateError, open_template
from trainer.data.tokenizer import Tokenizer, open_tokenizer
from trainer.generation.completion import Response
from trainer.generation.scoring import score
from trainer.models.hf_format import FormatError, WeightFiles, read_architecture
from trainer.models.load import HEAD, Model, ModelLoader
from trainer.models.lora import Full
from trainer.parallel import distributed
from trainer.rl.judge import Endpoint


class RewardError(RuntimeError):
    """A reward that cannot be had; the message names the row."""


class Scorer(Protocol):
    """Scores answers of this rank, None for one that has no score; collective."""

    def __call__(self, answers: Sequence[Response]) -> list[float | None]: ...


@dataclass
class Reward(Node):
    """The contract: a part of the weighted sum that a policy is trained on."""

    weight: float = setting(1.0, "factor in the sum; 0 = measured and logged, not learnt from")

    def open(self, load: ModelLoader, tokenizer: Tokenizer) -> Scorer:
        """Make it ready. ``load``: how the run builds its models; ``tokenizer``: the policy's."""
        raise NotImplementedError(f"{type(self).__name__} scores nothing")

    def starts_critic(self) -> str | None:
        """The folder of a model that a critic can start from, if there is one."""
        return None


@schema("reward/model")
@dataclass
class ModelReward(Reward):
    """The score of a reward model at the answer's last token."""

    path: str = setting(doc="a folder that pipeline=reward exported, or any with a head of one label")
    normalize: bool = setting(True, "in deviations from the mean of its training scores, where the folder knows them")

    def problems(self) -> Iterator[str]:
        try:
            if not read_architecture(Path(self.path)).scores or HEAD not in WeightFiles(Path(self.path)).files:
                yield f"the reward's path={self.path} holds no {HEAD}, so it scores nothing; export one by pipeline=reward"
        except FormatError as error:
            yield f"the reward's path={self.path}: {error}"

    def starts_critic(self) -> str | None:
        return self.path

    def open(self, load: ModelLoader, tokenizer: Tokenizer) -> Scorer:
        own = open_tokenizer(self.path)
        record = Path(self.path) / "onecurve.json"
        usual = json.loads(record.read_text()).get("reward", {}) if self.normalize and record.is_file() else {}
        loader = replace(
            load, config=Model(path=self.path), vocab_size=own.vocab_size, adapter=Full(), grow=False, scores=True
        )
        same = own.ids_as(tokenizer) and own.chat_template == tokenizer.chat_template
        template = None if same else open_template(None, own)
        return _ModelScorer(
            loader.frozen(), loader.computing, template, usual.get("mean", 0.0), usual.get("std", 0.0) or 1.0
        )


@dataclass
class _ModelScorer:
    """``template``: renders what the policy wrote for a model of another tokenizer; None = it reads the policy's own ids."""

    model: nn.Module
    computing: Callable[[], AbstractContextManager[object]]
    template: Template | None
    mean: float
    std: float

    def __call__(self, answers: Sequence[Response]) -> list[float | None]:
        ids = [self._ids(answer) for answer in answers]
        device = distributed.world().device
        with self.computing():
            return [(value - self.mean) / self.std for value in score(self.model, ids, device)]

    def _ids(self, answer: Response) -> list[int]:
        if self.template is None:
            return answer.prompt.ids + answer.ids
        before = answer.prompt.messages or [{"role": "user", "content": answer.prompt.text}]
        try:
            chat = Chat([*before, {"role": "assistant", "content": answer.text}], len(before))
            return list(encode(chat, self.template).ids)
        except TemplateError as error:
            raise RewardError(f"{named(answer)}: the reward model's template cannot render it ({error})") from None


@schema("reward/function")
@dataclass
class FunctionReward(Reward):
    """A Python function ``f(prompts, completions, rows, **arguments) -> list[float]``; None for an answer without a score."""

    function: str = setting(doc="where it can be imported from, such as my_package.rewards.brevity")
    arguments: dict[str, Any] = setting(dict, "further arguments by name")

    def problems(self) -> Iterator[str]:
        module, _, name = self.function.rpartition(".")
        try:
            found = getattr(importlib.import_module(module or "builtins"), name, None)
        except ImportError as error:
            yield f"the reward's function={self.function} cannot be imported ({error}); is its folder on PYTHONPATH?"
            return
        if not callable(found):
            yield f"the reward's function={self.function} is no function; {module} has none called {name}"
            return
        try:
            inspect.signature(found).bind([], [], [], **self.arguments)
        except TypeError as error:
            yield f"the reward's function={self.function} does not take (prompts, completions, rows) and arguments ({error})"

    def open(self, load: ModelLoader, tokenizer: Tokenizer) -> Scorer:
        module, _, name = self.function.rpartition(".")
        function: Callable[..., Any] = getattr(importlib.import_module(module or "builtins"), name)

        def scorer(answers: Sequence[Response]) -> list[float | None]:
            return self._called(function, answers) if answers else []

        return scorer

    def _called(self, function: Callable[..., Any], answers: Sequence[Response]) -> list[float | None]:
        try:
            found = self._call(function, answers)
        except Exception as error:
            for answer in answers:
                try:
                    self._call(function, [answer])
                except Exception as single:
                    raise RewardError(f"{self.function} failed on {named(answer)}: {_words(single)}") from single
            first = named(answers[0])
            raise RewardError(
                f"{self.function} failed on {len(answers)} answers from {first} on: {_words(error)}"
            ) from error
        if not isinstance(found, Sequence) or len(found) != len(answers):
            count = len(found) if isinstance(found, Sequence) else type(found).__name__
            raise RewardError(f"{self.function} gave {count} for {len(answers)} answers from {named(answers[0])} on")
        return [self._number(value, answer) for value, answer in zip(found, answers, strict=True)]

    def _call(self, function: Callable[..., Any], answers: Sequence[Response]) -> Any:
        found = function(
            [a.prompt.text for a in answers],
            [a.text for a in answers],
            [a.prompt.row for a in answers],
            **self.arguments,
        )
        return found.tolist() if hasattr(found, "tolist") else found

    def _number(self, value: Any, answer: Response) -> float | None:
        if value is None:
            return None
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise RewardError(f"{self.function} gave {value!r} for {named(answer)}; give a finite number, or None")
        return float(value)


@schema("reward/judge")
@dataclass
class JudgeReward(Reward):
    """A language model behind an OpenAI-compatible endpoint grades answers: RLAIF (Lee et al. 2023, arXiv:2309.00267)."""

    QUESTION: ClassVar[str] = """\
Grade the last answer to a conversation: is it correct, to the point and well written? Its length does not count.

{conversation}

[Answer]
{answer}

Say why in a sentence, then end with a grade from 0 to {most} in double brackets, such as [[{most}]]."""

    url: str = setting(doc="the endpoint up to and with /v1")
    model: str = setting(doc="the model's name there")
    key_variable: str = setting("OPENAI_API_KEY", "environment variable with the key; it is never logged")
    question: str | None = setting(
        None, "what is asked, with {conversation}, {answer} and {most}; null = a general rubric"
    )
    most: float = setting(10.0, "the best grade; grades are divided by it", above=0)
    timeout: float = setting(60.0, "seconds for an answer", above=0)
    attempts: int = setting(5, "how often a question is asked at most; the wait between doubles", least=1)
    backoff: float = setting(1.0, "first wait between attempts, seconds", least=0)
    together: int = setting(16, "questions under way at once, on each rank", least=1)
    tokens: int = setting(256, "longest verdict, tokens", least=1)
    missing: float = setting(0.5, "part of the verdicts that may be missing; more is an error", least=0, most=1)

    def problems(self) -> Iterator[str]:
        if not self.url.startswith(("http://", "https://")):
            yield f"the judge's url={self.url} does not begin with http:// or https://"
        if self.question is not None and "{answer}" not in self.question:
            yield "the judge's question does not hold {answer}; say where the answer is to stand"

    def open(self, load: ModelLoader, tokenizer: Tokenizer) -> Scorer:
        endpoint = Endpoint(
            self.url,
            self.model,
            self.key_variable,
            self.timeout,
            self.attempts,
            self.backoff,
            self.together,
            self.tokens,
        )

        def scorer(answers: Sequence[Response]) -> list[float | None]:
            if not answers:
                return []
            verdicts = [self.grade(text) for text in endpoint.ask([self._asked(answer) for answer in answers])]
            lost = sum(v is None for v in verdicts)
            if lost > self.missing * len(verdicts):
                raise RewardError(
                    f"{self.url} gave no grade for {lost} of {len(verdicts)} answers, more than the judge's "
                    f"missing={self.missing:g} allows; is the model fit to judge, and the endpoint well?"
                )
            return verdicts

        return scorer

    def grade(self, text: str | None) -> float | None:
        """The grade in a verdict, 0 to 1; None where there is none or it is out of range."""
        found = re.findall(r"\[\[\s*(\d+(?:\.\d+)?)\s*\]\]", text or "")
        value = float(found[-1]) / self.most if found else None
        return value if value is not None and value <= 1 else None

    def _asked(self, answer: Response) -> list[dict[str, Any]]:
        messages = answer.prompt.messages or [{"role": "user", "content": answer.prompt.text}]
        said = "\n\n".join(f"[{m['role']}]\n{m['content']}" for m in messages)
        parts = {"{conversation}": said, "{answer}": answer.text, "{most}": f"{self.most:g}"}
        # Not str.format: a question may hold braces of its own; and in one pass, since a conversation may, too.
        filled = re.sub("|".join(map(re.escape, parts)), lambda found: parts[found[0]], self.question or self.QUESTION)
        return [{"role": "user", "content": filled}]


@dataclass(frozen=True)
class Sum:
    """Scores of several rewards, and their weighted sum."""

    parts: Mapping[str, Scorer]
    weights: Mapping[str, float]

    def __call__(self, answers: Sequence[Response]) -> dict[str, list[float | None]]:
        """Scores by name, and ``score``: the sum, None where a part of it is missing; collective."""
        found = {name: scorer(answers) for name, scorer in self.parts.items()}
        counted = {name: weight for name, weight in self.weights.items() if weight}
        whole: list[float | None] = []
        for n in range(len(answers)):
            values = [(weight, found[name][n]) for name, weight in counted.items()]
            whole.append(None if any(v is None for _, v in values) else sum(w * v for w, v in values if v is not None))
        return {**(found if len(found) > 1 else {}), "score": whole}


def exact_match(
    prompts: list[str],
    completions: list[str],
    rows: list[dict[str, Any]],
    *,
    pattern: str | None = None,
    ideal: str = "ideal",
) -> list[float | None]:
    """1 for a completion that gives one of the right answers of its row, letter for letter; else 0.

    ``pattern``: its last match is the answer, None = the whole text. ``ideal``: the column of right answers. A row without
    any gives no score.
    """

    def value(row: Mapping[str, Any], completion: str) -> float | None:
        held = row.get(ideal)
        right = [str(v).strip() for v in (held if isinstance(held, list) else [held]) if v is not None]
        return float(answer_in(completion, pattern) in right) if right else None

    return [value(row, completion) for row, completion in zip(rows, completions, strict=True)]


def named(answer: Response) -> str:
    """Which answer it is, for a message."""
    prompt = answer.prompt.text if len(answer.prompt.text) <= 80 else f"{answer.prompt.text[:77]}..."
    return f"row {answer.number} ({prompt!r})"


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
