"""What scores completions: a reward model or a Python function, each a part of a weighted sum; `rl/judge` adds a third.

A reward is a subclass of `Reward` here, or in a module that ``imports=[mine]`` names; mostly a function is enough
(``reward@pipeline.reward.main=function pipeline.reward.main.function=mine.brevity``).
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Protocol

from torch import nn

from trainer.config import InputError, Node, RunError, schema, setting
from trainer.data.corpus import answer_in
from trainer.data.hub import absence, folder_of
from trainer.data.jinja_environment import TRAINING_DAY, midnight
from trainer.data.messages import Chat, tools_of
from trainer.data.preferences import encode
from trainer.data.templates import Template, TemplateError, open_template
from trainer.data.tokenizer import Tokenizer, open_tokenizer
from trainer.generation.completion import Response
from trainer.generation.pretrained import score_statistics, scoring_problem
from trainer.generation.scoring import score
from trainer.models.adapter import Full
from trainer.models.load import Model, ModelLoader
from trainer.parallel import distributed
from trainer.parallel.mesh import run_on_leaders
from trainer.rl.functions import load_reward, may_pass

FAILURES = (Exception, SystemExit)
"""What a user's function may end with: a ``sys.exit`` in it must not end the run as if it had finished."""


class RewardError(InputError):
    """A reward that could not be computed; the message names the row."""


class UnansweredRewardError(RunError):
    """A reward that could not be computed now, since what it asks did not answer."""


class Scorer(Protocol):
    """Scores responses of this rank, None for one that has no score; collective."""

    def __call__(self, responses: Sequence[Response]) -> list[float | None]: ...


def asked_once(scorer: Callable[[Sequence[Response]], list[float | None]]) -> Scorer:
    """A scorer that each replica asks once: a model, or a function with a clock, may answer its ranks differently."""
    return lambda responses: run_on_leaders(lambda: scorer(responses))


@dataclass
class Reward(Node):
    """The contract: a part of the weighted sum that a policy is trained on."""

    usual_clip: ClassVar[float] = 0.0
    """Where ``pipeline.score_clip=null`` clips the sum; 0 = not, since the scale of the scores is their own."""

    weight: float = setting(1.0, "factor in the sum; 0 = measured and logged, not trained on")

    def open(self, load: ModelLoader, tokenizer: Tokenizer) -> Scorer:
        """Make it ready.

        load: how the run builds its models
        tokenizer: the policy's
        """
        raise NotImplementedError(f"{type(self).__name__} scores nothing")

    def model_folder(self) -> str | None:
        """The folder of the model that scores, if there is one; a critic can start from it."""
        return None


@schema("reward/model")
@dataclass
class ModelReward(Reward):
    """The score of a reward model at the response's last token."""

    usual_clip: ClassVar[float] = 10.0  # standard deviations

    path: str = setting(doc="a folder that pipeline=reward exported, or any with a head of one label")
    normalize: bool = setting(
        True, "in standard deviations from the mean of its training scores, where the folder knows them"
    )

    def __post_init__(self) -> None:
        self.path = folder_of(self.path)

    def problems(self) -> Iterator[str]:
        if problem := absence(self.path) or scoring_problem(Path(self.path)):
            yield f"the reward's path={self.path}: {problem}"

    def model_folder(self) -> str | None:
        return self.path

    def open(self, load: ModelLoader, tokenizer: Tokenizer) -> Scorer:
        own = open_tokenizer(self.path)
        mean, std = score_statistics(Path(self.path)) if self.normalize else (0.0, 1.0)
        loader = replace(
            load, config=Model(path=self.path), vocab_size=own.vocab_size, adapter=Full(), new_tokens=0, scores=True,
            fake_quantizer=None,
        )  # fmt: skip
        same = own.ids_as(tokenizer) and own.chat_template == tokenizer.chat_template
        template = None if same else open_template(None, own, now=midnight(TRAINING_DAY))
        return _ModelScorer(loader.frozen(), loader.computing, template, mean, std)


@dataclass
class _ModelScorer:
    """A reward model, ready to score.

    model: gives a score at each token
    computing: the context of its forward
    template: renders what the policy wrote for a model of another tokenizer; None = it reads the policy's own ids
    mean, std: of its training scores
    """

    model: nn.Module
    computing: Callable[[], AbstractContextManager[object]]
    template: Template | None
    mean: float
    std: float

    def __call__(self, responses: Sequence[Response]) -> list[float | None]:
        ids = [self._ids(response) for response in responses]
        device = distributed.world().device
        with self.computing():
            return [(value - self.mean) / self.std for value in score(self.model, ids, device)]

    def _ids(self, response: Response) -> list[int]:
        if self.template is None:
            return response.prompt.ids + response.ids
        before = response.prompt.messages or [{"role": "user", "content": response.prompt.text}]
        try:
            answer = {"role": "assistant", "content": response.text}
            chat = Chat([*before, answer], len(before), tools_of(response.prompt.row))
            return list(encode(chat, self.template).ids)
        except TemplateError as error:
            raise RewardError(f"{describe(response)}: the reward model's template cannot render it ({error})") from None


@schema("reward/function")
@dataclass
class FunctionReward(Reward):
    """A Python function ``f(prompts, completions, rows, **arguments) -> list[float]``; None for one without a score.

    Parameters called ``ideals`` and ``patterns`` are filled, too: each prompt's right answers, and the pattern by which an
    answer is found in a text, as ``data.columns`` and ``data.answer`` name them.
    One of TRL's, ``f(completions, **kwargs)``, is taken as it is: columns of the data are its keyword arguments.
    """

    function: str = setting(doc="where it is: my_package.rewards.brevity, or in a file: my_rewards.py:brevity")
    arguments: dict[str, Any] = setting(dict, "further arguments by name")

    def problems(self) -> Iterator[str]:
        try:
            function = self._function()
        except InputError as error:
            yield f"the reward's {error}"
            return
        try:
            inspect.signature(function).bind([], [], [], **self._filled(function, []) | self.arguments)
        except TypeError as error:
            yield f"the reward's function={self.function} does not take (prompts, completions, rows) and arguments ({error})"

    def open(self, load: ModelLoader, tokenizer: Tokenizer) -> Scorer:
        return asked_once(self.scorer())

    def scorer(self) -> Scorer:
        """The function, with every failure of it as an error that names the row."""
        function = self._function()

        def scorer(responses: Sequence[Response]) -> list[float | None]:
            return self._scores(function, responses) if responses else []

        return scorer

    def _function(self) -> Callable[..., Any]:
        return load_reward(self.function)

    def _scores(self, function: Callable[..., Any], responses: Sequence[Response]) -> list[float | None]:
        try:
            values = self._call(function, responses)
        except FAILURES as error:
            if may_pass(error):
                raise UnansweredRewardError(
                    f"{self.function} got no answer from what it asks, for {len(responses)} answers from "
                    f"{describe(responses[0])} on: {_cause(error)}; is it up? The same command goes on"
                ) from error
            for response in responses:
                try:
                    self._call(function, [response])
                except FAILURES as single:
                    raise RewardError(f"{self.function} failed on {describe(response)}: {_cause(single)}") from single
            raise RewardError(
                f"{self.function} failed on {len(responses)} answers from {describe(responses[0])} on: {_cause(error)}"
            ) from error
        if not isinstance(values, Sequence) or len(values) != len(responses):
            count = len(values) if isinstance(values, Sequence) else type(values).__name__
            raise RewardError(
                f"{self.function} gave {count} for {len(responses)} answers from {describe(responses[0])} on"
            )
        return [self._number(value, response) for value, response in zip(values, responses, strict=True)]

    def _call(self, function: Callable[..., Any], responses: Sequence[Response]) -> Any:
        prompts, rows = [r.prompt.text for r in responses], [r.prompt.row for r in responses]
        arguments = self._filled(function, responses) | self.arguments
        values = function(prompts, [r.text for r in responses], rows, **arguments)
        return values.tolist() if hasattr(values, "tolist") else values

    def _filled(self, function: Callable[..., Any], responses: Sequence[Response]) -> dict[str, Any]:
        """What of the data the function asks for by a parameter's name."""
        offered = {"ideals": [r.prompt.ideal for r in responses], "patterns": [r.prompt.pattern for r in responses]}
        asked = inspect.signature(function).parameters
        return {name: values for name, values in offered.items() if name in asked}

    def _number(self, value: Any, response: Response) -> float | None:
        if value is None:
            return None
        try:
            number = value.item() if hasattr(value, "item") else value
            if isinstance(number, int | float) and math.isfinite(number):
                return float(number)
        except (
            OverflowError,
            ValueError,
            RuntimeError,
        ):  # an integer too large for a float; an array of several numbers
            pass
        shown = repr(value)
        shown = shown if len(shown) <= 80 else f"{shown[:77]}..."
        raise RewardError(f"{self.function} gave {shown} for {describe(response)}; give a finite number, or None")


def exact_match(
    prompts: list[str],
    completions: list[str],
    rows: list[dict[str, Any]],
    *,
    pattern: str | None = None,
    ideal: str | None = None,
    ideals: Sequence[list[str]] = (),
    patterns: Sequence[str | None] = (),
) -> list[float | None]:
    """1 for a completion that gives one of the right answers of its row, letter for letter; else 0.

    pattern: its last match is the answer, in a completion and in the column of right answers; None = `patterns`
    ideal: the column of right answers; None = `ideals`, or else ``ideal``. A row without any gives no score
    ideals: each row's right answers (``data.columns.ideal``)
    patterns: each row's pattern (``data.answer``); None = the whole text is the answer
    """

    def score_of(number: int, completion: str) -> float | None:
        finds = pattern if pattern is not None or not patterns else patterns[number]
        value = ideals[number] if ideal is None and ideals else rows[number].get(ideal or "ideal")
        answers = [str(v) for v in (value if isinstance(value, list) else [value]) if v is not None]
        right = [answer_in(answer, finds) or answer.strip() for answer in answers]
        return float(answer_in(completion, finds) in right) if right else None

    return [score_of(number, completion) for number, completion in enumerate(completions)]


def describe(response: Response) -> str:
    """Which response it is, for a message."""
    text = response.prompt.text
    return f"row {response.number} ({text if len(text) <= 80 else f'{text[:77]}...'!r})"


def _cause(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"
