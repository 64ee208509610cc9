"""Trained folders, opened to be used: a model that answers, and one that scores answers."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from trainer.data.hub import local_folder
from trainer.data.jinja_environment import TRAINING_DAY, midnight
from trainer.data.messages import Chat
from trainer.data.preferences import encode
from trainer.data.templates import Template, open_template
from trainer.data.tokenizer import Tokenizer, open_tokenizer
from trainer.generation.generate import generate, stream
from trainer.generation.sampling import Sampling
from trainer.generation.scoring import score
from trainer.models.header import read_shape
from trainer.models.hf_format import FormatError, WeightFiles, read_object
from trainer.models.initial import HEAD
from trainer.models.load import Model, ModelLoader
from trainer.parallel.ddp import DDP

Messages = Sequence[dict[str, Any]]


@dataclass(frozen=True)
class ChatModel:
    """A folder's model with its tokenizer and chat template."""

    model: nn.Module
    tokenizer: Tokenizer
    template: Template

    @classmethod
    def open(cls, folder: str | Path, template: str | None = None, **options: Any) -> ChatModel:
        """Load it onto the GPU in bf16 if there is one, else onto the CPU in float32.

        ``folder``: or a hub id.
        ``template``: another one than the folder's own. ``options``: of the `Template`, such as its settings.

        Raises:
            InputError: if it is a hub id that has no folder.
            FormatError: if the folder holds no model of a known family.
            TemplateError: if there is no template, or none that fits the tokenizer, or one without these settings.
        """
        folder = local_folder(folder)
        read_shape(folder)  # a folder that is no model is named as such, not by the tokenizer that it lacks
        tokenizer = open_tokenizer(folder)
        chat = open_template(template, tokenizer, **options)
        tokenizer.stops = tuple(dict.fromkeys((*chat.stops, *tokenizer.stops)))
        return cls(_opened(folder, tokenizer), tokenizer, chat)

    def stream(self, messages: Messages, sampling: Sampling, key: tuple[int, ...]) -> Iterator[str]:
        """The answer to a conversation, piece by piece; what is drawn depends on ``key``."""
        ids, printed = list[int](), ""
        for token in stream(self.model, self.template.prompt(messages), sampling, stops=self.tokenizer.stops, key=key):
            ids.append(token)
            text = self.tokenizer.decode(ids)
            # A character of several tokens is shown when it is complete.
            if not text.endswith("\ufffd"):
                yield text[len(printed) :]
                printed = text

    def complete(self, chats: Sequence[Chat], sampling: Sampling, keys: Sequence[tuple[int, ...]]) -> list[str]:
        """An answer to each conversation; what is drawn depends on its key, not on what is decoded with it."""
        prompts = [self.template.prompt(chat.messages, chat.tools) for chat in chats]
        completions = generate(self.model, prompts, sampling, stops=self.tokenizer.stops, keys=keys)
        return [self.tokenizer.decode(completion.ids) for completion in completions]


@dataclass(frozen=True)
class RewardModel:
    """A folder's reward model. ``mean``, ``std``: of the scores of what it was trained on, stored with it."""

    model: nn.Module
    tokenizer: Tokenizer
    template: Template
    mean: float = 0.0
    std: float = 1.0

    @classmethod
    def open(cls, folder: str | Path, template: str | None = None, **options: Any) -> RewardModel:
        """Load it, like `ChatModel.open`; its template writes the day of training.

        Raises:
            FormatError: if the folder holds no model that scores.
        """
        folder = local_folder(folder)
        validate_scoring(folder)
        tokenizer = open_tokenizer(folder)
        chat = open_template(template, tokenizer, **{"now": midnight(TRAINING_DAY), **options})
        return cls(_opened(folder, tokenizer, scores=True), tokenizer, chat, *score_statistics(folder))

    def score(self, chats: Sequence[Chat], *, raw: bool = False) -> list[float]:
        """The score of each conversation's last answer, in deviations from the mean unless ``raw``.

        Raises:
            TemplateError: if the template cannot render one.
        """
        if not chats:
            return []
        ids = [encode(chat, self.template).ids for chat in chats]
        values = score(self.model, ids, next(self.model.parameters()).device)
        return values if raw else [(value - self.mean) / self.std for value in values]


def validate_scoring(folder: Path) -> None:
    """Read the headers of a reward model.

    Raises:
        FormatError: if the folder holds no model that scores.
    """
    if problem := scoring_problem(folder):
        raise FormatError(f"{folder}: {problem}")


def scoring_problem(folder: Path) -> str | None:
    """Why a folder holds no model that scores; None if it does."""
    try:
        score_statistics(folder)
        if read_shape(folder).scores and HEAD in WeightFiles(folder).files:
            return None
    except FormatError as error:
        return str(error)
    return f"it has no {HEAD}, so it scores nothing; give an export of pipeline=reward"


def score_statistics(folder: Path) -> tuple[float, float]:
    """Mean and standard deviation of the scores that a reward model was trained on; 0 and 1 where they are not recorded.

    Raises:
        FormatError: if the record is damaged.
    """
    record = folder / "onecurve.json"
    recorded = read_object(record).get("reward", {}) if record.is_file() else {}
    try:
        return float(recorded.get("mean", 0.0)), float(recorded.get("std", 0.0)) or 1.0
    except (AttributeError, TypeError, ValueError):
        raise FormatError(f"{record}: reward={recorded!r} is no mean and std; export the model again") from None


def _opened(folder: Path, tokenizer: Tokenizer, *, scores: bool = False) -> nn.Module:
    """The model on its device; what of the folder is not read is said on stderr."""
    load = ModelLoader(Model(path=str(folder)), DDP(), 0, tokenizer.vocab_size, scores=scores)
    for remark in load.remarks():
        print(remark, file=sys.stderr)
    model = load.load().eval()
    return narrowed(model, torch.bfloat16).to("cuda") if torch.cuda.is_available() else model


def narrowed(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Hold a model's parameters in ``dtype``, and never its buffers: positions far along need the angles in float32."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model
