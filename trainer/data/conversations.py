"""What all data has that a chat template renders: which template, and what becomes of texts that it does not write."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum, auto
from typing import Any

from trainer.config import ConfigError, setting
from trainer.data.built_in_templates import BUILT_IN
from trainer.data.corpus import Corpus, Files
from trainer.data.jinja_environment import TRAINING_DAY, midnight
from trainer.data.messages import ROLES
from trainer.data.sources import LOST, DataSource
from trainer.data.templates import (
    RESERVED,
    SUFFIX,
    TOOL_USE,
    EncodedChat,
    Template,
    TemplateError,
    open_template,
    unknown_template,
)
from trainer.data.tokenizer import Tokenizer

READING = 2
"""Of the rules by which rows are read: what other rules prepared is prepared again."""


class OnLostText(StrEnum):
    """How a row is handled of which the template does not write a text."""

    error = auto()
    warn = auto()


@dataclass
class Conversations(Files):
    """Data that a chat template renders."""

    template: str | None = setting(
        None, f"null = the tokenizer's own, a file of Jinja (FILE{SUFFIX}), or {', '.join(BUILT_IN)}"
    )
    roles: dict[str, str] = setting(
        dict, f"what a speaker is whose name is not known: {{customer: user}}; one of {', '.join(ROLES)}"
    )
    template_settings: dict[str, Any] = setting(
        dict, "defaults of the template's own variables, such as enable_thinking; the export's template has them, too"
    )
    template_date: str = setting(TRAINING_DAY, "the day that strftime_now gives to the template, as YYYY-MM-DD")
    train_empty_thinking: bool = setting(
        False, "learn the empty <think></think> that a template writes before an answer without reasoning"
    )
    control_tokens_in_answers: bool = setting(
        False, "names of control tokens in what the assistant wrote become those tokens; elsewhere they stay text"
    )
    on_lost_text: OnLostText = setting(
        OnLostText.error, "a row of which the template does not write a text: error, or warn (count it, learn the rest)"
    )

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        if self.template is not None and (problem := unknown_template(self.template)):
            yield f"data.template={problem}"
        for name, role in self.roles.items():
            if role not in ROLES:
                yield f"data.roles.{name}={role} is not a role; use {', '.join(ROLES)}"
        for name in self.template_settings:
            if not name.isidentifier() or name in RESERVED:
                yield f"data.template_settings.{name} is no variable that can be set; name one that the template reads"
        try:
            midnight(self.template_date)
        except ValueError:
            yield f"data.template_date={self.template_date} is no date; write it as YYYY-MM-DD"

    def sources(self, paths: Sequence[str], *, heldout: bool = False) -> list[DataSource]:
        sources = super().sources(paths, heldout=heldout)
        for source in sources:
            source.roles = self.roles
        return sources

    def open(self, tokenizer: Tokenizer, length: int, seed: int) -> Corpus:
        template = self.open_template(tokenizer)
        # What the model learns to answer in is what its export must say.
        tokenizer.chat_template = template.source
        if template.with_tools is None:
            tokenizer.named_templates.pop(TOOL_USE, None)
        else:
            tokenizer.named_templates[TOOL_USE] = template.with_tools
        tokenizer.stops = tuple(dict.fromkeys((*template.stops, *tokenizer.stops)))
        return super().open(tokenizer, length, seed)

    def open_template(self, tokenizer: Tokenizer) -> Template:
        """The template that conversations are rendered by.

        Raises:
            ConfigError: if there is none, or it does not fit the tokenizer.
        """
        try:
            return open_template(
                self.template,
                tokenizer,
                settings=self.template_settings,
                now=midnight(self.template_date),
                train_empty_thinking=self.train_empty_thinking,
                control_tokens_in_answers=self.control_tokens_in_answers,
            )
        except TemplateError as error:
            raise ConfigError([str(error)]) from None

    def cache_key(self, source: DataSource, template: Template) -> list[str]:
        """What prepared data depends on: the files, the rendering, and how rows are read."""
        names = str([sorted(source.columns.items()), sorted(source.roles.items()), READING])
        return [source.fingerprint(), template.fingerprint, f"{self.on_bad_row} {self.on_lost_text}", names]

    def account_for_lost(self, encoded: Sequence[EncodedChat], source: DataSource) -> None:
        """What the template does not write of a row is an error, or counted.

        Raises:
            TemplateError: if something is lost, unless ``on_lost_text=warn``.
        """
        lost = list(dict.fromkeys(what for part in encoded for what in part.lost))
        if lost and self.on_lost_text is OnLostText.error:
            remedy = "use another data.template, or data.on_lost_text=warn to learn the rest"
            raise TemplateError(f"the template does not write {', '.join(lost)}; {remedy}")
        if lost:
            source.notes[LOST] += 1
